"""A model loaded once, ready to answer: the same encode as training, greedy by default."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vlmtune.data.collate import prompt_batch
from vlmtune.data.encode import encode_prompt
from vlmtune.data.sample import IGNORED, Encoded, Sample
from vlmtune.errors import UsageError, WeightsError
from vlmtune.infer.locate import Located, locate
from vlmtune.infer.streaming import stream_pieces
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import load_model, open_folder
from vlmtune.nn.side_inputs import hand_over
from vlmtune.weights.strict import listed

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

DtypeName = Literal["float32", "bfloat16", "float16"]


class Session:
    """A loaded model with everything that a prompt needs.

    Attributes:
        model: in eval mode on `device`; with an adapter the PEFT model, not merged.
        opened: the model folder's tokenizer, chat format and picture settings.
        located: where the weights came from.
    """

    def __init__(self, model: PreTrainedModel, opened: OpenedFolder, located: Located) -> None:
        self.model = model
        self.opened = opened
        self.located = located

    @property
    def _model(self) -> Any:
        """transformers types its modules as Tensor | Module; this is the same object without the detour."""
        return self.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the base weights (an adapter may be kept wider)."""
        weight: torch.Tensor = self._model.get_input_embeddings().weight
        return weight.dtype

    def encode(self, sample: Sample) -> Encoded:
        """A sample that ends with a user turn as ids, up to where the answer begins.

        Raises:
            DataError: a picture that cannot be opened; `where` is the sample's origin.
        """
        return encode_prompt(sample, self.opened)

    def generate(self, samples: Sequence[Sample], max_new_tokens: int = 64, *, batch_size: int = 8) -> list[str]:
        """Answers to samples that end with a user turn, without special tokens, in the order of the samples.

        Raises:
            DataError: a sample that cannot be encoded.
        """
        encoded = [self.encode(sample) for sample in samples]
        answers = [""] * len(encoded)
        # Prompts of like length share a batch: padding is work for nothing.
        order = sorted(range(len(encoded)), key=lambda i: encoded[i].num_tokens)
        for rows in self._batches(order, encoded, batch_size, max_new_tokens):
            inputs = self.inputs([encoded[i] for i in rows])
            with torch.inference_mode():
                ids = self._model.generate(**inputs, generation_config=self._settings(max_new_tokens))
            new = ids[:, inputs["input_ids"].shape[1] :]
            for i, row in zip(rows, new.tolist(), strict=True):
                answers[i] = self._text(row)
        return answers

    def _batches(
        self, order: Sequence[int], encoded: Sequence[Encoded], size: int, max_new_tokens: int
    ) -> Iterator[Sequence[int]]:
        """`order` cut into batches; rows that would change their neighbours (see `shared_length`) go alone."""
        limit = self.opened.shared_length
        alone = [i for i in order if limit is not None and encoded[i].num_tokens + max_new_tokens > limit]
        together = [i for i in order if i not in set(alone)]
        yield from (together[start : start + size] for start in range(0, len(together), size))
        yield from ([i] for i in alone)

    def stream(self, sample: Sample, max_new_tokens: int = 256) -> Generator[str, None, None]:
        """The answer piece by piece while it is made. Closing the iterator stops the generation.

        Raises:
            DataError: before the first piece, when the sample cannot be encoded. Errors of the generation itself come
                out of the iterator as they are.
        """
        inputs = self.inputs([self.encode(sample)])
        settings = self._settings(max_new_tokens)

        def run(**more: Any) -> None:
            with torch.inference_mode():
                self._model.generate(**inputs, generation_config=settings, **more)

        return stream_pieces(run, self._text)

    def last_answer(self, row: Encoded) -> str:
        """The last answer of an encoded training row, as `generate` would give it: boxes as the model writes them."""
        trained = np.flatnonzero(row.labels != IGNORED)
        gaps = np.flatnonzero(np.diff(trained) > 1)
        own = trained[gaps[-1] + 1 :] if len(gaps) else trained
        return self._text(row.input_ids[own].tolist())

    def logits(self, prompts: Sequence[Sample | Encoded]) -> list[torch.Tensor]:
        """Next-token logits of each prompt: float32 (T, vocabulary) on the CPU, one at a time."""
        found = []
        for prompt in prompts:
            inputs = self.inputs([prompt if isinstance(prompt, Encoded) else self.encode(prompt)])
            with torch.inference_mode():
                found.append(self.model(**inputs, use_cache=False).logits[0].float().cpu())
        return found

    def inputs(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """Left-padded arguments of the model on its device, pixels in its dtype; side inputs are handed over."""
        batch = prompt_batch(encoded, self.opened)
        return hand_over(self.model, to_device(batch, self.device, self.dtype))

    def _settings(self, max_new_tokens: int) -> GenerationConfig:
        from transformers import GenerationConfig

        stop = list(self.opened.chat.stop_ids)
        pad = self.opened.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=stop,
            pad_token_id=stop[0] if pad is None else pad,
        )

    def _text(self, ids: Sequence[int]) -> str:
        stop = set(self.opened.chat.stop_ids)
        end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
        text = self.opened.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        assert isinstance(text, str)
        # The lead (a space, in some templates) is trained as part of the answer but is the template's, not the text's.
        return text.removeprefix(self.opened.chat.answer_lead)


