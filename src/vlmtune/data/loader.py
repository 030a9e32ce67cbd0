"""The plan as a map-style dataset of finished micro batches, for a DataLoader with `batch_size=None`.

Item i is a function of i alone, so that a resumed run asks for item i and reads nothing before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from vlmtune.data.augment import JpegNoise
from vlmtune.data.collate import collate
from vlmtune.data.plan.packing import Plan
from vlmtune.data.prepared.access import PreparedRows
from vlmtune.data.sample import IGNORED, Batch, Encoded
from vlmtune.errors import DataError, VlmtuneError
from vlmtune.models.family import OpenedFolder


@dataclass(frozen=True, slots=True)
class Failed:
    """An error on its way out of a worker process.

    torch rebuilds an exception of a worker from a string, which loses its parts and wraps a traceback around its
    message; so a worker hands the error over as an item, and `unwrap` raises it in the main process.
    """

    error: VlmtuneError


def unwrap(item: Batch | Failed) -> Batch:
    """The batch, or the error that took its place, raised as it was."""
    if isinstance(item, Failed):
        raise item.error
    return item


class MicroBatches(Dataset[Batch | Failed]):
    """Micro batch i of a plan, encoded, decoded and collated.

    Args:
        stand_in: give micro batches without pictures a smallest one for the tower (several ranks; see `nn.stand_in`).
        packed: one pack per micro batch, else one row of the batch per sample.
        augment: change the pictures of sources that ask for it; a function of row and step, so a resumed run equals an
            uninterrupted one.

    A row that turns out bad here (its file was damaged since it was measured) is never replaced: in the main process
    indexing raises DataError, in a worker process it returns `Failed`.
    """

    def __init__(
        self,
        rows: PreparedRows,
        opened: OpenedFolder,
        plan: Plan,
        *,
        stand_in: bool,
        packed: bool,
        augment: bool,
        seed: int,
    ) -> None:
        self.rows = rows
        self.opened = opened
        self.plan = plan
        self.seed = seed
        options = [source.options for source in rows.corpus.sources]
        self.augmented = [augment and option.data_augment for option in options]
        self.stand_in = stand_in
        self.packed = packed

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.micro_batches_per_step

    def __getitem__(self, i: int) -> Batch | Failed:
        try:
            return self._batch(i)
        except VlmtuneError as error:
            if get_worker_info() is None:
                raise
            return Failed(error)

    def _batch(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(f"micro batch {i} of {len(self)}")
        step = i // self.plan.micro_batches_per_step
        encoded = [self._augmented(self._encoded(row), row, step) for row in self.plan.rows(i)]
        if not encoded:
            encoded = [self._nothing()]
        rows = [encoded] if self.packed else [[sample] for sample in encoded]
        return collate(rows, self.opened, stand_in=self.stand_in)

    def _encoded(self, row: int) -> Encoded:
        encoded = self.rows.encoded(row)
        planned = int(self.plan.num_tokens[row])
        if encoded.num_tokens != planned:
            raise DataError(
                f"the row has {encoded.num_tokens:,} tokens now, and had {planned:,} when the run was planned",
                where=encoded.origin,
                remedy="Its file or a picture changed. Do not change the data during a run.",
            )
        return encoded

    def _augmented(self, encoded: Encoded, row: int, step: int) -> Encoded:
        if not self.augmented[self.rows.corpus.source_of(row)]:
            return encoded
        return replace(encoded, retouch=JpegNoise(self.seed, row, step))

    def _nothing(self) -> Encoded:
        """The smallest row, without anything to learn: it lets a rank without rows take part in the step."""
        token = self.opened.chat.stop_ids[0] if self.opened.chat.stop_ids else self.opened.tokenizer.eos_token_id
        ids = np.array([token or 0], np.int32)
        return Encoded(input_ids=ids, labels=np.full_like(ids, IGNORED), spans=(), media=(), origin="")
