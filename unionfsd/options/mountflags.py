"""The flags of mount(2) (linux/mount.h)."""

from __future__ import annotations

from unionfsd.typed import Final

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_SYNCHRONOUS: Final = 16
MS_REMOUNT: Final = 32
MS_MANDLOCK: Final = 64
MS_DIRSYNC: Final = 128
MS_NOATIME: Final = 1024
MS_NODIRATIME: Final = 2048
MS_POSIXACL: Final = 1 << 16
MS_RELATIME: Final = 1 << 21
MS_STRICTATIME: Final = 1 << 24
