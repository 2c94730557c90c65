"""A blob on its way into the store, which may take several attempts."""

from __future__ import annotations

import os
import stat

from unionfsd import syscalls
from unionfsd.errors import UserError
from unionfsd.images.compress import Readable, Verified
from unionfsd.syscalls import Fd
from unionfsd.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from unionfsd.images.store import Stage, Store


class Incoming:
    """A blob that is being written: what was there already is `have` bytes long, to be gone on with.

    Left without `commit`, what came so far stays for the next time.
    """

    def __init__(self, store: Store, stage: Stage, digest: str) -> None:
        self._store = store
        self._stage = stage
        self.digest = digest
        self.complete = store.has_blob(digest)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = Fd(os.open(b"data", flags, 0o644, dir_fd=stage.fd.fd))
        st = os.fstat(self._fd.fd)
        if not stat.S_ISREG(st.st_mode):
            raise UserError(f"{store.root}: the stage of {digest} is not ours")
        self.have = st.st_size

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stage.keep = not self.complete and self.have > 0
        self._fd.close()
        self._stage.__exit__()

    def restart(self) -> None:
        """Throw away what there is."""
        syscalls.truncate(self._fd.fd, 0)
        self.have = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = syscalls.pwrite(self._fd.fd, view, self.have)
            self.have += count
            view = view[count:]

    def reader(self, start: int = 0) -> Readable:
        """What is there, from `start` on."""
        return At(self._fd.fd, start)

    def commit(self, size: int | None = None, *, verified: bool = False) -> None:
        """Put the blob in its place; UserError, and nothing kept, when it is not what its digest says."""
        if not verified:
            try:
                stream = Verified(At(self._fd.fd, 0), self.digest, size)
                while stream.read(1 << 20):
                    pass
            except UserError:
                self.restart()
                raise
        syscalls.fsync(self._fd.fd)
        self._store._publish_blob(self._stage, self.digest)
        self.complete = True


class At:
    """A file as a stream, read by position."""

    def __init__(self, fd: int, start: int) -> None:
        self._fd = fd
        self._at = start

    def read(self, size: int, /) -> bytes:
        data = os.pread(self._fd, size, self._at)
        self._at += len(data)
        return data
