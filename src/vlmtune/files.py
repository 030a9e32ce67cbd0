"""Files that are either whole or not there, and what can be asked about files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError, WeightsError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file beside its place and rename it, so that a reader never meets half of it.

    Text is written as UTF-8. Missing parent folders are made. An interrupted call leaves the old file as it was.

    Raises:
        VlmtuneError: the file cannot be written (disk full, no permission); names the file.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    # The name is our own and unguessable, so two processes that write the same file do not meet in the draft.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "xb") as file:
            file.write(payload)
            file.flush()
            # Without this a power cut after the rename can leave an empty file under the final name.
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise VlmtuneError(
            f"cannot be written ({reason})", where=str(path), remedy="Free some space, or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[Callable[[], bool]]:
    """Marks a folder as worked in by this process, beside others; what is yielded tells whether no other process is.

    Where the file system has no locks, or may not be written, nobody ever seems to be alone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+b")  # noqa: SIM115 (closed below)
    except OSError:  # whoever has something to write there will say what is wrong
        yield lambda: False
        return
    with lock as file:
        # Not `flock`: forked workers inherit that one, and may outlive a killed parent for a moment.
        def alone() -> bool:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            finally:
                with contextlib.suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True

        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield alone


def remove_drafts(folder: Path) -> None:
    """Removes what killed calls of `write_atomic` left behind; only for who is alone in the folder."""
    for draft in folder.glob(".*.part"):
        draft.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the disk that holds `path`, which need not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can get without swapping; None where nothing says it.

    Linux: MemAvailable, or what the limit of a container (control groups, version 2 or 1) leaves if that is less.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    groups = root / "sys/fs/cgroup"
    found += _left(groups, "memory.max", "memory.current", "file ")
    found += _left(groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache ")
    return min(found, default=None)


def _left(group: Path, limit: str, used: str, cache: str) -> list[int]:
    """Bytes below a control group's limit, files that the kernel keeps in memory not counted; [] without a limit."""
    try:
        most, now = ((group / name).read_text(encoding="ascii").strip() for name in (limit, used))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    kept = sum(int(line.split()[1]) for line in stat if line.startswith(cache))
    return [max(0, int(most) - int(now) + kept)] if most.isdigit() else []


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, as it stands in a file of a model folder.

    Raises:
        WeightsError: something else stands there. OSError: the file is not there, or may not be read.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"is not JSON ({error})", where=str(file), remedy="The file is damaged; copy it again."
        ) from error
    if not isinstance(value, dict):
        raise WeightsError(f"holds a {type(value).__name__}", where=str(file), expected="a JSON object")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """An object as JSON for people to read."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
