"""The composition root: one mount from its configuration to its end, in the foreground or in a daemon of its own.

Up: layers opened and locked, mounted, served (`serving`); then standard streams released and the parent told. What
fails on the way up takes down what was up before it, so nothing is left mounted.

Unless `keeper=off`, the process forks once the mount is there: the child serves, the parent keeps the connection and
starts another when the child dies (`keeper`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
from collections.abc import Callable

from unionfsd import errors, estate, keeper, logger, serving, syscalls, systemd
from unionfsd.control.listener import Control
from unionfsd.errors import UserError
from unionfsd.fuse import mounting
from unionfsd.fuse.mounting import Mount
from unionfsd.logger import get_logger
from unionfsd.serving import SIGNALS, Serving
from unionfsd.typed import TYPE_CHECKING, NoReturn
from unionfsd.will import Will

if TYPE_CHECKING:
    from unionfsd.estate import Estate
    from unionfsd.keeper import Life
    from unionfsd.options import MountConfig
    from unionfsd.union import Union

log = get_logger(__name__)


def run(config: MountConfig, *, foreground: bool) -> int:
    """Mount and serve; returns an exit code.

    In the foreground it returns when the mount is gone, otherwise once it answers. Raises UserError when it cannot.
    """
    left = estate.left()
    if left is not None:
        return _take_over(config, left, foreground=foreground)
    if "LISTEN_FDS" in os.environ:
        left, config = _kept(config)
        if left is not None:
            return _take_over(config, left, foreground=foreground)
    if systemd.listening():
        mounting.clear_dead(config.mountpoint)  # one that could not be taken over, or that nobody kept
    mounting.check_mountpoint(config.mountpoint)
    if not foreground:
        return _in_background(config)
    _log(config, quiet=False)
    code = _attend(config, up=lambda: None, alone=lambda: None)
    return code if code >= 0 else 128 - code  # as a shell has it


def _take_over(config: MountConfig, left: Estate, *, foreground: bool) -> int:
    """Go on with a mount that is served; UserError, and it goes on as it is, when this program cannot."""
    from unionfsd.ledger import Ledger

    try:
        Ledger.adopt(syscalls.Fd(os.dup(left.ledger))).close()
    except OSError as error:
        raise estate.refused(errors.reason(error)) from None
    if left.trial:
        estate.stack_of(left, config)
        return errors.OK
    _log(config, quiet=not foreground)
    if not foreground:
        _log_to_syslog()
    code = _attend(config, up=lambda: None, alone=lambda: None, left=left)
    return code if code >= 0 else 128 - code


def _kept(config: MountConfig) -> tuple[Estate | None, MountConfig]:
    """What the service manager kept, if that is the mount to be served; otherwise it is taken away, with a warning.

    Whoever still uses what is taken away gets ENOTCONN.
    """
    from unionfsd import fdstore
    from unionfsd.ledger import Ledger

    kept = fdstore.Kept()
    if not kept:
        return None, config
    mount_id = None
    try:
        left = kept.estate()
        if mounting.has_ended(left.fuse):
            raise UserError("it has ended")
        mount_id = left.mount_id
        estate.check(left, config)
        ledger = Ledger.adopt(syscalls.Fd(os.dup(left.ledger)))
        ledger.forget_signals()
        ledger.close()
        return left, config
    except (UserError, OSError) as error:
        why = error.message if isinstance(error, UserError) else errors.reason(error)
    kept.give_up()
    if mount_id is not None:
        mounting.take_away(mount_id)
    warning = f"mounted anew, and not what the service manager kept: {why}"
    return None, config._replace(warnings=(*config.warnings, warning))


def check(config: MountConfig) -> None:
    """Raise UserError when it is plain that nothing can be mounted."""
    mounting.check_mountpoint(config.mountpoint)


# In the background. Over a pipe the child says how it went: an exit code as one byte, then the message to it.


def _in_background(config: MountConfig) -> int:
    receiver, sender = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        child(config, sender)
    os.close(sender)
    with open(receiver, "rb") as verdict:
        try:
            said = verdict.read()
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGTERM)  # it unmounts if it has mounted
            os.waitpid(pid, 0)
            raise
    if not said:
        raise _died(pid, config)
    if said[0] != errors.OK:
        raise UserError(said[1:].decode(), code=said[0])
    return errors.OK


def _died(pid: int, config: MountConfig) -> UserError:
    _, status = os.waitpid(pid, 0)
    mounting.clear_dead(config.mountpoint)
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return UserError(f"the daemon {how} before the mount was up", code=errors.INTERNAL)


def child(config: MountConfig, sender: int) -> NoReturn:
    """The daemon; it never returns to the caller's stack, whose clean-up belongs to the parent."""
    code = errors.INTERNAL
    try:
        code = _daemon(config, sender)
    finally:
        os._exit(code)


