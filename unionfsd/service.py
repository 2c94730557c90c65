"""What a service manager is told about a mount while it is served: that it is alive, how it is doing, that it reloads.

The pings of the watchdog (sd_watchdog_enabled(3)) are sent by the event loop that serves the kernel, so a loop that
hangs is restarted. Where there is no service manager nothing here runs.
"""

from __future__ import annotations

import time

import trio

from unionfsd import logs, systemd
from unionfsd.typed import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from unionfsd.union import Union

_PERIOD: Final = 30.0
"""Seconds between two reports where no watchdog wants them more often."""


async def report(union: Union) -> NoReturn:
    """Ping the watchdog and renew the status line, for ever."""
    patience = systemd.watchdog()
    period = _PERIOD if patience is None else min(patience / 2, _PERIOD)
    ping = [] if patience is None else ["WATCHDOG=1"]
    while True:
        systemd.notify(*ping, f"STATUS={status(union)}")
        await trio.sleep(period)


def status(union: Union) -> str:
    """One line for people, as `systemctl status` shows it."""
    done, held = union.statistics(), union.holdings()
    words = [
        f"{done.requests} requests",
        f"{done.copy_ups} copied up ({done.copied_bytes >> 10} KiB)",
        f"{held.nodes} objects known",
    ]
    if done.faults:
        words.append(f"{done.faults} FAILED FOR A DEFECT, see the log")
    return ", ".join(words)


def reload() -> None:
    """Open the log file anew, for whoever moved it away. Options of a mount cannot change while it is served."""
    systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    logs.reopen()
    systemd.notify("READY=1")
