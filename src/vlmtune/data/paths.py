"""From what a row says about a picture to a `MediaRef`, inside the folders that the user named and nowhere else.

A row is data from strangers: a path in it may not leave the source's root, by `..`, by a link, or by being absolute.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from functools import lru_cache
from urllib.parse import unquote, unquote_to_bytes

from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


class MediaRoot:
    """Where the media paths of one source start, and where they may lead.

    Args:
        base: absolute folder that relative paths start from.
        why: how `base` was chosen, as a clause for messages.
        allow: absolute folders outside `base` that absolute paths may point into.
    """

    def __init__(self, base: str, *, why: str, allow: tuple[str, ...] = ()) -> None:
        self.base = os.path.normpath(base)
        self.why = why
        self.folders = (self.base, *(os.path.normpath(folder) for folder in allow))
        self._real = tuple(os.path.realpath(folder) for folder in self.folders)

    def locate(self, name: str) -> MediaRef:
        """The reference behind a path, a ``file://`` or a ``data:`` URI.

        Raises:
            DataError: a web address, a path that leaves the folders, a missing file, a broken data URI.
        """
        if name[:5].lower() == "data:":
            return _inline(name)
        path = self._absolute(_without_file_scheme(name))
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name, path) from None
        except OSError as error:
            raise DataError(f"the file {path} cannot be reached ({error.strerror})") from error
        self._stays_inside(name, path, is_link=stat.S_ISLNK(mode))
        if stat.S_ISLNK(mode):
            try:
                mode = os.stat(path).st_mode
            except OSError:
                raise DataError(f"the link {path} leads nowhere", remedy="Put the file there.") from None
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise DataError(f"{path} is {kind}", expected="a picture file")
        return MediaRef(path=path)

    def _absolute(self, name: str) -> str:
        if not name or "\0" in name:
            raise DataError("a path is empty" if not name else f"the path {name!r} holds a zero byte")
        if ".." in name.split("/"):
            raise DataError(
                f"the path {name} holds `..`",
                expected="a path inside the media root",
                remedy="Set `root` of the source to a folder above all of its files, and write the path from there.",
            )
        if not os.path.isabs(name):
            return os.path.join(self.base, name)
        path = os.path.normpath(name)
        if not any(_is_under(path, folder) for folder in self.folders):
            prefix = os.path.dirname(path)
            raise DataError(
                f"the absolute path {name} lies outside the media root {self.base} ({self.why})",
                remedy=f"If it may be read, add its folder to the YAML under data: `allow: [{prefix}]`.",
            )
        return path

    def _stays_inside(self, name: str, path: str, *, is_link: bool) -> None:
        """No link on the way may lead out of the folders."""
        real = os.path.realpath(path) if is_link else _real_folder(os.path.dirname(path))
        if not any(_is_under(real, folder) for folder in self._real):
            raise DataError(
                f"the path {name} leaves the media root {self.base} through a link, to {real}",
                remedy="Put the file itself under the root, or set `root` to the folder that the link leads to.",
            )

    def _missing(self, name: str, path: str) -> DataError:
        if os.path.isabs(name) or name[:5].lower() == "file:":
            return DataError(f"there is no file {path}", remedy="Correct the path in the row, or put the file there.")
        return DataError(
            f"there is no file {path} (the row says {name}; relative paths start from {self.base}, {self.why})",
            remedy="Correct the path, put the file there, or set `root` of the source.",
        )


def _without_file_scheme(name: str) -> str:
    """The path of a ``file://`` URI; any other scheme is an address that needs the network."""
    if name[:5].lower() == "file:":
        rest = name[5:]
        if rest.startswith("//"):
            host, slash, tail = rest[2:].partition("/")
            if host not in ("", "localhost") or not slash:
                raise DataError(f"{name} names the machine {host!r}", expected="file:///absolute/path")
            rest = "/" + tail
        return unquote(rest)
    if _SCHEME.match(name):
        raise DataError(
            f"{_cut(name)} is a web address, and data is read without the network",
            remedy="Download the file and write its path.",
        )
    return name


def _inline(uri: str) -> MediaRef:
    """``data:[type][;base64],payload`` as a reference that carries its bytes."""
    head, comma, payload = uri.partition(",")
    if not comma:
        raise DataError(f"the data URI {_cut(uri)} has no comma", expected="data:image/png;base64,…")
    if head.lower().endswith(";base64"):
        try:
            content = base64.b64decode(re.sub(r"\s", "", unquote(payload)), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"the data URI {_cut(uri)} is not valid base64 ({error})") from error
    else:
        content = unquote_to_bytes(payload)
    if not content:
        raise DataError(f"the data URI {_cut(uri)} is empty", expected="data:image/png;base64,…")
    return MediaRef(path=f"{_cut(head)} ({len(content):,} bytes in the row)", inline=content)


def _is_under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    # One lookup per folder, not per file: resolving a path asks the file system about each of its parts.
    return os.path.realpath(folder)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"
