"""Files are whole or not there."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path

import psutil
import pytest

from vlmtune.errors import VlmtuneError
from vlmtune.files import free_bytes, free_memory, sha256, write_atomic


def test_text_and_bytes_are_written_and_folders_made(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.txt", "图\n")
    write_atomic(tmp_path / "a" / "c.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "图\n".encode()
    assert (tmp_path / "a" / "c.bin").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.txt", "c.bin"]


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(VlmtuneError, match=r"a\.bin: cannot be written \(File too large\)") as caught:
            write_atomic(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_free_bytes_of_a_folder_to_come(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize(
    ("place", "limit", "used", "cache"),
    [
        ("sys/fs/cgroup", "memory.max", "memory.current", "file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ],
)
def test_the_limit_of_a_container_counts(place: str, limit: str, used: str, cache: str, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert free_memory(tmp_path) is None
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert free_memory(tmp_path) == 8000 * 1024
    group = tmp_path / place
    group.mkdir(parents=True)
    (group / used).write_text("700000\n")
    (group / "memory.stat").write_text(f"anon 5\n{cache} 100000\n{cache}_mapped 9\n")
    for most, left in (("1000000", 400_000), ("max", 8000 * 1024), ("500000", 0), (str(2**63), 8000 * 1024)):
        (group / limit).write_text(f"{most}\n")
        assert free_memory(tmp_path) == left


def test_free_memory_is_what_the_kernel_says() -> None:
    found = free_memory()
    assert found is not None and found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
