"""Text while it is made: a generation in a thread, read as an iterator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for half a character


class Pieces(BaseStreamer):
    """Turns the ids that generate hands over, one step at a time, into pieces of text.

    A piece is held back while it ends inside a character: byte-level tokens split Chinese characters and emoji.

    Args:
        text: all ids of the answer so far -> its text.
        send: takes each piece.
    """

    def __init__(self, text: Callable[[Sequence[int]], str], send: Callable[[str], None]) -> None:
        self._text, self._send = text, send
        self._ids: list[int] = []
        self._sent = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # the first call brings the prompt
            self._prompt_seen = True
            return
        self._ids += value.reshape(-1).tolist()
        text = self._text(self._ids)
        if not text.endswith(REPLACEMENT):
            self._emit(text)

    def end(self) -> None:
        self._emit(self._text(self._ids))

    def _emit(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._send(text[len(self._sent) :])
            self._sent = text


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_pieces(run: Callable[..., None], text: Callable[[Sequence[int]], str]) -> Generator[str, None, None]:
    """Call ``run(streamer=…, stopping_criteria=…)`` in a thread and yield the pieces that it sends.

    An exception inside `run` is raised to the reader. When the reader stops early (Ctrl-C, `close`), the generation is
    asked to stop and waited for.
    """
    pieces: queue.Queue[str | None] = queue.Queue()
    stop = threading.Event()
    streamer = Pieces(text, pieces.put)
    with ThreadPoolExecutor(1, thread_name_prefix="vlmtune-generate") as pool:
        done = pool.submit(run, streamer=streamer, stopping_criteria=StoppingCriteriaList([_Stop(stop)]))
        done.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            stop.set()
        done.result()
