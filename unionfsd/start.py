"""The program: by a spare process, if one is asked for and there, else by itself."""

import posix  # what `os` is made of: a spare makes do without that, see `spare`
import sys

from unionfsd import spare


def program() -> None:
    """The whole process."""
    try:
        said = spare.ask() if any(spare.OPTION in word for word in sys.argv) else None
    except KeyboardInterrupt:
        posix._exit(130)  # whom we asked cannot tell us, and takes down what it mounted
    if said is None:
        from unionfsd.cli import program as alone

        alone()
    if len(said) > 1:
        sys.stderr.write(f"unionfsd: {said[1:].decode(errors='backslashreplace')}\n")
        sys.stderr.flush()
    posix._exit(said[0])
