"""The composition root: one mount from its configuration to its end, in the foreground or in a daemon of its own.

Up: layers opened and locked, mounted, transport imported, served; then standard streams released, the parent told, and
READY last. Down: unmounted, the transport returns, the union synced and closed. What fails on the way up takes down
what was up before it, so nothing is left mounted.

Unless `keeper=off`, the process forks once the mount is there: the child serves, the parent keeps the connection and
starts another when the child dies (`keeper`).

The mount exists, and answers, before trio is imported (`Channel.begin`), which takes longer than all the rest: not
until something needs an event loop, and never for a mount that is gone before. Between mounting and the signal receiver
the signals that stop us are blocked, so that none can leave a dead mount behind.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from unionfsd import errors, keeper, logs, steps, systemd
from unionfsd.control.listener import Control
from unionfsd.errors import UserError
from unionfsd.fuse import mounting
from unionfsd.fuse.mounting import Mount, Unmounted

if TYPE_CHECKING:
    import trio

    from unionfsd.control.mounted import Mounted
    from unionfsd.keeper import Life
    from unionfsd.options import MountConfig
    from unionfsd.union import Union

log = logging.getLogger(__name__)

#: What the descriptor that serves a mount is called where a service manager keeps it.
_FUSE: Final = "fuse"
#: Seconds that a mount nobody asks anything of may do without the event loop: most that are made for a moment are gone.
_PATIENCE: Final = 5.0
_STOP_SIGNALS: Final = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


class Transport(NamedTuple):
    """What serves the mount: `run` answers the kernel until it is gone, `quiesce` waits for what was begun."""

    run: Callable[[], Awaitable[None]]
    quiesce: Callable[[], Awaitable[None]]


def run(config: MountConfig, *, foreground: bool) -> int:
    """Mount and serve; returns an exit code.

    In the foreground it returns when the mount is gone, otherwise once it answers. Raises UserError when it cannot.
    """
    mounting.check_mountpoint(config.mountpoint)
    if not foreground:
        return _in_background(config)
    logs.start(debug=config.debug, path=config.log, quiet=False, mountpoint=config.mountpoint)
    code = _attend(config, up=lambda: None, alone=lambda: None)
    return code if code >= 0 else 128 - code  # as a shell has it


# In the background. Over a pipe the child says how it went: an exit code as one byte, then the message to it.


def _in_background(config: MountConfig) -> int:
    receiver, sender = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _child(config, sender)
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


def _child(config: MountConfig, sender: int) -> NoReturn:
    """The daemon; it never returns to the caller's stack, whose clean-up belongs to the parent."""
    code = errors.INTERNAL
    try:
        code = _daemon(config, sender)
    finally:
        os._exit(code)


def _daemon(config: MountConfig, sender: int) -> int:
    os.setsid()
    _close_all_but(sender, config)
    told = False

    def up() -> None:
        nonlocal told
        os.write(sender, bytes([errors.OK]))
        alone()

    def alone() -> None:
        nonlocal told
        logs.to_syslog()
        _release_streams()
        os.close(sender)
        told = True

    try:
        logs.start(debug=config.debug, path=config.log, quiet=True, mountpoint=config.mountpoint)
        code = _attend(config, up=up, alone=alone)
    except Exception as error:
        code, message = logs.explain(error)
        if told:
            log.critical("%s", message)
        else:
            os.write(sender, bytes([code]) + message.encode())
        return code
    if code < 0:
        _end_by(-code)
    return code


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


def _attend(config: MountConfig, *, up: Callable[[], None], alone: Callable[[], None]) -> int:
    """Mount and serve until the mount is gone; returns an exit code.

    `up` is called once it answers, by who serves; `alone` by a keeper, once somebody serves.
    """
    for warning in config.warnings:
        log.warning("%s", warning)
    _settle()
    gc.disable()  # until served: all that is imported stays, and looking through it took a tenth of the start
    from unionfsd.union import Union  # late: `--version` and wrong options need none of it

    with contextlib.ExitStack() as stack:
        union = Union.mount(config)
        stack.callback(union.close)
        control = stack.enter_context(Control(config))
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        mount = mounting.mount(config)
        life: Life | None = None
        stack.callback(lambda: mount.end() if life is None else mount.close())  # the keeper has it still
        control.listen(mount.number)
        if config.keeper == "on" and config.transport != "pyfuse3":
            kept = _keep(union, mount, control, alone)
            if isinstance(kept, keeper.Over):
                return kept.code  # what was opened and mounted is closed and taken away as by a daemon alone
            life = kept
        try:
            _serve(union, mount, control, config, up, life)
        except UserError:
            raise
        except Exception:
            if not union.ledger.up:
                raise
            log.exception("cannot go on serving")
            os._exit(keeper.CRASHED)
    return errors.OK


