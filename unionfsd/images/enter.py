"""A program of its own: becomes the process that ``$UNIONFSD_ENTER`` describes, in the root that it names.

It uses nothing of the root but what it runs, which may be all that is there; and nothing of the environment that it
gives is in force before. Exit codes are a shell's: 127 for what is not there, 126 for what cannot be run.
"""

import json
import os
import signal
import sys
import warnings  # noqa: F401  the search for a program wants it, when there may be nothing to import it from

VARIABLE = "UNIONFSD_ENTER"


def main() -> int:
    given = json.loads(os.environ[VARIABLE])
    os.chroot(given["root"])
    try:
        os.makedirs(given["cwd"], mode=0o755, exist_ok=True)  # as Docker and podman do
        os.chdir(given["cwd"])
    except OSError as error:
        return _failed(given["cwd"], error, 126)
    os.setgroups(given["groups"])
    os.setgid(given["gid"])
    os.setuid(given["uid"])
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    words, environment = given["args"], dict(word.split("=", 1) for word in given["env"] if "=" in word)
    try:
        os.execvpe(words[0], words, environment)
    except FileNotFoundError as error:
        return _failed(words[0], error, 127)
    except OSError as error:
        return _failed(words[0], error, 126)


def _failed(what: str, error: OSError, code: int) -> int:
    print(f"unionfsctl: {what}: {error.strerror}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
