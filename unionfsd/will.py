"""What a mount leaves to a newer program, and whether that can take it."""

from __future__ import annotations

import os
import sys

from unionfsd import errors, estate
from unionfsd.estate import Estate
from unionfsd.typed import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from unionfsd.fuse.mounting import Mount
    from unionfsd.union import Union

_TRIAL: Final = 30.0
"""Seconds for a newer program to say that it can take over."""


class Will:
    """What a mount leaves to a newer program: the same command line, in the same directory."""

    def __init__(self, union: Union, mount: Mount, directory: str) -> None:
        self._union = union
        self._mount = mount
        self._directory = directory

    def estate(self, lives: int) -> Estate:
        """What there is, when so many processes have served."""
        mount_id = None if self._mount.place is None else self._mount.place.mount_id
        fuse, ledger = self._mount.fuse_fd, self._union.ledger.fd.fd
        return estate.of(self._union.stack, self._union.config, fuse, ledger, mount_id, lives, self._directory)

    def renew(self, serving: int, lives: int) -> NoReturn:
        """Execute the program anew, in place of the keeper."""
        left = self.estate(lives)._replace(serving=serving)
        os.chdir(left.directory)
        for fd in left.fds:
            os.set_inheritable(fd, True)
        try:
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], left.environment())
        finally:
            for fd in left.fds:
                os.set_inheritable(fd, False)
            os.chdir("/")

    def trial(self) -> str | None:
        """Whether a newer program can: None, or why not."""
        import subprocess

        left = self.estate(0)._replace(trial=True)
        argv = [sys.executable, *sys.orig_argv[1:]]
        try:
            done = subprocess.run(
                argv,
                env=left.environment(),
                cwd=left.directory,
                pass_fds=left.fds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_TRIAL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return None if done.returncode == errors.OK else done.stderr.decode(errors="replace").strip()
