"""fs-verity digests of files (Documentation/filesystems/fsverity.rst, "File digest computation").

A file system that has fs-verity is asked; elsewhere the digest is computed from the data: that of a Merkle tree with
blocks of 4096 bytes and no salt, as `fsverity digest` prints it and mkcomposefs records it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from .format import Digest
from .logger import get_logger
from .typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable, Iterable, Iterator

    from .syscalls import Fd

log = get_logger(__name__)

_BLOCK: Final = 4096
_FS_IOC_MEASURE_VERITY: Final = 0xC0046686
_VERITY_HEAD: Final = struct.Struct("=HH")
_VERITY_MAX: Final = 64
_READ: Final = 256 * _BLOCK
#: FS_VERITY_HASH_ALG_* to the name in hashlib.
_ALGORITHMS: Final = {1: "sha256", 2: "sha512"}
#: struct fsverity_descriptor: version, algorithm, log2 of the block, length of the salt, 0, size of the data, root,
#: salt, 0.
_DESCRIPTOR: Final = struct.Struct("<BBBBIQ64s32s144s")


def check(fd: Fd, wanted: Digest, path: str) -> None:
    """See that the data of the readable `fd` has the digest `wanted`; EIO, logged with `path`, when it has not."""
    found = measure_verity(fd.fd)
    if found is None:
        found = wanted.algorithm, compute(fd.fd, wanted.algorithm)
    if found != wanted:
        log.error("%s: its data is not what was recorded (fs-verity digest %s)", path, wanted.value.hex())
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)


def compute(fd: int, algorithm: int) -> bytes:
    """The digest of the data of `fd`; `algorithm` is an FS_VERITY_HASH_ALG_*. EIO for an unknown one."""
    name = _ALGORITHMS.get(algorithm)
    if name is None:
        raise OSError(errno.EIO, f"unknown fs-verity algorithm {algorithm}")
    import hashlib  # late: it loads OpenSSL, a twentieth of the start

    new = getattr(hashlib, name)
    size = os.fstat(fd).st_size
    root = _root(new, _blocks(fd)) if size else b""
    return _sum(new, _DESCRIPTOR.pack(1, algorithm, _BLOCK.bit_length() - 1, 0, 0, size, root, b"", b""))


def _blocks(fd: int) -> Iterator[bytes]:
    offset = 0
    while data := os.pread(fd, _READ, offset):
        # Only the last block of all may be short: a read that ends within one is cut back to whole ones.
        whole = len(data) if len(data) < _BLOCK else len(data) - len(data) % _BLOCK
        for at in range(0, whole, _BLOCK):
            yield data[at : at + _BLOCK].ljust(_BLOCK, b"\0")
        offset += whole


def _root(new: Callable[[bytes], hashlib._Hash], blocks: Iterable[bytes]) -> bytes:
    """The hash of the topmost block of the tree over `blocks`; of a single one, its own."""
    level = [_sum(new, block) for block in blocks]
    per_block = _BLOCK // len(level[0])
    while len(level) > 1:
        parents = (b"".join(level[at : at + per_block]) for at in range(0, len(level), per_block))
        level = [_sum(new, parent.ljust(_BLOCK, b"\0")) for parent in parents]
    return level[0]


def _sum(new: Callable[[bytes], hashlib._Hash], data: bytes) -> bytes:
    return new(data).digest()


def measure_verity(fd: int) -> tuple[int, bytes] | None:
    """(algorithm, digest) that fs-verity keeps for the readable file `fd`; None when it keeps none."""
    argument = bytearray(_VERITY_HEAD.pack(0, _VERITY_MAX).ljust(_VERITY_HEAD.size + _VERITY_MAX, b"\0"))
    try:
        fcntl.ioctl(fd, _FS_IOC_MEASURE_VERITY, argument)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    algorithm, size = _VERITY_HEAD.unpack_from(argument)
    return algorithm, bytes(argument[_VERITY_HEAD.size : _VERITY_HEAD.size + size])
