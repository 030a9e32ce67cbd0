"""LLaVA-type models with a CLIP or SigLIP tower, AuroraCap among them: token merging, slow-fast video, three layouts."""
