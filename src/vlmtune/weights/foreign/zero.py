"""The folder of a DeepSpeed checkpoint (ZeRO-1, -2, -3, or none) as tensors by name, in float32 where it has them.

The layout, as DeepSpeed writes it:

- `mp_rank_00_model_states.pt` (ZeRO-3: `zero_pp_rank_R_mp_rank_00_model_states.pt` of every rank R) holds `module` (the
  16-bit weights; under ZeRO-3 empty), `buffer_names`, `param_shapes` (one ordered dictionary of shapes per parameter
  group: the trained parameters in the order of the flat vectors), `frozen_param_shapes` and `frozen_param_fragments`,
  and `shared_params` (a name without own numbers -> the name that has them).
- `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` of every rank holds the float32 weights of its part.
  ZeRO-1 and -2 (`single_partition_of_fp32_groups`): each group is one vector of all its parameters end to end, with
  some padding at its end (after each parameter too, where there are `param_alignment_paddings`), cut in equal parts.
  ZeRO-3 (`fp32_flat_groups`): each parameter is cut in parts of ceil(numbers / ranks), and a rank lays its parts of all
  parameters end to end; where they are broken into several vectors has no meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmtune.errors import WeightsError
from vlmtune.weights import pickles
from vlmtune.weights.foreign.tensors import Tensors, config_text
from vlmtune.weights.shards import describe

_FLAT_2, _FLAT_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"
_ALIGNED_TO = 2  # numbers per rank: DeepSpeed pads each flat group of ZeRO-1 and -2 to a multiple of this × ranks
_CLOSE, _TINY = 2.0**-6, 1e-6  # float32 weights against their 16-bit copy: bfloat16 rounds by up to 2⁻⁸ relative
_RANK_FILE = re.compile(r"((?:\w+_)?zero_pp_rank_)(\d+)(_mp_rank_00_(?:model|optim)_states\.pt)")
_Cut = tuple[Sequence[torch.Tensor], int, int]
"""Vectors that are thought end to end, the first number that is meant, and how many."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor that is put together when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


class _Unlike(Exception):
    """The float32 weights of a parameter are not its 16-bit copy: the parts were put together in a wrong order."""


def read_zero(folder: Path) -> tuple[Tensors, str]:
    """All tensors of the checkpoint, and the training configuration that it holds as text ("" if none).

    Nothing is put together before a tensor is asked for; the files stay mapped.

    Raises:
        WeightsError: files of other ranks missing (by name), model parallelism, or contents that do not fit together.
    """
    _refuse_unknown(folder)
    models = _model_states(folder)
    optims = _rank_files(folder, "optim")
    first = models[0]
    if not optims and first.get("param_shapes"):
        raise WeightsError(
            "the files of the optimizer (*_optim_states.pt), which hold the weights, are missing",
            where=str(folder), remedy="Copy the whole folder.",
        )  # fmt: skip
    try:
        parts = _assemble(folder, models, optims) if optims else _all_given(first["module"])
        return _tensors(folder, parts, first), config_text(first)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        # Something else stands where a dictionary, a list, a shape or a tensor belongs; which, the name says best.
        raise WeightsError(
            f"the contents are not laid out as DeepSpeed does it ({type(error).__name__}: {error})", where=str(folder),
            remedy="Write the checkpoint with ZeRO-1, -2 or -3, or save its state_dict alone with torch.save.",
        ) from None  # fmt: skip


def _tensors(folder: Path, parts: Mapping[str, _Part], first: Mapping[str, Any]) -> Tensors:
    named = dict(parts)
    for alias, name in (first.get("shared_params") or {}).items():
        if name in parts:
            named[alias] = parts[name]

    def read(name: str) -> torch.Tensor:
        try:
            return named[name].read()
        except _Unlike:
            raise WeightsError(
                f"the float32 parts of {name} are not its 16-bit copy in the same checkpoint", where=str(folder),
                remedy="The files may be of two saves; copy the folder again.",
            ) from None  # fmt: skip

    infos = {name: describe(name, part.dtype, part.shape, folder) for name, part in named.items()}
    return Tensors(folder, infos, read)


