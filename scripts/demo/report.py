"""What the demo prints, what it remembers of it, and how it runs other programs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BOLD, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN = 1, 31, 32, 33, 34, 35, 36
LAYER_COLOURS = {"upper": YELLOW, "app": MAGENTA, "config": CYAN, "base": BLUE}
MOST_DETAILS = 20


def paint(code: int, text: str) -> str:
    """`text` in an ANSI colour, on a terminal only."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def heading(text: str) -> None:
    print(f"\n{paint(BOLD, text)}")


class Findings:
    """What the run found out: the steps that this machine forbids, and the claims that did not hold."""

    def __init__(self) -> None:
        self.forbidden: list[str] = []
        self.failed: list[str] = []

    def forbid(self, step: str, why: object) -> None:
        """Notes a step that the kernel or missing privileges rule out; the demo goes on without it."""
        self.forbidden.append(step)
        print(paint(YELLOW, f"  not possible here: {step} ({why})"))

    def check(self, held: bool, claim: str, details: Sequence[str] = ()) -> None:
        """Prints a claim with its outcome; `details` are the lines that contradict it."""
        print(f"  {paint(GREEN, 'yes') if held else paint(RED, 'NO ')}  {claim}")
        for line in details[:MOST_DETAILS]:
            print(f"       {line}")
        if len(details) > MOST_DETAILS:
            print(f"       and {len(details) - MOST_DETAILS} more")
        if not held:
            self.failed.append(claim)


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; its output and its errors are in `stdout`."""
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
    )
