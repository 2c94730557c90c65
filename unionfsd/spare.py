"""Asking a spare process to mount, which has imported already what that takes: most of the time of a start.

For who runs the program again and again, as podman does. `sparing` is the other end.

Rules this file obeys:

- It is read before anything else: it imports nothing that takes time, `os` and `typing` included.
- A spare is of use or it is not. Whatever is in the way, this process goes on by itself, as without one.
- What the spare is told is all that the mount shall have of this process: its words, its environment, the directory
  it is in and its standard error. For the rest both are the same, which the spare sees to.
"""

import _socket  # what `socket` is made of; that takes as long as all the rest of this
import posix  # likewise what `os` is made of
import sys

OPTION = "spare="
#: Set where something is passed on that a spare does not have: descriptors, a service manager that looks at us.
_OURS = (b"UNIONFSD_HOLD_FDS", b"UNIONFSD_ESTATE", b"NOTIFY_SOCKET", b"LISTEN_FDS")
_SILENCE = 30.0


def address(directory: bytes) -> bytes:
    """Where the spare of this version and this mount namespace is, in a directory that is ours alone."""
    namespace = posix.stat("/proc/self/ns/mnt").st_ino
    program = posix.stat(__file__.rpartition("/")[0]).st_mtime_ns
    return b"%s/spare.%d.%x" % (directory, namespace, program)


def directory() -> bytes:
    """The directory for it, as that of control sockets is for most."""
    if posix.geteuid() == 0 and posix.getuid() == 0 and posix.access(b"/run", posix.W_OK):
        return b"/run/unionfsd"
    personal = posix.environ.get(b"XDG_RUNTIME_DIR", b"")
    return personal + b"/unionfsd" if personal[:1] == b"/" else b"/run/user/%d/unionfsd" % posix.geteuid()


def ask() -> bytes | None:
    """Have a spare mount what the command line says: its verdict, as `daemon` has it; None: there is none for us."""
    if any(name in posix.environ for name in _OURS):
        return None
    try:
        here = posix.open(".", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        try:
            return _ask(here)
        finally:
            posix.close(here)
    except OSError:
        return None


def _ask(here: int) -> bytes | None:
    settings = [b"%s=%s" % item for item in posix.environ.items()]
    words = [word.encode(sys.getfilesystemencoding(), "surrogateescape") for word in (*sys.orig_argv, *sys.argv)]
    message = b"\0".join((b"%d %d" % (len(sys.orig_argv), len(sys.argv)), *words, *settings))
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    try:
        client.connect(address(directory()))  # nobody else can put one there
        client.settimeout(_SILENCE)
        sent = client.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _ints(here, 2))])
        client.sendall(message[sent:])
        client.shutdown(_socket.SHUT_WR)
        client.settimeout(None)  # from here on it is at work: nobody else must be
        said = b""
        while True:
            more = client.recv(4096)
            if not more:
                return said or None
            said += more
    finally:
        client.close()


def _ints(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, sys.byteorder) for number in numbers)
