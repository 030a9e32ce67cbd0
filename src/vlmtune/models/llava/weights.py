"""The layouts of LLaVA's weights against the parameters of transformers' LlavaForConditionalGeneration.

XTuner writes three folders, whose tensors have the names that the parts have by themselves; official LLaVA
(haotian-liu) hangs tower and projector into the language model; transformers' own files keep the names of its older
classes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from vlmtune.weights.layout import Rule, WeightTable
from vlmtune.weights.ops import KEEP, MeanRows, Op
from vlmtune.weights.places import PROJECTOR, TOWER

_TOWER = "model.vision_tower."
_PROJECTOR = "model.multi_modal_projector."
_LANGUAGE = "model.language_model."
_EMBEDDING, _HEAD = f"{_LANGUAGE}embed_tokens.weight", "lm_head.weight"


def xtuner_table() -> WeightTable:
    """The language model at the root, `visual_encoder/` and `projector/`."""
    return WeightTable(
        [
            Rule("vision_model.**", (f"{_TOWER}**",), folder=TOWER),
            *_projector("model.", PROJECTOR),
            Rule("lm_head.weight", (_HEAD,)),
            Rule("model.**", (f"{_LANGUAGE}**",)),
        ]
    )


def llava_table() -> WeightTable:
    """Official LLaVA: one folder."""
    return WeightTable(
        [
            Rule("model.vision_tower.vision_tower.vision_model.**", (f"{_TOWER}**",)),
            *_projector("model.mm_projector.", ""),
            Rule("lm_head.weight", (_HEAD,)),
            Rule("model.**", (f"{_LANGUAGE}**",)),
        ]
    )


def native_table(added: int) -> WeightTable:
    """The names in the files of `-hf` folders, which every version of transformers reads.

    added: rows of embedding and head that the files have beyond the model's, for tokens that the model knows as a
    placeholder only.
    """
    op: Op = MeanRows(added) if added else KEEP
    return WeightTable(
        [
            Rule("language_model.lm_head.weight", (_HEAD,), op),
            Rule("language_model.model.embed_tokens.weight", (_EMBEDDING,), op),
            Rule("language_model.model.**", (f"{_LANGUAGE}**",)),
            Rule("multi_modal_projector.**", (f"{_PROJECTOR}**",)),
            Rule("vision_tower.vision_model.**", (f"{_TOWER}**",)),
        ]
    )


def _projector(disk: str, folder: str) -> list[Rule]:
    """Two linear layers, an activation between them."""
    return [
        Rule(f"{disk}{place}.{part}", (f"{_PROJECTOR}linear_{number}.{part}",), folder=folder)
        for place, number in ((0, 1), (2, 2))
        for part in ("weight", "bias")
    ]


def shield_embedding(model: PreTrainedModel) -> None:
    """Lets a placeholder lie beyond the vocabulary, as in models whose tokenizer has no `<image>`.

    Its embedding is replaced by features whatever it is, and gets no gradient; it only must be found.
    """
    inner: Any = model
    if inner.config.image_token_id >= inner.config.text_config.vocab_size:
        inner.get_input_embeddings().register_forward_pre_hook(_inside)


def _inside(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    ids, *rest = args
    table: Any = module
    return (ids.clamp(max=table.num_embeddings - 1), *rest)