def _refuse_unknown(folder: Path) -> None:
    names = sorted(file.name for file in folder.glob("*.pt"))
    for name in names:
        if "mp_rank_" in name and "mp_rank_00" not in name:
            raise WeightsError(f"{name} belongs to a model cut over several devices", where=str(folder))
        if "expert" in name or name.startswith("layer_"):
            raise WeightsError(f"{name} belongs to experts or pipeline stages", where=str(folder))


def _model_states(folder: Path) -> list[dict[str, Any]]:
    """The model files: one, or under ZeRO-3 one per rank."""
    whole = folder / "mp_rank_00_model_states.pt"
    files = [whole] if whole.is_file() else list(_rank_files(folder, "model").values())
    if not files:
        raise WeightsError("no mp_rank_00_model_states.pt, and no such file of a rank", where=str(folder))
    states = []
    for file in files:
        state = pickles.load(file)
        if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
            raise WeightsError("no model state as DeepSpeed writes it", where=str(file))
        states.append(state)
    return states


def _rank_files(folder: Path, kind: str) -> dict[int, Path]:
    """Rank -> file, by rank; every rank from 0 to the largest must be there."""
    found: dict[int, Path] = {}
    for file in folder.glob(f"*_{kind}_states.pt"):
        if match := _RANK_FILE.fullmatch(file.name):
            found[int(match[2])] = file
    if found:
        _require_ranks(folder, found, max(found) + 1)
    return dict(sorted(found.items()))


def _require_ranks(folder: Path, files: Mapping[int, Path], world: int) -> None:
    pattern = _RANK_FILE.fullmatch(next(iter(files.values())).name)
    assert pattern is not None
    missing = [f"{pattern[1]}{rank}{pattern[3]}" for rank in range(world) if rank not in files]
    if missing:
        raise WeightsError(
            f"{len(missing)} of the {world} files of the ranks are missing: {', '.join(missing[:3])}",
            where=str(folder), remedy="Copy the whole folder, from all nodes.",
        )  # fmt: skip
    if len(files) > world:
        raise WeightsError(
            f"{len(files)} files of ranks, but the run had {world}", where=str(folder),
            remedy="Files of two runs lie in this folder; keep those of one.",
        )  # fmt: skip


def _assemble(folder: Path, models: Sequence[Any], optims: Mapping[int, Path]) -> dict[str, _Part]:
    states = [_optimizer_state(file) for file in optims.values()]
    first = states[0]
    count = first.get("partition_count")  # one number per parameter group where experts have ranks of their own
    world = max(count, default=0) if isinstance(count, (list, tuple)) else count
    if not isinstance(world, int) or world < 1:
        raise WeightsError(f"a ZeRO checkpoint of {world!r} ranks", where=str(folder), expected="a positive number")
    _require_ranks(folder, optims, world)
    if _FLAT_3 not in first:
        return _stage_2(folder, models[0], states)
    if len(models) != world:
        raise WeightsError(f"model files of {len(models)} ranks", where=str(folder), expected=f"of {world}")
    return _stage_3(folder, models, states)


def _optimizer_state(file: Path) -> dict[str, Any]:
    held = pickles.load(file)
    state = held.get("optimizer_state_dict") if isinstance(held, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state:
        raise WeightsError("no state of a ZeRO optimizer", where=str(file))
    return state


def _flat(folder: Path, state: Mapping[str, Any], key: str) -> list[torch.Tensor]:
    groups = state.get(key)
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, torch.Tensor) for group in groups):
        raise WeightsError(f"no {key} in the state of a rank", where=str(folder), expected="the float32 weights")
    return list(groups)


