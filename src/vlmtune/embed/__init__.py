"""Regions of a picture as rows of a language model's input space (pseudo-text embeddings)."""
