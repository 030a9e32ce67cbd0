"""From what a row says about a picture to a `MediaRef`, inside the folders that the user named and nowhere else.

A row is data from strangers: a path in it may not leave the source's root, by `..`, by a link, or by being absolute.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol
from urllib.parse import unquote, unquote_to_bytes

from vlmtune.data.sample import MediaRef
from vlmtune.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/](?!/)")


class Root(Protocol):
    """From what a row says about a medium to where its bytes are."""

    @property
    def digest(self) -> str:
        """Changes when a name may lead to another place in the same file; empty where names lead to whole files."""
        ...

    def locate(self, name: str) -> MediaRef: ...


class MediaRoot:
    """Where the media paths of one source start, and where they may lead.

    Args:
        base: absolute folder that relative paths start from.
        why: how `base` was chosen, as a clause for messages.
        more: absolute folders where a relative path is looked for, in order, when `base` has no such file.
        allow: absolute folders outside these that absolute paths may point into.
    """

    digest = ""

    def __init__(self, base: str, *, why: str, more: tuple[str, ...] = (), allow: tuple[str, ...] = ()) -> None:
        self.base = os.path.normpath(base)
        self.why = why
        self.more = tuple(os.path.normpath(folder) for folder in more)
        self.folders = (self.base, *self.more, *(os.path.normpath(folder) for folder in allow))
        self._real = tuple(os.path.realpath(folder) for folder in self.folders)

    def locate(self, name: str) -> MediaRef:
        """The reference behind a path, a ``file://`` or a ``data:`` URI; the path of a folder ends with a slash.

        Raises:
            DataError: a web address, a path that leaves the folders, a missing file, a broken data URI.
        """
        if name[:5].lower() == "data:":
            return inline(name)
        path, mode = self._found(name)
        self._stays_inside(name, path, is_link=stat.S_ISLNK(mode))
        if stat.S_ISLNK(mode):
            try:
                mode = os.stat(path).st_mode
            except OSError:
                raise DataError(f"the link {path} leads nowhere", remedy="Put the file there.") from None
        if stat.S_ISDIR(mode):
            return MediaRef(path=path.rstrip("/") + "/")
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is no regular file", expected="a picture or a video")
        return MediaRef(path=path)

    def _found(self, name: str) -> tuple[str, int]:
        """The path of what `name` says, and what kind of file it is."""
        plain = without_file_scheme(name)
        path = self._absolute(plain)
        others = () if os.path.isabs(plain) else (os.path.join(folder, plain) for folder in self.more)
        for candidate in (path, *others):
            try:
                return candidate, os.lstat(candidate).st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            except UnicodeEncodeError:
                raise DataError(f"the path {plain!r} holds half of a character") from None
            except OSError as error:
                raise DataError(f"the file {_cut(candidate)} cannot be reached ({error.strerror})") from error
        raise self._missing(name, path)

    def _absolute(self, name: str) -> str:
        if not name or "\0" in name:
            raise DataError("a path is empty" if not name else f"the path {name!r} holds a zero byte")
        if ".." in name.split("/"):
            raise DataError(
                f"the path {_cut(name)} holds `..`",
                expected="a path inside the media root",
                remedy="Set `root` of the source to a folder above all of its files, and write the path from there.",
            )
        if _WINDOWS.match(name):
            prefix = name[: max(name.rfind("\\"), name.rfind("/")) + 1]
            raise DataError(
                f"the path {_cut(name)} is one of a Windows machine",
                remedy=f"Say at the source where its files are here: `replace_prefix: {{'{prefix}': images/}}`.",
            )
        if not os.path.isabs(name):
            return os.path.join(self.base, name)
        path = os.path.normpath(name)
        if not any(_is_under(path, folder) for folder in self.folders):
            raise self._outside(path)
        return path

    def _outside(self, path: str) -> DataError:
        old, new = os.path.dirname(path) + "/", "images/"
        parts = path.split("/")
        for i in range(2, len(parts)):  # the same file under the root shows what somebody else's folder is called here
            if os.path.exists(os.path.join(self.base, *parts[i:])):
                old, new = "/".join(parts[:i]) + "/", self.base + "/"
                break
        return DataError(
            f"the absolute path {_cut(path)} lies outside the media root {self.base} ({self.why})",
            remedy="If it may be read, add its folder to the YAML under data: "
            f"`allow: [{_cut(os.path.dirname(path))}]`. If it is another machine's path, say at the source where its "
            f"files are here: `replace_prefix: {{{_cut(old)}: {new}}}`.",
        )

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
        start = " and ".join((self.base, *self.more))
        backslash = " A path here is written with / and not with \\." if "\\" in name else ""
        return DataError(
            f"there is no file {path} (the row says {_cut(name)}; relative paths start from {start}, {self.why})",
            remedy=f"Correct the path, put the file there, or set `root` of the source.{backslash}",
        )


class RenamedRoot:
    """A root for rows that say their paths as they were on another machine (`replace_prefix`).

    The longest prefix that fits wins. A prefix ends where a part of the path ends: ``/data/coco`` fits
    ``/data/coco/1.jpg`` and not ``/data/coco2017/1.jpg``. In a Windows path ``\\`` and ``/`` mean the same. An empty
    replacement leaves a path that starts from the root.
    """

    def __init__(self, root: Root, prefixes: Mapping[str, str]) -> None:
        self._root = root
        self._prefixes = dict(prefixes)

    @property
    def digest(self) -> str:
        return self._root.digest

    def locate(self, name: str) -> MediaRef:
        """See `MediaRoot.locate`."""
        if name[:5].lower() == "data:":
            return self._root.locate(name)
        here = renamed(name, self._prefixes)
        if here == name and name[:5].lower() == "file:":
            plain = without_file_scheme(name)
            again = renamed(plain, self._prefixes)
            here = again if again != plain else name
        if here == name:
            return self._root.locate(name)
        try:
            return self._root.locate(here)
        except DataError as error:
            error.found += f" [the row says {_cut(name)}, changed by `replace_prefix`]"
            raise


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with its beginning replaced; see `RenamedRoot` for which prefix fits."""
    if not prefixes:
        return name
    slashed = _slashed(name)
    for old, new in sorted(prefixes.items(), key=lambda pair: -len(pair[0])):
        old = _slashed(old).rstrip("/")
        if slashed.startswith(old + "/"):
            rest = slashed[len(old) :].lstrip("/")
            return new.rstrip("/") + "/" + rest if new else rest
    return name


def _slashed(path: str) -> str:
    return path.replace("\\", "/") if _WINDOWS.match(path) or path.startswith("\\\\") else path


def without_file_scheme(name: str) -> str:
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


def inline(uri: str) -> MediaRef:
    """``data:[type][;base64],payload`` as a reference that carries its bytes."""
    head, comma, payload = uri.partition(",")
    if not comma:
        raise DataError(f"the data URI {_cut(uri, 80)} has no comma", expected="data:image/png;base64,…")
    if head.lower().endswith(";base64"):
        try:
            content = base64.b64decode(re.sub(r"\s", "", unquote(payload)), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"the data URI {_cut(uri, 80)} is not valid base64 ({error})") from error
    else:
        content = unquote_to_bytes(payload)
    if not content:
        raise DataError(f"the data URI {_cut(uri, 80)} is empty", expected="data:image/png;base64,…")
    return MediaRef(path=f"{_cut(head, 80)} ({len(content):,} bytes in the row)", inline=content)


def _is_under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    # One lookup per folder, not per file: resolving a path asks the file system about each of its parts.
    return os.path.realpath(folder)


def _cut(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "…"
