"""``unionfsctl doctor``: what is wrong with an upper that is not mounted, and other forms for its marks."""

from __future__ import annotations

import json
import os

from unionfsd.ctl import show
from unionfsd.errors import LAYER, OK, UserError, reason
from unionfsd.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from unionfsd.layers import LayerStack

#: There are problems, or not everything could be converted.
NEGATIVE = 1


def doctor(given: argparse.Namespace) -> int:
    """Print what was found, or how the upper is, or would be, converted."""
    from unionfsd.opening import open_idle

    if given.apply and not given.convert_to:
        raise UserError("--apply is for --convert-to FORM")
    work = None if given.work is None else os.fsencode(given.work)
    stack = open_idle(os.fsencode(given.upper), tuple(map(os.fsencode, given.lowers)), work)
    try:
        return (_convert if given.convert_to else _examine)(given, stack)
    except OSError as error:
        raise UserError(f"{given.upper}: {reason(error)}", code=LAYER) from error
    finally:
        stack.close()


def _examine(given: argparse.Namespace, stack: LayerStack) -> int:
    from unionfsd.doctor import examine

    found = list(examine(stack))
    if given.json:
        rows = [
            {
                "code": finding.code,
                "severity": "problem" if finding.is_problem else "note",
                "where": finding.where,
                "path": _text(finding.path),
                "detail": finding.detail,
            }
            for finding in found
        ]
        print(json.dumps({"findings": rows}, indent=2))
    else:
        for finding in found:
            print(finding.line)
    return NEGATIVE if any(finding.is_problem for finding in found) else OK


def _convert(given: argparse.Namespace, stack: LayerStack) -> int:
    from unionfsd.convert import convert

    steps = list(convert(stack, given.convert_to, apply=given.apply))
    if given.json:
        rows = [{"path": _text(path), "what": what, "error": error} for path, what, error in steps]
        print(json.dumps({"applied": given.apply, "steps": rows}, indent=2))
    else:
        for path, what, error in steps:
            state = "failed" if error else "done" if given.apply else "to do"
            print(f"{state}: {show.name(_text(path))}: {show.name(what)}" + (f": {error}" if error else ""))
    return NEGATIVE if any(step.error for step in steps) else OK


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
