"""Slices of files, one after the other, as one stream: a member of a tar, or a tar that was cut into parts."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

Piece = tuple[str, int, int]
"""Path, first byte, number of bytes."""


class Pieces(io.RawIOBase):
    """A read-only stream over `pieces`; files are opened when they are read, one at a time.

    A file that is shorter than its piece ends the stream there. Wrap it in `io.BufferedReader` for small reads.

    Raises:
        OSError: at once, a file that is not there; on reading, one that cannot be opened or read.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._pieces = [piece for piece in pieces if piece[2] > 0]
        self._starts = [0]
        for _, _, length in self._pieces:
            self._starts.append(self._starts[-1] + length)
        for path, _, _ in self._pieces:
            os.stat(path)  # a missing part must not look like a damaged picture
        self._position = 0
        self._which = 0
        self._opened: tuple[str, io.FileIO] | None = None

    @property
    def size(self) -> int:
        """Bytes of all pieces together."""
        return self._starts[-1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"a seek to byte {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override] # typeshed wants every buffer
        """Fill `buffer` from one piece; fewer bytes at its end, none at the end of all."""
        if self._position >= self.size:
            return 0
        self._find_piece()
        path, offset, _ = self._pieces[self._which]
        inside = self._position - self._starts[self._which]
        length = min(len(buffer), self._starts[self._which + 1] - self._position)
        stream = self._file(path)
        stream.seek(offset + inside)
        count = stream.readinto(memoryview(buffer)[:length])
        self._position += count
        return count

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None
        super().close()

    def _find_piece(self) -> None:
        """Pieces are read in order, so the next one is found by stepping."""
        if self._position < self._starts[self._which]:
            self._which = 0
        while self._position >= self._starts[self._which + 1]:
            self._which += 1

    def _file(self, path: str) -> io.FileIO:
        if self._opened is None or self._opened[0] != path:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = (path, io.FileIO(path))
        return self._opened[1]
