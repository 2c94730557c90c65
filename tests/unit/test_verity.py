"""fs-verity digests, against values that the kernel's own tools give."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from unionfsd import syscalls, verity
from unionfsd.format import Digest


def opened(path: Path) -> syscalls.Fd:
    with path.open("rb") as file:
        return syscalls.reopen(file.fileno(), 0)


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        # `fsverity digest` of fsverity-utils; the first is in its man page's and in composefs's tests, too.
        (b"", "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"),
    ],
)
def test_known_digests(data: bytes, digest: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with opened(tmp_path / "file") as fd:
        assert verity.compute(fd.fd, 1).hex() == digest


@pytest.mark.parametrize("blocks", [0.5, 1, 1.5, 128, 129, 300])
def test_tree(blocks: float, tmp_path: Path) -> None:
    """The digest of a file of one, two and three levels is that of the tree written down level by level."""
    data = bytes(range(251)) * (int(blocks * 4096) // 251)
    (tmp_path / "file").write_bytes(data)
    level = data
    while True:
        hashes = [
            hashlib.sha256(level[at : at + 4096].ljust(4096, b"\0")).digest() for at in range(0, len(level), 4096)
        ]
        if len(hashes) == 1:
            break
        level = b"".join(hashes)
    descriptor = bytes([1, 1, 12, 0]) + bytes(4) + len(data).to_bytes(8, "little") + hashes[0].ljust(64, b"\0")
    wanted = hashlib.sha256(descriptor.ljust(256, b"\0")).digest()
    with opened(tmp_path / "file") as fd:
        assert verity.compute(fd.fd, 1) == wanted
        verity.check(fd, Digest(1, wanted), "file")


def test_a_mismatch_names_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"data")
    with opened(tmp_path / "file") as fd, pytest.raises(OSError, match="the/path") as caught:
        verity.check(fd, Digest(1, bytes(32)), "the/path")
    assert caught.value.errno == errno.EIO
    assert "the/path" in caplog.text