def _daemon(config: MountConfig, sender: int) -> int:
    os.setsid()
    os.environ.pop("FDSTORE", None)  # what is kept is for a process that stays in front
    _close_all_but(sender, config)
    told = False

    def up() -> None:
        nonlocal told
        os.write(sender, bytes([errors.OK]))
        alone()

    def alone() -> None:
        nonlocal told
        _log_to_syslog()
        _release_streams()
        os.close(sender)
        told = True

    try:
        _log(config, quiet=True)
        code = _attend(config, up=up, alone=alone)
    except Exception as error:
        from unionfsd.logs import explain

        code, message = explain(error)
        if told:
            log.critical("%s", message)
        else:
            os.write(sender, bytes([code]) + message.encode())
        return code
    if code < 0:
        _end_by(-code)
    return code


def _log(config: MountConfig, *, quiet: bool) -> None:
    """Log as `config` has it: from when there is something to say, if that is to standard error or nowhere."""

    def start() -> None:
        from unionfsd import logs

        logs.start(debug=config.debug, path=config.log, quiet=quiet, mountpoint=config.mountpoint)

    logger.configure(start)
    if config.debug or config.log is not None or "JOURNAL_STREAM" in os.environ:
        logger.settle()  # now it is known whether the file can be written to, and where standard error leads


def _log_to_syslog() -> None:
    def leave() -> None:
        from unionfsd import logs

        logs.to_syslog()

    logger.configure(leave)


def _end_by(number: int) -> None:
    """End as the process did that was to serve: whoever waits for us is told how it was."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    os.kill(os.getpid(), number)


def _close_all_but(sender: int, config: MountConfig) -> None:
    """Close what we inherited, a lock or a pipe of the caller's perhaps, but for the standard streams and our own.

    What `UNIONFSD_HOLD_FDS` names stays until we end: locks that say that the layers are in use (`images`).
    """
    held = os.environ.get("UNIONFSD_HOLD_FDS", "").split(",")
    keep = {0, 1, 2, sender, mounting.adoptable(config.mountpoint), *(int(fd) for fd in held if fd.isdigit())}
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in keep:
            with contextlib.suppress(OSError):  # the one that listed the others is closed already
                os.close(fd)


def _release_streams() -> None:
    """Point 0, 1 and 2 at /dev/null: whoever reads the other end waits for the last copy to be closed."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


# One mount.


def _attend(
    config: MountConfig, *, up: Callable[[], None], alone: Callable[[], None], left: Estate | None = None
) -> int:
    """Mount, or go on with what was `left`, and serve until the mount is gone; returns an exit code.

    `up` is called once it answers, by who serves; `alone` by a keeper, once somebody serves.
    """
    for warning in config.warnings:
        log.warning("%s", warning)
    directory = os.getcwd()
    _settle()
    gc.disable()  # until served: all that is imported stays, and looking through it took a tenth of the start
    from unionfsd.union import Union  # late: `--version` and wrong options need none of it

    with contextlib.ExitStack() as opened, contextlib.ExitStack() as stack:
        union = Union.mount(config, left)
        opened.callback(union.close)
        control = stack.enter_context(Control(config, taken=left is not None))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if left is not None and left.serving:
            serving.load()
        mount = mounting.mount(config) if left is None else mounting.adopt(left.fuse, left.mount_id)
        life: Life | None = None
        stack.callback(lambda: mount.end() if life is None else mount.close())  # the keeper has it still
        control.listen(mount.number)
        will = Will(union, mount, directory)
        if config.keeper == "on" and config.transport != "pyfuse3":
            kept = _keep(union, mount, control, alone, will, left)
            if isinstance(kept, keeper.Over):
                if kept.code == keeper.LEFT:
                    os._exit(errors.OK)  # the service manager has all that is to go on
                opened.pop_all()
                return kept.code  # what was mounted is taken away as by a daemon alone
            life = kept
        try:
            Serving(union, mount, control, config, life, will).run(up)
        except UserError:
            raise
        except Exception:
            if not union.ledger.up:
                raise
            log.exception("cannot go on serving")
            os._exit(keeper.CRASHED)
        opened.pop_all()  # the locks are given up; the rest the system closes in a tenth of the time as we end
    return errors.OK


def _keep(
    union: Union, mount: Mount, control: Control, alone: Callable[[], None], will: Will, left: Estate | None
) -> Life | keeper.Over:
    def unmount() -> None:
        if not os.fork():  # in a process of its own: the kernel asks the mount about what it unmounts
            mount.unmount()
            os._exit(errors.OK)

    listener = control.listener
    socket = None if listener is None else listener.fd.fd
    keeping = keeper.Keeper(union.ledger, mount.fuse_fd, socket, unmount, will.renew)
    return keeping.keep(alone) if left is None else keeping.keep(alone, left.serving, left.lives)


def _settle() -> None:
    """Make the process one that may run for years: no directory held, no umask, as many files as we may have."""
    os.chdir("/")
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
