"""What a union is made of, opened, checked and put right in the one order that is safe.

Rules this file obeys: what is refused, is refused before anything is written; what fails, leaves nothing open.
"""

from __future__ import annotations

import contextlib

from . import identity, intent
from .errors import LAYER, UserError
from .estate import Estate, stack_of
from .exports import Log, open_log
from .index import Index, open_index
from .layers import LayerStack
from .ledger import Ledger
from .opening import open_stack
from .options import MountConfig
from .owners import keep_owners
from .syscalls import Fd
from .typed import NamedTuple
from .workdir import Workdir, open_workdir


class Parts(NamedTuple):
    """The layers; the work directory and the index, None where there are none; where nodes are kept track of, if so.

    `ledger`: what the kernel was told by a process before this one.
    """

    stack: LayerStack
    work: Workdir | None = None
    names: Index | None = None
    seen: Log | None = None
    ledger: Ledger | None = None


def take_parts(estate: Estate, config: MountConfig) -> Parts:
    """What was left by a program that makes room, and is in use until it has; UserError."""
    with contextlib.ExitStack() as opened:
        stack = stack_of(estate, config)
        opened.callback(stack.close)
        try:
            work = index = None
            if stack.work is not None:
                work = open_workdir(stack, config, sweep=False)
                keep_owners(stack, config)
                index = open_index(stack, work, config, load=False)
            made = Parts(stack, work, index, ledger=Ledger.adopt(Fd(estate.ledger)))
        except OSError as exc:
            raise UserError(f"layers: {exc}", hint="a layer cannot be read", code=LAYER) from exc
        opened.pop_all()
        return made


def open_parts(config: MountConfig) -> Parts:
    """Open, check and lock the layers of `config` and sweep the work directory; UserError for what cannot be."""
    with contextlib.ExitStack() as opened:
        stack = open_stack(config)
        opened.callback(stack.close)
        try:
            made = _open(stack, config)
        except OSError as exc:
            raise UserError(f"layers: {exc}", hint="a layer cannot be read", code=LAYER) from exc
        opened.pop_all()
        return made


def _open(stack: LayerStack, config: MountConfig) -> Parts:
    if stack.work is None or stack.upper is None:
        return Parts(stack, seen=open_log(stack, config))
    identity.check(stack, rebase=config.rebase)
    work = open_workdir(stack, config)
    intent.recover(work, stack.upper.root.fd)
    keep_owners(stack, config)
    if config.rebase:
        from .rebase import rebase  # seldom wanted: the start shall not wait for it

        rebase(stack, work)
    identity.record(stack, work)
    return Parts(stack, work, open_index(stack, work, config), open_log(stack, config))
