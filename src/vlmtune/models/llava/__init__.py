"""LLaVA models with a CLIP or SigLIP tower, AuroraCap among them: token merging, slow-fast video, three layouts."""

from vlmtune.models.llava.family import LlavaFamily as LlavaFamily
