"""For whom a store is: root of the machine, an ordinary user, or that user as root of a namespace of their own."""

from __future__ import annotations

import os

from unionfsd.typed import Final

#: Set by ``podman unshare`` and ``buildah unshare`` for what they run (containers/storage, pkg/unshare).
_UNSHARED: Final = "_CONTAINERS_USERNS_CONFIGURED"


def is_unshared() -> bool:
    """Whether we are root of a user's own namespace, where their stores are still those of the user."""
    return os.geteuid() == 0 and bool(os.environ.get(_UNSHARED))


def is_user() -> bool:
    """Whether the stores and settings that count are those of an ordinary user."""
    return os.geteuid() != 0 or is_unshared()
