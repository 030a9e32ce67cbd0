"""An encoder on disk: what `vlmtune embed fit` writes, or the files that CalliReader publishes.

Ours is ``encoder.safetensors`` and ``config.json``. In the former lie the resampler's tensors under ``resampler.``,
``mu_sigma`` float32 (vocabulary, 2), and ``normed_embedding.weight`` (vocabulary, d) only where the model does not give
it. Of CalliReader's ``params`` three files are read, pickles without running anything in them: ``callialign``,
``gauss_norm_mu_sigma`` and ``gauss_norm``, each .pth, .pt or .safetensors; config.json may be missing there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vlmtune.config.hub import HUB_ID
from vlmtune.embed.codebook import PADDING_ID
from vlmtune.embed.regions import SquareRule
from vlmtune.embed.resampler import PerceiverResampler, ResamplerShape, load_resampler
from vlmtune.errors import UsageError, WeightsError
from vlmtune.files import sha256, write_atomic
from vlmtune.weights import pickles
from vlmtune.weights.fingerprint import fingerprint
from vlmtune.weights.strict import unreadable

WEIGHTS, CONFIG = "encoder.safetensors", "config.json"
KIND, VERSION = "region_encoder", 1
_PUBLISHED = {"resampler": "callialign", "statistics": "gauss_norm_mu_sigma", "normed": "gauss_norm"}
_WIDEST = 8192  # pixels of a region's square; no tower sees as many, and each region would take 200 MB
_SUFFIXES = (".safetensors", ".pth", ".pt")
_RESAMPLER, _MU_SIGMA, _NORMED = "resampler.", "mu_sigma", "normed_embedding.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """config.json of an encoder.

    model: path of the model that it was fitted for, as given then; relative ones start from the encoder's folder.
    model_sha256: that model's `weights.fingerprint`.
    regions: how a region is shown to the tower; None leaves it to the tower's size.
    heads: of the resampler.
    padding_id: rows that are nearest to this token stand for nothing.
    fit: what the fitting reports about itself (numbers of regions, accuracies).
    """

    model: str | None = None
    model_sha256: str | None = None
    regions: SquareRule | None = None
    heads: int | None = None
    padding_id: int = PADDING_ID
    fit: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFolder:
    """
    resampler: float32, on the CPU.
    mu_sigma: (vocabulary, 2); None where they are to be computed from the model's embedding.
    normed: (vocabulary, d), the normalised embedding; None where it is to be computed from the model's embedding.
    sha256: changes with every file that was read.
    """

    path: Path
    config: EncoderConfig
    resampler: PerceiverResampler
    mu_sigma: torch.Tensor | None
    normed: torch.Tensor | None
    sha256: str

    def model_path(self, given: str | Path | None = None) -> str | Path:
        """The model to be used: folder or hub id; the one that the encoder was fitted for if none is given.

        Raises:
            UsageError: the encoder names none.
            WeightsError: it is not where the encoder says.
        """
        if given is not None:
            return given
        if self.config.model is None:
            raise UsageError(
                "the encoder does not say which model it was fitted for", where=str(self.path),
                remedy="Name it: --model DIR (in Python: model=DIR). For CalliReader's, that is InternVL2-8B's folder.",
            )  # fmt: skip
        folder = self.path / Path(self.config.model).expanduser()
        if folder.is_dir():
            return folder
        if HUB_ID.fullmatch(self.config.model):
            return self.config.model
        raise WeightsError(
            f"the model that the encoder was fitted for is not at {self.config.model}", where=str(self.path),
            remedy="If it has moved, point to it: --model DIR (in Python: model=DIR).",
        )  # fmt: skip

    def check_model(self, folder: Path) -> None:
        """
        Raises:
            WeightsError: the encoder was fitted for another model.
        """
        if self.config.model_sha256 in (None, fingerprint(folder)):
            return
        raise WeightsError(
            f"the encoder was fitted for another model than {folder}: config.json, or the names and shapes of the "
            "weights, differ",
            where=str(self.path),
            expected=f"{self.config.model} as it was then",
            remedy="Point to an unchanged copy of it with --model DIR, or fit the encoder for this model.",
        )


def read_encoder(folder: Path) -> EncoderFolder:
    """
    Raises:
        WeightsError: no encoder in the folder; files that cannot be read, or do not belong together.
    """
    if not folder.is_dir():
        raise WeightsError("no such folder", where=str(folder), expected="the folder of a region encoder")
    config, shape = _read_config(folder)
    own = folder / WEIGHTS
    if own.is_file():
        files, (state, mu_sigma, normed) = [own], _own(own)
    else:
        files, (state, mu_sigma, normed) = _published(folder)
    resampler = load_resampler(state, heads=config.heads, where=str(files[0]))
    _check_stated(shape, resampler.shape, folder / CONFIG)
    digests = [sha256(file) for file in [*files, folder / CONFIG] if file.is_file()]
    return EncoderFolder(
        path=folder, config=config, resampler=resampler, mu_sigma=mu_sigma, normed=normed, sha256="".join(digests)
    )


def write_encoder(folder: Path, config: EncoderConfig, resampler: PerceiverResampler, mu_sigma: torch.Tensor) -> None:
    """Writes the encoder's two files, config.json last; each is whole or not there.

    Args:
        mu_sigma: (vocabulary, 2), mean and deviation of each row of the model's embedding.
    """
    tensors = {f"{_RESAMPLER}{name}": tensor for name, tensor in resampler.state_dict().items()}
    tensors[_MU_SIGMA] = mu_sigma.float()
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(folder / WEIGHTS, save(ready, metadata={"format": "pt"}))
    record = {
        "kind": KIND,
        "version": VERSION,
        "resampler": asdict(resampler.shape),
        "regions": None if config.regions is None else asdict(config.regions),
        "padding_id": config.padding_id,
        "model": config.model,
        "model_sha256": config.model_sha256,
        "fit": dict(config.fit),
    }
    write_atomic(folder / CONFIG, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _read_config(folder: Path) -> tuple[EncoderConfig, Mapping[str, Any]]:
    """The configuration, and the resampler's hyper-parameters as far as they are stated."""
    file = folder / CONFIG
    if not file.is_file():
        return EncoderConfig(), {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("kind", KIND) != KIND or record.get("version", VERSION) != VERSION:
            raise WeightsError(
                f"it is a {record.get('kind')!r} of version {record.get('version')!r}", where=str(file),
                expected=f"a {KIND} of version {VERSION}",
                remedy="Give the folder that `vlmtune embed fit` wrote, and open it with the version that wrote it.",
            )  # fmt: skip
        if "kind" not in record and "model_type" in record:
            raise WeightsError("this is a model", where=str(folder), expected="the folder of a region encoder")
        shape = record.get("resampler") or {}
        regions = record.get("regions")
        config = EncoderConfig(
            model=_optional(record.get("model"), str),
            model_sha256=_optional(record.get("model_sha256"), str),
            regions=None if regions is None else SquareRule(**{key: int(value) for key, value in regions.items()}),
            heads=_optional(shape.get("heads"), int),
            padding_id=int(record.get("padding_id", PADDING_ID)),
            fit=record.get("fit") or {},
        )
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"cannot be read ({error})", where=str(file), expected="a region encoder's JSON") from error
    if config.regions and not 1 <= config.regions.least <= config.regions.most <= config.regions.square <= _WIDEST:
        raise WeightsError(
            f"regions are {config.regions}", where=str(file), expected=f"1 ≤ least ≤ most ≤ square ≤ {_WIDEST}"
        )
    return config, shape


