"""Making a shard of prepared rows, or looking at one that is there: the work of one process on one stretch of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmtune.data.encode import lay_row, lay_rows, with_origin
from vlmtune.data.media.planned import decode, is_as_planned
from vlmtune.data.prepared.access import PreparedRows, Task, media_base
from vlmtune.data.prepared.measure import counts
from vlmtune.data.prepared.store import Shard, ShardWriter
from vlmtune.data.row_encoder import RowEncoder
from vlmtune.data.rows.adapters import unread_keys
from vlmtune.data.rows.corpus import Source
from vlmtune.data.sample import Laid, Sample
from vlmtune.errors import DataError

Look = Literal["no", "headers", "pixels"]
"""What is looked at: nothing in rows that are prepared already, the headers of their media, or all pixels, also of rows
that are prepared now."""

_CHUNK = 128  # rows that are tokenised together


@dataclass(frozen=True, slots=True)
class Outcome:
    """path: of the whole shard. made: it was made now."""

    path: Path
    made: bool


@dataclass(frozen=True, slots=True)
class ShardJob:
    """Makes a shard, or looks at one that is there; runs in a worker process."""

    encoder: RowEncoder
    look: Look

    def __call__(self, task: Task) -> Outcome:
        shard = None if task.found is None else Shard(task.found, media_base(self.encoder.corpus, task.source))
        made = shard is None or not self._is_current(task, shard)
        path = self._make(task, {}) if made or shard is None else shard.path
        if self.look == "pixels" and (undecodable := self._undecodable(task, path)):
            made_first, path, made = path, self._make(task, undecodable), True
            made_first.unlink()
        if shard is not None and shard.path != path:
            shard.path.unlink(missing_ok=True)
        return Outcome(path, made)

    def _make(self, task: Task, undecodable: Mapping[int, DataError]) -> Path:
        """undecodable: rows by their number in the source that are bad, whatever else may be said of them."""
        corpus = self.encoder.corpus
        opened = self.encoder.opened_for(task.source)
        source, first = corpus.sources[task.source], corpus.split(task.start)[1]
        writer = ShardWriter(media_base(corpus, task.source), wide=len(opened.tokenizer) > 1 << 16)
        for start in range(first, first + task.stop - task.start, _CHUNK):
            rows = range(start, min(start + _CHUNK, first + task.stop - task.start))
            read = [undecodable.get(i) or self._sample(source, i, writer) for i in rows]
            laid = iter(lay_rows([sample for sample in read if isinstance(sample, Sample)], opened))
            for sample in read:
                row = next(laid) if isinstance(sample, Sample) else sample
                self._add(writer, sample, row)
        return writer.write(task.folder, task.number)

    @staticmethod
    def _sample(source: Source, i: int, writer: ShardWriter) -> Sample | DataError:
        origin = source.origin(i)
        try:
            row = source.rows.read(i, origin)
            writer.unknown_keys.update(unread_keys(row, source.options))
            return source.adapt(row, origin)
        except DataError as error:
            return error

    @staticmethod
    def _add(writer: ShardWriter, sample: Sample | DataError, laid: Laid | DataError) -> None:
        try:
            if isinstance(laid, DataError):
                raise laid
            assert isinstance(sample, Sample)
            writer.add(laid, counts(sample, laid))
        except DataError as error:
            writer.add_bad(error.reason)

    def _is_current(self, task: Task, shard: Shard) -> bool:
        """Whether making the shard again would give the same: its bad rows are bad for the same reason (a missing file
        may have come), and its media, where they are looked at, have the size that was planned with."""
        for local, reason in shard.bad:
            if self._reason(task.start + local) != reason:
                return False
        if self.look == "no":
            return True
        bad = {local for local, _ in shard.bad}
        return all(self._same_media(task.start + i, shard, i) for i in range(task.stop - task.start) if i not in bad)

    def _reason(self, i: int) -> str | None:
        """What is wrong with row `i` now."""
        try:
            sample = self.encoder.corpus.sample(i)
            opened = self.encoder.opened(i)
            laid = lay_row(sample, opened)
            counts(sample, laid)
            # Nothing is wrong as far as headers tell; the row may be bad because `check --decode` saw its pixels.
            decode(laid.media, opened.media)
        except DataError as error:
            return with_origin(error, "").reason
        return None

    def _same_media(self, i: int, shard: Shard, local: int) -> bool:
        opened = self.encoder.opened(i)
        try:
            planned = shard.media(local) or ()  # what lies in the row itself is as the row's own digest says
            return is_as_planned(planned, opened.media)
        except DataError:
            return False

    def _undecodable(self, task: Task, path: Path) -> dict[int, DataError]:
        """Rows that are not known to be bad and have media that cannot be decoded; by their number in the source."""
        first = self.encoder.corpus.split(task.start)[1] - task.start
        rows = PreparedRows(self.encoder, [task], [path])
        bad = {task.start + local for local, _ in Shard(path, "").bad}
        found = {}
        for i in range(task.start, task.stop):
            try:
                if i not in bad:
                    decode(rows.laid(i).media, self.encoder.opened(i).media)
            except DataError as error:
                found[first + i] = with_origin(error, "")
        return found
