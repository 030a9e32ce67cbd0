"""Rows of a corpus as ids, each with the picture settings of its source."""

from __future__ import annotations

from vlmtune.data.encode import encode
from vlmtune.data.rows.corpus import Corpus
from vlmtune.data.sample import Encoded, Sample
from vlmtune.models.family import OpenedFolder


class RowEncoder:
    """The model folder as each source of a corpus wants it, and `encode` with it; picklable.

    Raises:
        ConfigError: a source's `image` has an option without effect on the model.
    """

    def __init__(self, corpus: Corpus, opened: OpenedFolder) -> None:
        self.corpus = corpus
        self._opened = tuple(opened.with_image(source.options.image) for source in corpus.sources)

    def opened(self, i: int) -> OpenedFolder:
        """The model folder with the settings of row `i`."""
        return self._opened[self.corpus.source_of(i)]

    def opened_for(self, source: int) -> OpenedFolder:
        """The model folder with the settings of a source."""
        return self._opened[source]

    def row(self, i: int) -> tuple[Sample, Encoded]:
        """Row `i` as it says itself, and as ids.

        Raises:
            DataError: whatever is wrong with the row, with its origin.
        """
        sample = self.corpus.sample(i)
        return sample, encode(sample, self.opened(i))