def _keep(union: Union, mount: Mount, control: Control, alone: Callable[[], None]) -> Life | keeper.Over:
    def unmount() -> None:
        if not os.fork():  # in a process of its own: the kernel asks the mount about what it unmounts
            mount.unmount()
            os._exit(errors.OK)

    listener = control.listener
    keeping = keeper.Keeper(union.ledger, mount.fuse_fd, None if listener is None else listener.fd.fd, unmount)
    return keeping.keep(alone)


def _settle() -> None:
    """Make the process one that may run for years: no directory held, no umask, as many files as we may have."""
    os.chdir("/")
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(
    union: Union, mount: Mount, control: Control, config: MountConfig, up: Callable[[], None], life: Life | None
) -> None:
    answering = _Answering()

    def started() -> None:
        if life is None or not life.number:
            up()
            union.ledger.is_up()
            log.info("mounted on %s", os.fsdecode(config.mountpoint))
            systemd.notify("READY=1", f"MAINPID={os.getpid() if life is None else life.keeper}")
            if systemd.keeps_fds():
                systemd.store(_FUSE, mount.fuse_fd)
        else:
            log.warning("%s is served again", os.fsdecode(config.mountpoint))
        answering.set()

    transport = _transport(union, mount, control, config, started, life)
    if transport is None:
        try:
            steps.run(union.shutdown())
        except OSError as error:
            raise _not_synced(None, error) from None
        return
    import trio  # late: the mount is there already, see the head of this file

    gc.freeze()
    gc.enable()
    try:
        trio.run(_serve_until_gone, union, mount, control, config, transport, answering, life)
    finally:
        if systemd.keeps_fds():  # a copy that is kept would keep the mount from ending
            systemd.forget(_FUSE)


class _Answering:
    """Whether the mount answers, before there is an event loop to wait in."""

    def __init__(self) -> None:
        self._event: trio.Event | None = None
        self._set = False

    def set(self) -> None:
        self._set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        import trio

        if not self._set:
            self._event = trio.Event()
            await self._event.wait()


def _transport(
    union: Union,
    mount: Mount,
    control: Control,
    config: MountConfig,
    started: Callable[[], None],
    life: Life | None,
) -> Transport | None:
    """What serves the mount. The kernel channel has begun to when this returns, and may have ended already: None."""
    if config.transport == "pyfuse3":
        from unionfsd.fuse import libfuse

        return Transport(partial(libfuse.serve, union, mount.fuse_fd, config, started=started), _settled)
    from unionfsd.fuse import channel

    serving = channel.channel(union, mount.fuse_fd, config, started)
    if life is not None and life.number:
        serving.resume(union.resume(), life.refused)
    # A service manager wants to hear from us, by the event loop.
    patience = 0.0 if systemd.listening() else _PATIENCE
    serving.begin(lambda: control.asked() or not _STOP_SIGNALS.isdisjoint(signal.sigpending()), patience)
    if serving.gone:
        serving.close()
        return None
    return Transport(serving.run, serving.quiesce)


async def _settled() -> None:
    """Nothing runs beside the event loop."""


async def _serve_until_gone(
    union: Union,
    mount: Mount,
    control: Control,
    config: MountConfig,
    transport: Transport,
    answering: _Answering,
    life: Life | None,
) -> None:
    import trio

    from unionfsd.fuse.driver import drive

    async def attend() -> None:
        await answering.wait()
        if systemd.listening():
            from unionfsd import service

            nursery.start_soon(service.report, union)
        await _serve_clients(union, mount, control, config, transport, life)

    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, union, mount, nursery)
        try:
            nursery.start_soon(attend)
            await transport.run()
        except Exception as error:  # kept, because a nursery would wrap it
            failure = error
        nursery.cancel_scope.cancel()
    try:
        await drive(union.shutdown())
    except OSError as error:
        failure = _not_synced(failure, error)
    if failure is not None:
        raise failure