def to_device(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors moved to `device`, the floating ones (pixels) cast to `dtype`; other values as they are."""
    moved = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            moved[key] = value.to(device, dtype if value.is_floating_point() else None)
    return moved


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    checkpoint: str = "best",
    device: str | None = None,
    dtype: DtypeName | None = None,
) -> Session:
    """Load a model to ask it questions.

    Args:
        path: a model folder, an adapter folder, or a run folder.
        base: the model folder under an adapter, when it is not where the adapter says.
        checkpoint: of a run folder: ``best``, ``last``, or a step.
        device: ``cpu``, ``cuda``, ``cuda:1``; a GPU when there is one, if left out.
        dtype: the checkpoint's own if left out.

    Raises:
        UsageError: no such folder, checkpoint or device.
        WeightsError: weights that are missing or do not fit.
    """
    located = locate(path, base=base, checkpoint=checkpoint)
    return load_located(located, device=device, dtype=dtype)


def load_located(
    located: Located, *, device: str | None = None, dtype: DtypeName | None = None, opened: OpenedFolder | None = None
) -> Session:
    """`load` for weights that were already found.

    Args:
        opened: their model folder as `open_folder` gives it, where that was done before.
    """
    place = choose_device(device)
    opened = opened or open_folder(str(located.model_folder), located.media)
    model = load_model(opened, dtype=None if dtype is None else torch_dtype(dtype))
    if located.base is not None:
        model = attach(model, located.path)
    torch.nn.Module.to(model, place)
    return Session(model.eval(), opened, located)


@torch.no_grad()  # PEFT computes DoRA's norms while it lays the adapter; their graphs would hold copies of the weights
def attach(model: PreTrainedModel, adapter: Path) -> Any:
    """The model under its adapter, for inference.

    Raises:
        WeightsError: the adapter does not fit the model, or its file is broken.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    remedy = "Check that the base is the model that the adapter was trained on (--base DIR)."
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        wrapped: Any = PeftModel(model, config)
        # Not `from_pretrained`, which only warns of keys that do not fit.
        result = wrapped.load_adapter(str(adapter), "default")
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"the adapter does not load on its base ({first})", where=str(adapter), remedy=remedy
        ) from error
    if result.missing_keys or result.unexpected_keys:
        raise WeightsError(
            f"the adapter does not fit its base: {len(result.unexpected_keys)} of its tensors have no place there "
            f"({listed(result.unexpected_keys)}), and {len(result.missing_keys)} places stay empty",
            where=str(adapter),
            remedy=remedy,
        )
    return wrapped


def choose_device(name: str | None) -> torch.device:
    """The device by name, or the first GPU, or the CPU.

    Raises:
        UsageError: a name that torch does not know, or a GPU that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError("no such device", where=f"--device {name}", expected="cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"this machine has {torch.cuda.device_count()} CUDA devices", where=f"--device {name}", remedy="Use cpu."
        )
    return device


def torch_dtype(name: DtypeName) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
