"""Programs that people run, as a load for `torture`: git, SQLite, dpkg with a maintainer script in a chroot.

Each does the same in a directory of the mount and in a plain one, again and again; what it prints, and what it leaves,
must be the same, and what it says of its own files (fsck, integrity_check) good.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import threading
from pathlib import Path
from typing import Final

_ENVIRONMENT: Final = {
    "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    "HOME": "/nonexistent",
    "LC_ALL": "C",
    "DEBIAN_FRONTEND": "noninteractive",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    **{f"GIT_{who}_{what}": "load" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    **{f"GIT_{who}_DATE": "2020-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
}
_SECONDS: Final = 120


class Load(threading.Thread):
    """One program at work in `mount` and in `plain`; `aside` is a directory for what it is given."""

    def __init__(self, mount: Path, plain: Path, aside: Path, stop: threading.Event) -> None:
        super().__init__(name=type(self).__name__.lower())
        self._tops = [top / self.name for top in (mount, plain)]
        self._aside = aside / f"{self.name}.aside"
        self._stop_at = stop
        self.prepared = threading.Event()
        self.operations = 0
        self.differences: list[str] = []
        self._aside.mkdir()
        for top in self._tops:
            top.mkdir()

    def remove(self) -> None:
        """Take away what is different by nature: files that hold times and inode numbers."""
        for top in self._tops:
            shutil.rmtree(top)

    def run(self) -> None:
        try:
            self.prepare()
            self.prepared.set()
            while not (self.operations and self._stop_at.is_set()) and not self.differences:
                ours, expected = (self.once(top, self.operations) for top in self._tops)
                self.operations += 1
                if ours != expected:
                    self.differences.append(f"round {self.operations}: {ours!r:.500}, expected {expected!r:.500}")
        except Exception as error:
            self.differences.append(repr(error))
        if self.differences:
            self._stop_at.set()
        self.prepared.set()

    def prepare(self) -> None:
        """Make what is needed `aside`."""

    def once(self, top: Path, number: int) -> object:
        """One round of the work beneath `top`; what came of it."""
        raise NotImplementedError


def call(*words: str | Path, at: Path | None = None) -> str:
    """Output of a command; an exception with it, when it fails."""
    argv = [str(word) for word in words]
    done = subprocess.run(
        argv, cwd=at, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SECONDS, check=False
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {text[-1000:]}")
    return text


class Git(Load):
    """clone, checkout, commit, gc, fsck."""

    def prepare(self) -> None:
        source = self._aside / "source"
        source.mkdir()
        call("git", "init", "-q", "-b", "main", at=source)
        for turn in range(4):
            choose = random.Random(turn)
            for number in range(turn * 10, 120):
                file = source / f"d{number % 7}" / f"f{number}"
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(choose.randbytes(2000).hex().encode())
            call("git", "add", "-A", at=source)
            call("git", "commit", "-qm", f"turn {turn}", at=source)
            call("git", "branch", f"b{turn}", at=source)

    def once(self, top: Path, number: int) -> object:
        clone = top / "clone"
        shutil.rmtree(clone, ignore_errors=True)
        call("git", "clone", "-q", "--no-local", self._aside / "source", clone)
        told = []
        for branch in ("b0", "b2", "main"):
            call("git", "checkout", "-q", branch, at=clone)
            told.append(call("git", "status", "--porcelain", at=clone))
        (clone / "d1/f1").write_text(f"round {number}")
        (clone / "new").mkdir()
        shutil.move(clone / "d2", clone / "new/d2")
        call("git", "add", "-A", at=clone)
        call("git", "commit", "-qm", "change", at=clone)
        call("git", "gc", "-q", "--prune=now", at=clone)
        told.append(call("git", "fsck", "--full", "--strict", "--no-progress", at=clone))
        return [*told, call("git", "log", "--format=%H", at=clone), call("git", "ls-files", "-s", at=clone)]


class Sqlite(Load):
    """Transactions with a rollback journal and with a write-ahead log, whose index is mapped and shared."""

    def once(self, top: Path, number: int) -> object:
        choose, came = random.Random(number), []
        for mode in ("delete", "wal", "truncate"):
            database = sqlite3.connect(top / f"{mode}.db", timeout=_SECONDS)
            try:
                database.execute(f"PRAGMA journal_mode={mode}")
                database.execute("CREATE TABLE IF NOT EXISTS t (k INTEGER PRIMARY KEY, v BLOB)")
                for turn in range(8):
                    with database:
                        rows = [(choose.randrange(3000), choose.randbytes(300)) for _ in range(50)]
                        database.executemany("INSERT OR REPLACE INTO t VALUES (?, ?)", rows)
                        database.execute("DELETE FROM t WHERE k % 7 = ?", (turn % 7,))
                came.append(database.execute("PRAGMA integrity_check").fetchall())
                came.append(database.execute("SELECT count(*), sum(k), max(hex(v)) FROM t").fetchall())
            finally:
                database.close()
        if [("ok",)] not in came:
            raise RuntimeError(f"integrity_check: {came}")
        return came


class Dpkg(Load):
    """A package installed in a root of its own, configured in a chroot there, and purged."""

    def prepare(self) -> None:
        package = self._aside / "package"
        for number in range(150):
            file = package / f"usr/share/load/d{number % 9}/f{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(random.Random(number).randbytes(number * 50))
        (package / "etc").mkdir()
        (package / "etc/load.conf").write_text("setting\n")
        control = package / "DEBIAN"
        control.mkdir()
        (control / "control").write_text(
            "Package: load\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.invalid>\n"
            "Description: a load\n"
        )
        (control / "conffiles").write_text("/etc/load.conf\n")
        script = control / "postinst"
        script.write_text('#!/bin/sh\nset -e\necho "$1" > /etc/configured\nln -s load.conf /etc/link\n')
        script.chmod(0o755)
        call("dpkg-deb", "--build", "--root-owner-group", package, self._aside / "load.deb")

    def once(self, top: Path, number: int) -> object:
        from tests.system.torture import fingerprint

        root = top / "root"
        shutil.rmtree(root, ignore_errors=True)
        for directory in ("bin", "etc", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/log"):
            (root / directory).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
        shutil.copy(shutil.which("busybox") or "", root / "bin/sh")
        call("dpkg", f"--root={root}", "--force-depends", "-i", self._aside / "load.deb")
        installed = fingerprint(root)
        call("dpkg", f"--root={root}", "--verify", "load")
        call("dpkg", f"--root={root}", "-P", "load")
        logs = {"var/log/dpkg.log"}
        return [{name: of for name, of in tree.items() if name not in logs} for tree in (installed, fingerprint(root))]


LOADS: Final = (Git, Sqlite, Dpkg)
