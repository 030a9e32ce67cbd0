"""The official layout of InternVL's weights against the parameters of transformers' InternVLForConditionalGeneration.

Names on the left are those of OpenGVLab's modeling_internvl_chat.py and its decoders; the decoders but InternLM2 are
transformers' own classes inside (Qwen2, Phi-3, Llama), whose names differ by their prefix only.
"""

from __future__ import annotations

from vlmtune.weights.layout import Rule, WeightTable
from vlmtune.weights.ops import KEEP, Chunk, Op, SplitGQA

_TOWER = "model.vision_tower."
_BLOCK = "model.vision_tower.encoder.layer.*."
_OFFICIAL_BLOCK = "vision_model.encoder.layers.*."


def _both(disk: str, *parameters: str, op: Op = KEEP) -> list[Rule]:
    """A layer's weight and bias."""
    return [
        Rule(f"{disk}.{part}", tuple(f"{name}.{part}" for name in parameters), op)
        for part in ("weight", "bias")
    ]


_VISION = [
    Rule("vision_model.embeddings.class_embedding", (f"{_TOWER}embeddings.cls_token",)),
    Rule("vision_model.embeddings.position_embedding", (f"{_TOWER}embeddings.position_embeddings",)),
    *_both("vision_model.embeddings.patch_embedding", f"{_TOWER}embeddings.patch_embeddings.projection"),
    *_both(
        f"{_OFFICIAL_BLOCK}attn.qkv",
        *(f"{_BLOCK}attention.{one}_proj" for one in "qkv"),
        op=Chunk(3),
    ),
    *_both(f"{_OFFICIAL_BLOCK}attn.proj", f"{_BLOCK}attention.projection_layer"),
    Rule(f"{_OFFICIAL_BLOCK}attn.q_norm.weight", (f"{_BLOCK}attention.q_norm.weight",)),
    Rule(f"{_OFFICIAL_BLOCK}attn.k_norm.weight", (f"{_BLOCK}attention.k_norm.weight",)),
    *_both(f"{_OFFICIAL_BLOCK}norm1", f"{_BLOCK}layernorm_before"),
    *_both(f"{_OFFICIAL_BLOCK}norm2", f"{_BLOCK}layernorm_after"),
    Rule(f"{_OFFICIAL_BLOCK}ls1", (f"{_BLOCK}lambda_1",)),
    Rule(f"{_OFFICIAL_BLOCK}ls2", (f"{_BLOCK}lambda_2",)),
    Rule(f"{_OFFICIAL_BLOCK}mlp.**", (f"{_BLOCK}mlp.**",)),
]

_PROJECTOR = [
    *_both("mlp1.0", "model.multi_modal_projector.layer_norm"),
    *_both("mlp1.1", "model.multi_modal_projector.linear_1"),
    *_both("mlp1.3", "model.multi_modal_projector.linear_2"),
]

_LANGUAGE = [
    Rule("language_model.lm_head.weight", ("lm_head.weight",)),
    Rule("language_model.model.**", ("model.language_model.**",)),
]


def _internlm2(heads: SplitGQA) -> list[Rule]:
    ours, theirs = "model.language_model.layers.*.", "language_model.model.layers.*."
    return [
        Rule("language_model.output.weight", ("lm_head.weight",)),
        Rule("language_model.model.tok_embeddings.weight", ("model.language_model.embed_tokens.weight",)),
        Rule("language_model.model.norm.weight", ("model.language_model.norm.weight",)),
        *_both(f"{theirs}attention.wqkv", *(f"{ours}self_attn.{one}_proj" for one in "qkv"), op=heads),
        *_both(f"{theirs}attention.wo", f"{ours}self_attn.o_proj"),
        Rule(f"{theirs}feed_forward.w1.weight", (f"{ours}mlp.gate_proj.weight",)),
        Rule(f"{theirs}feed_forward.w3.weight", (f"{ours}mlp.up_proj.weight",)),
        Rule(f"{theirs}feed_forward.w2.weight", (f"{ours}mlp.down_proj.weight",)),
        Rule(f"{theirs}attention_norm.weight", (f"{ours}input_layernorm.weight",)),
        Rule(f"{theirs}ffn_norm.weight", (f"{ours}post_attention_layernorm.weight",)),
    ]


def official_table(internlm2: SplitGQA | None) -> WeightTable:
    """The table of a folder; `internlm2` is how the fused attention of an InternLM2 decoder is cut, if it is one."""
    return WeightTable([*_VISION, *_PROJECTOR, *(_LANGUAGE if internlm2 is None else _internlm2(internlm2))])