def _optional(value: Any, kind: type) -> Any:
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _check_stated(stated: Mapping[str, Any], found: ResamplerShape, file: Path) -> None:
    for name, value in asdict(found).items():
        if stated.get(name, value) != value:
            raise WeightsError(
                f"resampler.{name} is {stated[name]!r}, and the weights have {value}", where=str(file),
                remedy="Correct it, or remove the line: all but `heads` is told by the weights.",
            )  # fmt: skip


Parts = tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor | None]
"""The resampler's tensors, mu and sigma, the normalised embedding."""


def _own(file: Path) -> Parts:
    held = _tensors(file)
    state = {name.removeprefix(_RESAMPLER): held[name] for name in held if name.startswith(_RESAMPLER)}
    more = {name: tensor for name, tensor in held.items() if not name.startswith(_RESAMPLER)}
    mu_sigma, normed = more.pop(_MU_SIGMA, None), more.pop(_NORMED, None)
    if more:
        raise WeightsError(f"{min(more)} is no tensor of a region encoder", where=str(file))
    return state, _pairs(mu_sigma, file), normed


def _published(folder: Path) -> tuple[list[Path], Parts]:
    found = {
        part: next((file for suffix in _SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()), None)
        for part, stem in _PUBLISHED.items()
    }
    if found["resampler"] is None:
        raise WeightsError(
            f"there is neither {WEIGHTS} nor callialign.pth in it", where=str(folder),
            expected="the folder of a region encoder, as `vlmtune embed fit` writes it or as CalliReader publishes it",
        )  # fmt: skip
    state = _tensors(found["resampler"])
    statistics, normed = (None if file is None else _only(file) for file in (found["statistics"], found["normed"]))
    files = [file for file in found.values() if file is not None]
    return files, (state, _pairs(statistics, found["statistics"]), normed)


def _pairs(mu_sigma: torch.Tensor | None, file: Path | None) -> torch.Tensor | None:
    if mu_sigma is not None and (mu_sigma.ndim != 2 or mu_sigma.shape[1] != 2 or not mu_sigma.is_floating_point()):
        raise WeightsError(
            f"mean and deviation have the shape {tuple(mu_sigma.shape)}", where=str(file), expected="(tokens, 2)"
        )
    return mu_sigma


def _only(file: Path) -> torch.Tensor:
    """The one tensor of a file."""
    held = _tensors(file)
    if len(held) != 1:
        raise WeightsError(f"it holds {len(held)} tensors", where=str(file), expected="one, named `weight`")
    return next(iter(held.values()))


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name: of a state dict, under `model_state_dict` in a checkpoint, less DDP's `module.`."""
    if file.suffix == ".safetensors":
        try:
            held = load_file(file)
        except (SafetensorError, OSError) as error:
            raise unreadable(error, file) from error
    else:
        loaded = pickles.load(file)
        held = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else {"weight": loaded}
    if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise WeightsError("the file holds something else than weights", where=str(file), expected="tensors by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in held.items()}