def _stage_2(folder: Path, model: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> dict[str, _Part]:
    """ZeRO-1 and -2: whole groups end to end, cut in equal parts."""
    by_rank = [_flat(folder, state, _FLAT_2) for state in states]
    shapes = model["param_shapes"]
    if any(len(groups) != len(shapes) for groups in by_rank):
        raise WeightsError(f"not every rank has the {len(shapes)} parameter groups", where=str(folder))
    parts = _buffers(model) | _all_given(model.get("frozen_param_fragments") or {})
    # Without gradient partitioning (ZeRO-1) frozen parameters lie in `module` only.
    trained = {name for group in shapes for name in group}
    parts |= _all_given({name: tensor for name, tensor in model["module"].items() if name not in trained | set(parts)})
    paddings = states[0].get("param_alignment_paddings")
    for i, group in enumerate(shapes):
        pieces = [groups[i] for groups in by_rank]
        offset = 0
        for j, (name, shape) in enumerate(group.items()):
            size = math.prod(shape)
            parts[name] = _joined([(pieces, offset, size)], shape, model["module"].get(name))
            offset += size + (paddings[i][j] if paddings else 0)
        held = sum(piece.numel() for piece in pieces)
        if not 0 <= held - offset < _ALIGNED_TO * len(states):
            raise _uneven(folder, held, offset)
    return parts


def _stage_3(folder: Path, models: Sequence[Any], states: Sequence[Mapping[str, Any]]) -> dict[str, _Part]:
    """ZeRO-3: every parameter cut in equal parts, the last of them padded."""
    world = len(states)
    by_rank = [_flat(folder, state, _FLAT_3) for state in states]
    parts = _buffers(models[0])
    offset = 0
    for group in models[0]["param_shapes"]:
        for name, shape in group.items():
            share = math.ceil(math.prod(shape) / world)
            parts[name] = _joined([(pieces, offset, share) for pieces in by_rank], shape)
            offset += share
    for pieces in by_rank:
        held = sum(piece.numel() for piece in pieces)
        if held != offset:
            raise _uneven(folder, held, offset)
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name] for model in models]
        parts[name] = _joined([([piece], 0, piece.numel()) for piece in fragments], shape)
    return parts


def _uneven(folder: Path, held: int, named: int) -> WeightsError:
    return WeightsError(
        f"the parts of the ranks hold {held} numbers where the parameters ask for {named}",
        where=str(folder), remedy="Files of two checkpoints may be mixed; copy the folder again.",
    )  # fmt: skip


def _buffers(model: Mapping[str, Any]) -> dict[str, _Part]:
    names = set(model.get("buffer_names") or ())
    return _all_given({name: tensor for name, tensor in model["module"].items() if name in names})


def _all_given(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Part]:
    return {name: _Part(tuple(tensor.shape), tensor.dtype, tensor.detach) for name, tensor in tensors.items()}


def _joined(cuts: Sequence[_Cut], shape: Sequence[int], copy: torch.Tensor | None = None) -> _Part:
    """The numbers of all cuts one after the other, in `shape`; what is left over is padding.

    copy: the same parameter in 16 bits, where the checkpoint holds one, to compare with.
    """
    size = tuple(shape)

    def read() -> torch.Tensor:
        found = torch.cat([piece for cut in cuts for piece in _pieces(*cut)])[: math.prod(size)].reshape(size)
        if copy is not None and not _alike(found, copy):
            raise _Unlike
        return found

    return _Part(size, cuts[0][0][0].dtype, read)


def _alike(weights: torch.Tensor, copy: torch.Tensor) -> bool:
    if torch.equal(weights.to(copy.dtype), copy):  # nearly always, and much faster
        return True
    return torch.allclose(weights, copy.float(), rtol=_CLOSE, atol=_TINY, equal_nan=True)


def _pieces(vectors: Sequence[torch.Tensor], start: int, length: int) -> Iterator[torch.Tensor]:
    """The numbers from `start` of vectors that are thought end to end, as views."""
    for vector in vectors:
        size = vector.numel()
        low, high = max(0, start), min(size, start + length)
        if low < high:
            yield vector[low:high]
        start -= size
