"""Any transformers image-text-to-text model, through its own configuration, image processor and chat template."""

from vlmtune.models.auto.family import AutoFamily

__all__ = ["AutoFamily"]