def _not_synced(failure: Exception | None, error: OSError) -> Exception:
    what = f"the upper could not be synced: {errors.reason(error)}"
    return failure or UserError(what, hint="what was written last may be lost", code=errors.LAYER)


async def _serve_clients(
    union: Union, mount: Mount, control: Control, config: MountConfig, transport: Transport, life: Life | None
) -> None:
    """Serve the control socket, from its first client on: until then nothing is imported for it."""
    import trio

    listener, since = control.listener, monotonic()
    if listener is None:
        return
    await trio.lowlevel.wait_readable(listener.fd)
    try:
        from unionfsd.control.server import Server

        mounted = _mounted(union, mount, listener.path, since, config, transport, life)
        await Server(mounted, listener.gid).serve(listener.fd.fd)
    except Exception:
        log.exception("the control socket is served no longer")


def _mounted(
    union: Union,
    mount: Mount,
    socket: bytes,
    since: float,
    config: MountConfig,
    transport: Transport,
    life: Life | None,
) -> Mounted:
    import trio

    from unionfsd.control.mounted import Mounted
    from unionfsd.fuse.abi import Opcode
    from unionfsd.fuse.driver import drive, quiesce
    from unionfsd.fuse.notify import Notifier

    async def all_ended() -> None:
        await transport.quiesce()
        await quiesce()

    async def unmount(lazy: bool) -> str:
        union.thaw()
        outcome = await trio.to_thread.run_sync(partial(mount.unmount, lazy=lazy))
        return {Unmounted.GONE: "gone", Unmounted.DETACHED: "detached"}.get(outcome, "busy")

    return Mounted(
        union=union,
        mount_id=None if mount.place is None else mount.place.mount_id,
        number=mount.number,
        transport="pyfuse3" if config.transport == "pyfuse3" else "channel",
        io="passthrough" if config.io == "passthrough" and config.transport != "pyfuse3" else "cached",
        socket=socket,
        since=since,
        notifier=Notifier(mount.fuse_fd),
        drive=drive,
        quiesce=all_ended,
        unmount=unmount,
        keeper=None if life is None else life.keeper,
        restarts=0 if life is None else life.number,
        requests={opcode.value: opcode.name for opcode in Opcode},
    )


async def _stop_on_signals(
    union: Union, mount: Mount, nursery: trio.Nursery, task_status: trio.TaskStatus[None]
) -> None:
    """Unmount at the first signal, which ends the transport once nobody is left inside; give up at the second.

    One that was sent to a whole group of processes comes twice, once passed on by the keeper, and counts once.

    SIGHUP, the end of a terminal, means to a service that it should reload.
    """
    import trio

    heeded = set(_STOP_SIGNALS)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        heeded.remove(signal.SIGHUP)
    with trio.open_signal_receiver(*heeded) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        task_status.started()
        received, stopping = 0, False
        async for number in signals:
            if number == signal.SIGHUP and systemd.listening():
                from unionfsd import service

                service.reload()
                continue
            log.info("stopping: %s", signal.Signals(number).name)
            received += 1
            if max(passed_on := union.ledger.signals, received - passed_on) > 1:
                nursery.cancel_scope.cancel()
            elif not stopping:
                stopping = True
                systemd.notify("STOPPING=1")
                union.thaw()
                nursery.start_soon(_unmount, mount, nursery.cancel_scope)


async def _unmount(mount: Mount, service: trio.CancelScope) -> None:
    """Unmount from a thread, because dirty pages are written to us meanwhile."""
    import trio

    outcome = await trio.to_thread.run_sync(mount.unmount, abandon_on_cancel=True)
    if outcome is Unmounted.DETACHED:
        log.warning("busy: detached, and served until its last user leaves; a second signal ends it now")
    elif outcome is Unmounted.KEPT:
        service.cancel()
