"""Checkpoints that other trainers wrote: read them, sort their names, lay them out as a model folder and an adapter."""
