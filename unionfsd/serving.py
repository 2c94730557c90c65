"""One mount while it is served: the transport, the control socket, the service manager, the signals.

Up: the transport answers; then the parent is told, and READY comes last. Down: unmounted, the transport returns, the
union is synced. A process that makes room for another leaves everything as it is.

trio is imported when something asks for it (`Channel.begin`), which takes longer than all the rest, by a thread, so
that nobody waits for it; and never for a mount that is gone before. Until the signal receiver is there the signals are
blocked, so that none can leave a dead mount behind.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from time import monotonic

from unionfsd import errors, keeper, steps, systemd
from unionfsd.errors import UserError
from unionfsd.fuse.mounting import Unmounted
from unionfsd.logger import get_logger, settle
from unionfsd.typed import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import trio

    from unionfsd.control.listener import Control
    from unionfsd.control.mounted import Mounted
    from unionfsd.fuse.mounting import Mount
    from unionfsd.keeper import Life
    from unionfsd.options import MountConfig
    from unionfsd.union import Union
    from unionfsd.will import Will

log = get_logger("unionfsd.daemon")  # as who reads the log has always known it

#: Seconds that a mount nobody asks anything of may do without the event loop: most that are made for a moment are gone.
_PATIENCE: Final = 5.0
_SOON: Final = 0.02
"""Seconds that whoever waited for the mount has for a first request, before anything is done that may wait."""
_LEAVING: Final = 1.0
"""Seconds that a busy mount which is to end has for those who leave it by themselves: those who waited for the end of a
freeze, processes that are ended together with us."""
_LOADING: Final = 60.0
_TURN: Final = 0.0005
"""Seconds that a thread which imports may keep one that serves waiting."""
_ONE_LIFE: Final = 1
"""What somebody who takes over from a service manager is told of how often others did: it was served before."""
_STOP_SIGNALS: Final = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
SIGNALS: Final = _STOP_SIGNALS | {keeper.MAKE_ROOM}
"""Blocked when a `Serving` runs, and heeded by it."""


def _never() -> bool:
    return False


class Transport(NamedTuple):
    """What serves the mount: `run` answers the kernel until it is gone, `quiesce` waits for what was begun.

    `resends`: whether the kernel sends again what a process has not answered when it ends.
    """

    run: Callable[[], Awaitable[None]]
    quiesce: Callable[[], Awaitable[None]]
    resends: Callable[[], bool] = _never


class Serving:
    """A mount that this process serves. `life` is None where there is no keeper; `will` is for a newer program."""

    def __init__(
        self,
        union: Union,
        mount: Mount,
        control: Control,
        config: MountConfig,
        life: Life | None,
        will: Will,
    ) -> None:
        self._union = union
        self._mount = mount
        self._control = control
        self._config = config
        self._life = life
        self._will = will
        self._up: Callable[[], None] = _nothing
        self._makes_room: int | None = None
        self._is_answering = False
        self._answering: trio.Event | None = None
        self._unsaid: str | None = None
        self._later = 0.0

    def run(self, up: Callable[[], None]) -> None:
        """Serve until the mount is gone; `up` is called once it answers, unless a process before this one said so."""
        self._up = up
        transport = self._transport()
        self._say()
        if transport is None:
            self._union.ledger.rest()  # what is left to do may take its time
            try:
                steps.run(self._union.shutdown())
            except OSError as error:
                raise _not_synced(None, error) from None
            return
        import trio

        settle()
        gc.freeze()
        gc.enable()
        try:
            trio.run(self._until_gone, transport)
        finally:
            self._let_go()

    def _started(self) -> None:
        """The transport answers."""
        where, life = os.fsdecode(self._config.mountpoint), self._life
        if life is None or not life.number:
            self._up()
            self._union.ledger.is_up()
            self._unsaid, self._later = where, monotonic() + _SOON
        else:
            log.warning("%s is served again", where)
        if systemd.listening():
            self._say()
            if life is not None and not life.number:
                from unionfsd import fdstore  # late: most mounts have no service manager

                fdstore.keep(self._will.estate(_ONE_LIFE))
            systemd.notify("READY=1", f"MAINPID={os.getpid() if life is None else life.keeper}")
        self._union.ledger.serving = self._is_answering = True
        if self._answering is not None:
            self._answering.set()

    def _let_go(self) -> None:
        """Copies that a service manager keeps would keep the mount from ending."""
        if self._life is not None and systemd.room_for_fds():
            from unionfsd import fdstore

            fdstore.let_go(self._will.estate(_ONE_LIFE))

    async def _wait_until_answering(self) -> None:
        import trio

        if not self._is_answering:
            self._answering = trio.Event()
            await self._answering.wait()

    def _transport(self) -> Transport | None:
        """What serves the mount. The channel has begun to when this returns, and may have ended already: None."""
        union, config, fuse_fd = self._union, self._config, self._mount.fuse_fd
        if config.transport == "pyfuse3":
            from unionfsd.fuse import libfuse

            return Transport(partial(libfuse.serve, union, fuse_fd, config, started=self._started), _settled)
        from unionfsd.fuse import channels

        serving = channels.channel(union, fuse_fd, config, self._started)
        if self._life is not None and self._life.number:
            serving.resume(union.resume(), self._life.refused)
        if self._union.stack.is_remote:
            # It starts a process, as whose the files of a layer that is open are closed, which may mean to wait.
            import trio  # noqa: F401
        # A service manager wants to hear from us, by the event loop.
        patience = 0.0 if systemd.listening() else _PATIENCE
        serving.begin(self._is_wanted, patience)
        if not serving.gone:
            _load_beside(lambda loaded: serving.begin(loaded, _LOADING))
        if serving.gone:
            serving.close()
            return None
        return Transport(serving.run, serving.quiesce, serving.resends)

    def _is_wanted(self) -> bool:
        """Whether somebody waits for the event loop."""
        if monotonic() > self._later:
            self._say()
        return self._control.asked() or not SIGNALS.isdisjoint(signal.sigpending())

    def _say(self) -> None:
        """Say that it is mounted, once there is time: whoever waited for that has a request coming."""
        if self._unsaid is not None:
            log.info("mounted on %s", self._unsaid)
            self._unsaid = None

    # In the event loop.

    async def _until_gone(self, transport: Transport) -> None:
        import trio

        from unionfsd.fuse.driver import drive

        async def attend() -> None:
            await self._wait_until_answering()
            self._say()
            if systemd.listening():
                from unionfsd import service

                nursery.start_soon(service.report, self._union)
            await self._serve_clients(transport)

        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(self._heed_signals, nursery, transport)
            try:
                nursery.start_soon(attend)
                await transport.run()
            except Exception as error:  # kept, because a nursery would wrap it
                failure = error
            nursery.cancel_scope.cancel()
        if self._makes_room is not None:
            os._exit(self._makes_room)  # all is somebody else's now: nothing is to be closed, synced or taken away
        self._union.ledger.rest()
        try:
            await drive(self._union.shutdown())
        except OSError as error:
            failure = _not_synced(failure, error)
        if failure is not None:
            raise failure

    async def _serve_clients(self, transport: Transport) -> None:
        """Serve the control socket, from its first client on: until then nothing is imported for it."""
        import trio

        listener, since = self._control.listener, monotonic()
        if listener is None:
            return
        await trio.lowlevel.wait_readable(listener.fd)
        try:
            with _in_turns():
                await trio.to_thread.run_sync(_load_control)
            from unionfsd.control.server import Server

            mounted = self._mounted(listener.path, since, transport)
            await Server(mounted, listener.gid).serve(listener.fd.fd)
        except Exception:
            log.exception("the control socket is served no longer")

    def _mounted(self, socket: bytes, since: float, transport: Transport) -> Mounted:
        import trio

        from unionfsd.control.mounted import Mounted
        from unionfsd.fuse.abi import Opcode
        from unionfsd.fuse.driver import drive, quiesce
        from unionfsd.fuse.notify import Notifier

        mount, config, life = self._mount, self._config, self._life

        async def all_ended() -> None:
            await transport.quiesce()
            await quiesce()

        async def unmount(lazy: bool) -> str:
            patience = _LEAVING if self._union.frozen else 0.0
            self._union.thaw()
            outcome = await trio.to_thread.run_sync(partial(mount.unmount, lazy=lazy, patience=patience))
            return {Unmounted.GONE: "gone", Unmounted.DETACHED: "detached"}.get(outcome, "busy")

        return Mounted(
            union=self._union,
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
            trial=self._will.trial,
            requests={opcode.value: opcode.name for opcode in Opcode},
        )

    def _make_room(self, code: int, service: trio.CancelScope, transport: Transport) -> None:
        """Leave the mount to another process: at once, or, where nobody would do it again, when what was begun is done.

        A large copy-up may take its time, and nobody is served meanwhile.
        """
        if transport.resends():
            os._exit(code)
        self._makes_room = code
        service.cancel()

    async def _heed_signals(
        self, nursery: trio.Nursery, transport: Transport, task_status: trio.TaskStatus[None]
    ) -> None:
        """Unmount at the first signal, which ends the transport once nobody is left inside; give up at the second.

        One that was sent to a whole group of processes comes twice, once passed on by the keeper, and counts once.
        SIGHUP, the end of a terminal, means to a service that it should reload.
        """
        import trio

        heeded = set(SIGNALS)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            heeded.remove(signal.SIGHUP)
        with trio.open_signal_receiver(*heeded) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            task_status.started()
            received, stopping = 0, False
            async for number in signals:
                if number == keeper.MAKE_ROOM:
                    if self._life is not None:
                        self._make_room(errors.OK, nursery.cancel_scope, transport)
                    continue
                if number == signal.SIGHUP and systemd.listening():
                    from unionfsd import service

                    service.reload()
                    continue
                log.info("stopping: %s", signal.Signals(number).name)
                received += 1
                if max(passed_on := self._union.ledger.signals, received - passed_on) > 1:
                    nursery.cancel_scope.cancel()
                elif not stopping:
                    stopping = True
                    systemd.notify("STOPPING=1")
                    nursery.start_soon(self._stop, nursery.cancel_scope, transport)

    async def _stop(self, service: trio.CancelScope, transport: Transport) -> None:
        """Leave the mount to the process that comes next, if the service manager starts one at once; or unmount."""
        import trio

        if self._life is not None and systemd.room_for_fds() and await trio.to_thread.run_sync(self._is_succeeded):
            log.info("restarting: the mount is left to the next process")
            self._make_room(keeper.LEFT, service, transport)
            return
        self._union.thaw()
        self._let_go()
        await self._unmount(service)

    def _is_succeeded(self) -> bool:
        """Whether a process comes that can take the mount over, by way of the service manager."""
        if not systemd.is_restarting():
            return False
        why = self._will.trial()
        if why is not None:
            log.warning("restarting, and unmounting: %s", why)
        return why is None

    async def _unmount(self, service: trio.CancelScope) -> None:
        """Unmount from a thread, because dirty pages are written to us meanwhile."""
        import trio

        unmount = partial(self._mount.unmount, patience=_LEAVING)
        outcome = await trio.to_thread.run_sync(unmount, abandon_on_cancel=True)
        if outcome is Unmounted.DETACHED:
            log.warning("busy: detached, and served until its last user leaves; a second signal ends it now")
        elif outcome is Unmounted.KEPT:
            service.cancel()


def load() -> None:
    """Import what is otherwise imported while a mount is served: for who takes over while another process serves."""
    import faulthandler  # noqa: F401

    import unionfsd.fuse.channels  # noqa: F401

    _load_loop()
    _load_control()


def _load_loop() -> None:
    import trio  # noqa: F401


def _load_control() -> None:
    import unionfsd.control.mounted
    import unionfsd.control.server
    import unionfsd.fuse.notify  # noqa: F401


def _load_beside(serve: Callable[[Callable[[], bool]], None]) -> None:
    """Load the event loop while `serve` serves, until it is told that this is done."""
    import threading  # late, as all of this

    loading = threading.Thread(target=_load_loop)
    with _in_turns():
        loading.start()
        serve(lambda: not loading.is_alive())
        loading.join()


@contextlib.contextmanager
def _in_turns() -> Iterator[None]:
    """Meanwhile threads take turns so often that one which serves is hardly kept waiting by one that does not."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _nothing() -> None:
    pass


async def _settled() -> None:
    """Nothing runs beside the event loop."""


def _not_synced(failure: Exception | None, error: OSError) -> Exception:
    what = f"the upper could not be synced: {errors.reason(error)}"
    return failure or UserError(what, hint="what was written last may be lost", code=errors.LAYER)
