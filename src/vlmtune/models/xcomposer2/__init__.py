"""InternLM-XComposer2: one family for the 7b, vl-7b and 4khd-7b checkpoints."""

from vlmtune.models.xcomposer2.family import XComposer2Family as XComposer2Family
