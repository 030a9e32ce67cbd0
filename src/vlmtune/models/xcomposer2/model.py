"""InternLM-XComposer2 on transformers' blocks: the Llama arithmetic with partial LoRA, CLIP, and a projector.

Module names are those of the publisher's checkpoints where they are plain, so that adapters and lists of targets are
the ones that its users know. After `import vlmtune.models`, AutoModelForCausalLM opens folders of this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, CLIPVisionModel, GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from vlmtune.models.xcomposer2.configuration import XComposer2Config
from vlmtune.nn.partial_lora import PartialLoRA

MERGE = 2
"""With high resolution, so many patches in each direction become one visual token."""


class Attention(nn.Module):
    """Grouped attention from one fused layer: per key head its query heads, then the key and the value head."""

    def __init__(self, config: LlamaConfig, whole: XComposer2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = cast(int, config.head_dim)
        self.groups = cast(int, config.num_key_value_heads)
        self.num_key_value_groups = config.num_attention_heads // self.groups  # transformers' attention reads it
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        inner = config.num_attention_heads * self.head_dim
        fused = inner + 2 * self.groups * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, fused, bias=config.attention_bias)
        self.wqkv_partial = PartialLoRA(
            config.hidden_size,
            fused,
            rank=whole.partial_wqkv_rank,
            scale=whole.partial_wqkv_scale,
            dropout=whole.partial_dropout,
        )
        self.wo = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        self.wo_partial = _partial(self.wo, whole)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        image_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape[:-1]  # (B, L)
        fused = self.wqkv_partial(hidden_states, self.wqkv(hidden_states), image_mask)
        heads = fused.view(*shape, self.groups, self.num_key_value_groups + 2, self.head_dim)
        query = heads[..., :-2, :].reshape(*shape, -1, self.head_dim).transpose(1, 2)
        key, value = heads[..., -2, :].transpose(1, 2), heads[..., -1, :].transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        attended = attended.reshape(*shape, -1).contiguous()
        return self.wo_partial(attended, self.wo(attended), image_mask), weights


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig, whole: XComposer2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w1_partial = _partial(self.w1, whole)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3_partial = _partial(self.w3, whole)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w2_partial = _partial(self.w2, whole)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        gate = self.w1_partial(x, self.w1(x), image_mask)
        inner = self.act_fn(gate) * self.w3_partial(x, self.w3(x), image_mask)
        return cast(torch.Tensor, self.w2_partial(inner, self.w2(inner), image_mask))


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlamaConfig, whole: XComposer2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = Attention(config, whole, layer_idx)
        self.feed_forward = FeedForward(config, whole)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, *, image_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), image_mask=image_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + cast(torch.Tensor, self.feed_forward(self.ffn_norm(hidden_states), image_mask))


def _partial(layer: nn.Linear, whole: XComposer2Config) -> PartialLoRA:
    return PartialLoRA(
        layer.in_features,
        layer.out_features,
        rank=whole.partial_rank,
        scale=whole.partial_scale,
        dropout=whole.partial_dropout,
    )


class Decoder(LlamaModel):
    """transformers' Llama decoder around the layers above, which get `image_mask` from its keyword arguments."""

    _no_split_modules = ["DecoderLayer"]
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}

    def __init__(self, config: LlamaConfig, whole: XComposer2Config) -> None:
        PreTrainedModel.__init__(self, config)  # LlamaModel's own would build Llama's layers
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, whole, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PartialLoRA):
            init.kaiming_uniform_(module.A, a=5**0.5)
            init.zeros_(module.B)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = cast(nn.Embedding, value)


class Projector(nn.Sequential):
    """Two layers; with high resolution, also the learned separators that stand among the visual tokens before them.

    Args:
        separators: `row_separator` ends every row of visual tokens, `global_separator` stands between the view of the
            whole picture and the tiles. The publisher's names are plora_sub_GN and plora_glb_GN.
    """

    def __init__(self, inputs: int, outputs: int, *, separators: bool) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))
        # in the shapes of the publisher's files
        self.global_separator = nn.Parameter(torch.empty(1, 1, inputs)) if separators else None
        self.row_separator = nn.Parameter(torch.empty(1, 1, 1, inputs)) if separators else None

    def forward(self, features: torch.Tensor, tile_grids: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            features: (tiles, patches, d) of the tower, without its class token.
            tile_grids: (pictures, 2) rows and columns of tiles, with high resolution.

        Returns:
            (visual tokens of all pictures, hidden size).
        """
        if tile_grids is None or self.global_separator is None or self.row_separator is None:
            return cast(torch.Tensor, nn.Sequential.forward(self, features.flatten(0, 1)))
        tiles = _merge_neighbours(features)  # (tiles, g, g, 4·d)
        pictures: list[torch.Tensor] = []
        start = 0
        for rows, columns in tile_grids.tolist():
            view, rest = tiles[start], tiles[start + 1 : start + 1 + rows * columns]
            start += 1 + rows * columns
            whole = torch.cat([torch.cat(tuple(row), dim=1) for row in rest.unflatten(0, (rows, columns))], dim=0)
            pictures += [_ended(view, self.row_separator), self.global_separator[0], _ended(whole, self.row_separator)]
        if start != len(tiles):
            raise ValueError(f"{len(tiles)} tiles, but tile_grids asks for {start}")
        return cast(torch.Tensor, nn.Sequential.forward(self, torch.cat(pictures)))


def _ended(grid: torch.Tensor, separator: torch.Tensor) -> torch.Tensor:
    """(rows, columns, d) -> (rows · (columns + 1), d), every row with the separator (1, 1, 1, d) behind it."""
    return torch.cat([grid, separator[0].expand(len(grid), 1, -1)], dim=1).flatten(0, 1)


def _merge_neighbours(features: torch.Tensor) -> torch.Tensor:
    """(tiles, side · side, d) -> (tiles, side ÷ 2, side ÷ 2, 4 · d): each 2 × 2 patches end to end, row by row."""
    side = int(features.shape[1] ** 0.5)
    grid = features.view(len(features), side // MERGE, MERGE, side // MERGE, MERGE, -1)
    return grid.transpose(2, 3).flatten(3)


class XComposer2PreTrainedModel(PreTrainedModel):
    config_class = XComposer2Config
    config: XComposer2Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # Behind what the projector reads. The publisher's training leaves it out of the checkpoints of trained towers.
    _keys_to_ignore_on_load_missing = [r"vit\.post_layernorm\..*"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projector):
            for separator in (module.global_separator, module.row_separator):
                if separator is not None:
                    init.zeros_(separator)


class XComposer2ForConditionalGeneration(XComposer2PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: XComposer2Config) -> None:
        super().__init__(config)
        text, vision = cast(LlamaConfig, config.text_config), cast(Any, config.vision_config)
        self.vit = CLIPVisionModel(vision)
        width = vision.hidden_size * (MERGE**2 if config.high_resolution else 1)
        self.vision_proj = Projector(width, text.hidden_size, separators=config.high_resolution)
        self.model = Decoder(text, config)
        self.output = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> Decoder:
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.output = value

    def get_image_features(
        self, pixel_values: torch.Tensor, tile_grids: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (pictures, 3, H, W); with high resolution (tiles, 3, H, W): of each picture the view of the
                whole, then its tiles row by row.
            tile_grids: (pictures, 2) rows and columns of tiles, with high resolution only.

        Returns:
            `last_hidden_state`: of the tower; `pooler_output`: (visual tokens, hidden size), picture by picture.
        """
        if (tile_grids is None) == self.config.high_resolution:
            raise ValueError("tile_grids belong to the pictures of a high-resolution model, and to no others")
        seen = self.vit(pixel_values.to(self.vit.dtype)).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=seen, pooler_output=self.vision_proj(seen[:, 1:], tile_grids)
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: (B, L); what stands at visual tokens is not looked at.
            pixel_values, tile_grids: see `get_image_features`; pictures in the order of the text, row by row.
            mm_token_type_ids: (B, L), 1 at visual tokens, else 0. The vocabulary has no token for them, so this alone
                says where pictures stand. None: nowhere.
            labels: (B, L) as transformers has them: -100 is not trained on, shifted inside.
            logits_to_keep: as transformers has it.

        Raises:
            ValueError: the number of visual tokens is not that of the pictures.
        """
        image_mask = None if mm_token_type_ids is None else mm_token_type_ids == 1
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.model.tok_embeddings(input_ids)
        if pixel_values is not None:
            features = cast(torch.Tensor, self.get_image_features(pixel_values, tile_grids).pooler_output)
            inputs_embeds = _splice(inputs_embeds, features, image_mask)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            image_mask=image_mask,
            **kwargs,
        )
        logits = self.output(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=cast(Any, self.config.text_config).vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """For beams: transformers would repeat tile by tile, where the pictures of a row must stay together."""
        pixels, grids = model_kwargs.pop("pixel_values", None), model_kwargs.pop("tile_grids", None)
        tokens_of_rows = [] if pixels is None else model_kwargs["mm_token_type_ids"].sum(dim=1).tolist()
        own: Any = super()  # transformers' hints ask for a class that is more than a model
        input_ids, model_kwargs = own._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixels is not None:
            order = self._picture_order(grids, tokens_of_rows, expand_size)
            tiles = [1] * len(pixels) if grids is None else [1 + rows * columns for rows, columns in grids.tolist()]
            parts = pixels.split(tiles)
            model_kwargs["pixel_values"] = torch.cat([parts[picture] for picture in order])
            model_kwargs["tile_grids"] = None if grids is None else grids[order]
        return input_ids, model_kwargs

    def _picture_order(self, grids: torch.Tensor | None, tokens_of_rows: Sequence[int], beams: int) -> list[int]:
        """Numbers of the pictures of all rows, those of a row `beams` times in turn."""
        vision = cast(Any, self.config.vision_config)
        side = vision.image_size // vision.patch_size
        order: list[int] = []
        picture = 0
        for tokens in tokens_of_rows:
            row: list[int] = []
            while tokens > 0:
                row.append(picture)
                tokens -= side**2 if grids is None else tokens_of(*map(int, grids[picture]), side=side // MERGE)
                picture += 1
            order += row * beams
        return order


def tokens_of(rows: int, columns: int, *, side: int) -> int:
    """Visual tokens of a picture in `rows` × `columns` tiles of `side` × `side` tokens: view, separators and tiles."""
    return (rows * columns + 1) * side**2 + 1 + (rows + 1) * side


def _splice(embeddings: torch.Tensor, features: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
    """embeddings (B, L, d) with the rows where `image_mask` (B, L) is True replaced by `features` (N, d), in order."""
    places = 0 if image_mask is None else int(image_mask.sum())
    if image_mask is None or places != len(features):
        raise ValueError(f"the pictures have {len(features)} visual tokens, but mm_token_type_ids marks {places}")
    return embeddings.masked_scatter(image_mask[..., None], features.to(embeddings.dtype))
