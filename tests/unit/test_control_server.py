"""The server of the control socket, over a union that is not mounted: who gets in, what is answered, what is borne."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unionfsd import steps, syscalls
from unionfsd.control import protocol, schema, server, shapes
from unionfsd.control.listener import Control
from unionfsd.control.methods import Methods
from unionfsd.control.mounted import Mounted
from unionfsd.control.protocol import Json
from unionfsd.control.server import Server, Toll
from unionfsd.errors import UserError
from unionfsd.fuse.driver import drive, quiesce
from unionfsd.options import MountConfig
from unionfsd.steps import FrozenError
from unionfsd.union import Caller, SetAttr, Union

pytestmark = pytest.mark.timeout(60)

Unmount = Callable[[bool], Awaitable[str]]


@dataclass
class Told:
    """A kernel that only listens."""

    said: list[tuple[object, ...]] = field(default_factory=list)
    old: bool = False

    async def inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool:
        self.said.append(("inode", nodeid, offset))
        return True

    async def hand_over(self, nodeids: list[int]) -> None:
        self.said.append(("hand over", *nodeids))

    async def inval_entry(self, parent: int, name: bytes) -> bool:
        self.said.append(("entry", parent, name))
        return True

    async def prune(self, nodeids: list[int]) -> bool:
        return self._new("prune", *nodeids)

    async def inc_epoch(self) -> bool:
        return self._new("epoch")

    def _new(self, *what: object) -> bool:
        if self.old:
            raise OSError(22, "Invalid argument")
        self.said.append(what)
        return True


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    for name in ("lower", "upper", "work", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/a").write_text("a")
    (tmp_path / "lower/d").mkdir()
    (tmp_path / "upper/new").write_text("new")
    return tmp_path


def config_of(layers: Path) -> MountConfig:
    return MountConfig(
        lowerdirs=(bytes(layers / "lower"),),
        upperdir=bytes(layers / "upper"),
        workdir=bytes(layers / "work"),
        mountpoint=bytes(layers / "mnt"),
        explicit=frozenset(["lowerdir", "upperdir", "workdir"]),
        control=bytes(layers / "socket"),
    )


class Served:
    """A server at work: `connect` gives clients of it."""

    def __init__(self, mounted: Mounted, path: Path, told: Told) -> None:
        self.mounted = mounted
        self.path = path
        self.told = told
        self.peers: list[Peer] = []

    async def connect(self) -> Peer:
        peer = Peer(await trio.open_unix_socket(self.path))
        self.peers.append(peer)
        return peer


class Peer:
    """A client that can also misbehave."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def line(self) -> Json:
        """The next message; None when the server has hung up."""
        while b"\n" not in self._buffer:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def call(self, method: str, **params: Json) -> Json:
        await self.stream.send_all(protocol.encode(protocol.call(method, params, 1)))
        return await self.line()


@asynccontextmanager
async def serving(
    layers: Path, *, gid: int | None = None, mount_id: int | None = 1, unmount: Unmount | None = None
) -> AsyncIterator[Served]:
    """A server of a union over `layers`; its clients are closed with it."""
    union = Union.mount(config_of(layers))
    told = Told()
    mounted = Mounted(
        union=union,
        mount_id=mount_id,
        number=(1 << 20) - 1,  # of nothing
        transport="channel",
        io="cached",
        socket=bytes(layers / "socket"),
        since=monotonic(),
        notifier=told,
        drive=drive,
        quiesce=quiesce,
        unmount=unmount or _unmount,
        requests={1: "LOOKUP"},
    )
    served = Served(mounted, layers / "socket", told)
    with Control(union.config) as control:
        control.listen(None)
        assert control.listener is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(mounted, gid).serve, control.listener.fd.fd)
            yield served
            nursery.cancel_scope.cancel()
    for peer in served.peers:
        peer.stream.socket.close()
    union.close()


async def _unmount(lazy: bool) -> str:
    return "detached" if lazy else "busy"


def fits(value: Json, like: shapes.Schema) -> bool:
    """Whether a value is as a JSON Schema says, of the kinds that the table has."""
    if "anyOf" in like:
        return any(fits(value, option) for option in like["anyOf"])
    if "enum" in like and value not in like["enum"]:
        return False
    match like.get("type"):
        case None:
            return True
        case "null":
            return value is None
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "array":
            return isinstance(value, list) and all(fits(item, like["items"]) for item in value)
        case _:
            return isinstance(value, dict) and fields_fit(value, like)


def fields_fit(value: dict[str, Json], like: shapes.Schema) -> bool:
    known = like.get("properties", {})
    others = like.get("additionalProperties", True)
    if not value.keys() >= set(like.get("required", ())):
        return False
    if others is False:
        return value.keys() == known.keys() and all(fits(value[name], known[name]) for name in known)
    return others is True or all(fits(item, others) for item in value.values())


@pytest.mark.parametrize("method", schema.METHODS, ids=lambda method: method.name)
async def test_a_result_is_as_the_table_says(layers: Path, method: schema.Method) -> None:
    async with serving(layers) as served:
        peer = await served.connect()
        answer = await peer.call(method.name, **{param.name: "/a" for param in method.params if param.required})
        if method.name == "reexec":  # nobody keeps this mount: tests/system/test_survival.py
            assert answer["error"]["code"] == protocol.UNSUPPORTED
            return
        assert "result" in answer, answer
        assert fits(answer["result"], method.result), answer["result"]


async def test_status_says_what_the_mount_is(layers: Path) -> None:
    async with serving(layers) as served:
        status = (await (await served.connect()).call("status"))["result"]
    assert status["mountpoint"] == str(layers / "mnt")
    assert status["pid"] == os.getpid()
    assert status["socket"] == str(layers / "socket")
    assert [layer["path"] for layer in status["layers"]] == [str(layers / "upper"), str(layers / "lower")]
    assert status["options"]["upperdir"] == str(layers / "upper")


async def test_explain_names_the_layer(layers: Path) -> None:
    async with serving(layers) as served:
        peer = await served.connect()
        given_by = (await peer.call("explain", path="/a"))["result"]
        absent = (await peer.call("explain", path="/nope"))["result"]
        wrong = (await peer.call("explain", path="/a/../b"))["error"]
    assert given_by["layer"] == {"index": 1, "role": "lower", "path": str(layers / "lower")}
    assert given_by["source"] == str(layers / "lower/a")
    assert (absent["exists"], absent["copies"]) == (False, [])
    assert (wrong["code"], wrong["data"]) == (protocol.FAILED, {"errno": "EINVAL"})


async def test_diff_is_cut_at_its_limit_and_streamed_without_one(layers: Path) -> None:
    for number in range(600):
        (layers / "upper" / f"{number:03}").touch()
    async with serving(layers) as served:
        peer = await served.connect()
        cut = (await peer.call("diff", limit=5))["result"]
        assert (len(cut["items"]), cut["truncated"], cut["counts"]) == (5, True, {"added": 601})
        items = []
        message = await peer.call("diff", stream=True)
        while "method" in message:
            assert (message["method"], message["params"]["id"]) == ("items", 1)
            items += message["params"]["items"]
            message = await peer.line()
        assert (len(items), message["result"]["items"], message["result"]["truncated"]) == (601, [], False)


async def test_events_are_told_and_followed(layers: Path) -> None:
    async with serving(layers) as served:
        union, peer, follower = served.mounted.union, await served.connect(), await served.connect()
        before = (await peer.call("events"))["result"]
        assert ([event["kind"] for event in before["events"]], before["lost"]) == (["start"], 0)
        await follower.stream.send_all(protocol.encode(protocol.call("events", {"follow": True, "path": "/d"}, 5)))
        while (await peer.call("stats"))["result"]["control"]["calls"] < 3:  # noqa: ASYNC110
            await trio.sleep(0.001)
        directory = union.lookup(union.root, b"d").nodeid
        union.mkdir(union.root, b"other", 0o755, CALLER)
        union.mkdir(directory, b"\xff", 0o755, CALLER)
        steps.run(union.rename(directory, b"\xff", union.root, b"moved", 0))
        union.rmdir(union.root, b"moved")
        told = await follower.line()
        assert (told["method"], told["params"]["id"], told["params"]["lost"]) == ("events", 5, 0)
        found = [(event["kind"], event["path"], event["to"]) for event in told["params"]["events"]]
        assert found == [("copy-up", "/d", None), ("mkdir", "/d/\udcff", None), ("rename", "/d/\udcff", "/moved")]
        after = (await peer.call("events", since=before["next"], limit=2))["result"]
        assert [event["kind"] for event in after["events"]] == ["mkdir", "copy-up"]
        rest = (await peer.call("events", since=after["next"]))["result"]
        assert [event["kind"] for event in rest["events"]] == ["mkdir", "rename", "rmdir"]
        numbers = [event["number"] for event in before["events"] + after["events"] + rest["events"]]
        assert numbers == list(range(1, 7))
        assert all(
            fits(event, schema.BY_NAME["events"].result["properties"]["events"]["items"])
            for event in (*after["events"], *rest["events"], *told["params"]["events"])
        )


async def test_a_follower_that_does_not_read_is_told_what_it_missed(layers: Path) -> None:
    async with serving(layers) as served:
        events, follower = served.mounted.union.events, await served.connect()
        await follower.stream.send_all(protocol.encode(protocol.call("events", {"follow": True}, 5)))
        while not events.recording:  # noqa: ASYNC110
            await trio.sleep(0.001)
        for _ in range(60):
            for number in range(200):
                events.record("create", b"/" + b"%0200d" % number)
            await trio.sleep(0.001)
        seen, lost = 0, 0
        while seen + lost < 12000:
            message = (await follower.line())["params"]
            seen, lost = seen + len(message["events"]), lost + message["lost"]
        assert seen + lost == message["next"] - 2
        assert lost > 0


async def test_a_copy_up_under_way_says_how_far_it_is(layers: Path) -> None:
    (layers / "lower/large").write_bytes(b"x" * 300_000)
    async with serving(layers) as served:
        union, peer = served.mounted.union, await served.connect()
        assert (await peer.call("work"))["result"] == {"work": []}
        op = union.write(union.lookup(union.root, b"large").nodeid, b"y", 0)
        step = op.send(None)
        assert isinstance(step, steps.Blocking)
        (work,) = (await peer.call("work"))["result"]["work"]
        assert (work["kind"], work["path"], work["done"], work["total"]) == ("copy-up", "/large", 0, 300_000)
        copied = step.fn()
        (work,) = (await peer.call("work"))["result"]["work"]
        assert work["done"] == 300_000
        with pytest.raises(StopIteration):
            op.send(copied)
        assert (await peer.call("work"))["result"] == {"work": []}


async def test_hot_paths_are_those_that_were_asked_about(layers: Path) -> None:
    async with serving(layers) as served:
        union, peer = served.mounted.union, await served.connect()
        node = union.lookup(union.root, b"a").nodeid
        union.counters.sample(node)
        assert (await peer.call("hot"))["result"] == {"samples": 0, "paths": []}
        for nodeid in (node, node, union.root, 1234):
            union.counters.sample(nodeid)
        hot = (await peer.call("hot", limit=2))["result"]
        assert (hot["samples"], hot["paths"][0]) == (4, {"path": "/a", "samples": 2})
        assert len(hot["paths"]) == 2
        for _ in range(30_000):
            union.counters.sample(node)
        assert union.counters.samples is None  # nobody looks
        assert (await peer.call("hot"))["result"]["samples"] == 0


async def test_calls_batches_and_notifications(layers: Path) -> None:
    async with serving(layers) as served:
        peer = await served.connect()
        await peer.stream.send_all(
            b'{"jsonrpc":"2.0","method":"nope"}\n\n'
            b'{"jsonrpc":"2.0","method":"nope","id":1}\n'
            b'[{"jsonrpc":"2.0","method":"sync","id":2},5,{"jsonrpc":"2.0","method":"log"}]\n'
            b'[{"jsonrpc":"2.0","method":"log"}]\n'
            b'{"jsonrpc":"2.0","method":"sync","id":null}\n'
        )
        assert (await peer.line())["error"]["code"] == protocol.METHOD_NOT_FOUND
        good, bad = await peer.line()
        assert (good["id"], bad["id"], bad["error"]["code"]) == (2, None, protocol.INVALID_REQUEST)
        assert (await peer.line())["id"] is None


async def test_a_client_that_stopped_sending_is_answered(layers: Path) -> None:
    async with serving(layers) as served:
        peer = await served.connect()
        await peer.stream.send_all(b'{"jsonrpc":"2.0","method":"diff","id":1}')  # without a line end, too
        await peer.stream.send_eof()
        assert (await peer.line())["id"] == 1
        assert await peer.line() is None


async def test_a_defect_is_an_answer_and_the_next_call_is_served(
    layers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(self: Methods, call: object) -> Json:
        raise KeyError("a defect")

    monkeypatch.setattr(Methods, "stats", fail)
    async with serving(layers) as served:
        peer = await served.connect()
        assert (await peer.call("stats"))["error"]["code"] == protocol.INTERNAL_ERROR
        assert "a defect" in caplog.text
        assert "result" in await peer.call("status")


# Who gets in.


async def test_strangers_are_refused(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "credentials", lambda sock: server.Peer(os.geteuid() + 1, frozenset([7])))
    async with serving(layers) as served:
        peer = await served.connect()
        answer = await peer.line()
        assert (answer["error"]["code"], answer["id"]) == (protocol.REFUSED, None)
        assert await peer.line() is None


@pytest.mark.parametrize(
    ("peer", "gid", "welcome"),
    [
        (server.Peer(0, frozenset([9])), None, True),
        (server.Peer(os.geteuid(), frozenset([9])), None, True),
        (server.Peer(4243, frozenset([9, 77])), 77, True),
        (server.Peer(4243, frozenset([9])), 77, False),
        (server.Peer(4243, frozenset([9])), None, False),
    ],
)
async def test_the_owner_root_and_the_group_get_in(
    layers: Path, monkeypatch: pytest.MonkeyPatch, peer: server.Peer, gid: int | None, welcome: bool
) -> None:
    monkeypatch.setattr(server, "credentials", lambda sock: peer)
    async with serving(layers, gid=gid) as served:
        assert ("result" in await (await served.connect()).call("status")) is welcome


async def test_the_kernel_says_who_a_peer_is() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = server.credentials(trio.socket.from_stdlib_socket(ours))
    assert found == server.Peer(os.geteuid(), frozenset([os.getegid(), *os.getgroups()]))


# What is borne.


async def refused(peer: Peer) -> int:
    code: int = (await peer.line())["error"]["code"]
    return code


async def test_a_line_that_is_too_long_ends_the_connection(layers: Path) -> None:
    async with serving(layers) as served:
        peer = await served.connect()
        await peer.stream.send_all(b" " * protocol.MAX_FRAME)
        assert await refused(peer) == protocol.INVALID_REQUEST
        assert await peer.line() is None
        assert "result" in await (await served.connect()).call("status")


async def test_a_client_that_stalls_in_a_line_is_dropped(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FRAME_SECONDS", 0.3)
    async with serving(layers) as served:
        peer = await served.connect()
        with trio.fail_after(5):
            start = trio.current_time()
            for byte in b'{"jsonrpc"' * 100:  # a byte now and then does not keep the line going
                try:
                    await peer.stream.send_all(bytes([byte]))
                except trio.BrokenResourceError:
                    break
                await trio.sleep(0.05)
        assert trio.current_time() - start < 3


async def test_an_idle_client_is_dropped(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    async with serving(layers) as served:
        peer = await served.connect()
        with trio.fail_after(5):
            assert await peer.line() is None


async def test_a_client_that_does_not_read_is_dropped(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SEND_SECONDS", 0.3)
    for number in range(3000):
        (layers / "upper" / f"{number:0200}").touch()
    async with serving(layers) as served:
        peer = await served.connect()
        await peer.stream.send_all(protocol.encode(protocol.call("diff", {"stream": True}, 1)))
        other = await served.connect()
        await alone(other)


async def alone(peer: Peer) -> None:
    """Wait until the server has no other client."""
    with trio.fail_after(20):
        while (await peer.call("stats"))["result"]["control"]["clients"] > 1:
            await trio.lowlevel.checkpoint()


async def test_a_client_that_hangs_up_ends_its_call(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOOK", 0.05)
    ended = trio.Event()

    async def wait(self: Methods, call: object, **params: object) -> Json:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    monkeypatch.setattr(Methods, "diff", wait)
    async with serving(layers) as served:
        peer = await served.connect()
        await peer.stream.send_all(b'{"jsonrpc":"2.0","method":"diff","id":1}\n')
        await trio.sleep(0.1)
        assert not ended.is_set()
        await peer.stream.aclose()
        with trio.fail_after(5):
            await ended.wait()


async def test_a_walk_stops_when_its_client_hangs_up(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOOK", 0.05)
    for number in range(2000):
        (layers / "upper" / f"{number:0200}").touch()
    async with serving(layers) as served:
        for _ in range(8):  # more than there are threads for walks
            peer = await served.connect()
            await peer.stream.send_all(protocol.encode(protocol.call("diff", {"stream": True}, 1)))
            await peer.line()
            await peer.stream.aclose()
        with trio.fail_after(20):
            assert "result" in await (await served.connect()).call("explain", path="/a")


async def test_the_most_idle_client_makes_room(layers: Path) -> None:
    async with serving(layers) as served:
        peers = [await served.connect() for _ in range(server.MAX_CLIENTS)]
        for peer in peers:
            await peer.call("status")
        await peers[0].call("status")
        newcomer = await served.connect()
        assert "result" in await newcomer.call("status")
        assert await peers[1].line() is None
        assert "result" in await peers[0].call("status")


async def test_a_flood_leaves_the_loop_to_others(layers: Path) -> None:
    """While clients send as fast as they can, another task of the loop has nearly all of its time."""
    async with serving(layers) as served, trio.open_nursery() as nursery:

        async def flood() -> None:
            peer = await served.connect()
            while True:
                await peer.stream.send_all(b'{"jsonrpc":"2.0","method":"status","id":1}\n' * 20)
                for _ in range(20):
                    await peer.line()

        for _ in range(4):
            nursery.start_soon(flood)
        await trio.sleep(0.5)
        longest = 0.0
        turns = 0
        before = (await (await served.connect()).call("stats"))["result"]["control"]["calls"]
        end = trio.current_time() + 1
        while trio.current_time() < end:
            start = trio.current_time()
            await trio.lowlevel.checkpoint()
            longest = max(longest, trio.current_time() - start)
            turns += 1
        calls = (await (await served.connect()).call("stats"))["result"]["control"]["calls"] - before
        nursery.cancel_scope.cancel()
    assert calls < 1200
    assert turns > 1000
    assert longest < 0.3


async def test_the_toll_is_a_share_of_the_time() -> None:
    toll = Toll(0.1, 0.0)
    await toll.pay()
    start = trio.current_time()
    for _ in range(20):
        await toll.pay()
    assert trio.current_time() - start >= 20 * server._PER_CALL / 0.1 * 0.9


frames = st.one_of(
    st.binary(max_size=300),
    st.sampled_from([method.name for method in schema.METHODS if not method.acts]).flatmap(
        lambda name: st.dictionaries(
            st.sampled_from(["path", "limit", "stream", "progress", "depth", "x"]),
            st.one_of(
                st.none(), st.booleans(), st.integers(), st.text(max_size=9), st.lists(st.integers(), max_size=2)
            ),
        ).map(lambda params: json.dumps({"jsonrpc": "2.0", "id": 1, "method": name, "params": params}).encode())
    ),
    st.sampled_from([b"[[[[", b"\0", b"{}", b"[]", b"null", b'{"jsonrpc":"2.0","method":"status","id":{}}']),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=st.lists(frames, max_size=6), ending=st.sampled_from(["close", "eof", "reset", "cut"]))
def test_whatever_is_sent_the_server_serves_on(
    tmp_path_factory: pytest.TempPathFactory, conversation: list[bytes], ending: str
) -> None:
    layers = tmp_path_factory.mktemp("layers")
    for name in ("lower", "upper", "work", "mnt"):
        (layers / name).mkdir()

    async def talk() -> None:
        async with serving(layers) as served:
            peer = await served.connect()
            try:
                for frame in conversation:
                    await peer.stream.send_all(frame + b"\n")
                await END[ending](peer)
            except trio.BrokenResourceError:
                pass
            with trio.fail_after(10):
                other = await served.connect()
                assert "result" in await other.call("status")
                if ending == "eof":
                    while await peer.line() is not None:
                        pass
                else:
                    await peer.stream.aclose()
                await alone(other)

    trio.run(talk)


async def _reset(peer: Peer) -> None:
    linger = struct.pack("ii", 1, 0)
    peer.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    await peer.stream.aclose()


async def _cut(peer: Peer) -> None:
    await peer.stream.send_all(b'{"jsonrpc":"2.0","method":"diff"')
    await peer.stream.aclose()


END: dict[str, Callable[[Peer], Awaitable[None]]] = {
    "close": lambda peer: peer.stream.aclose(),
    "eof": lambda peer: peer.stream.send_eof(),
    "reset": _reset,
    "cut": _cut,
}


# Acting.


async def test_what_acts_is_answered_although_the_server_ends(layers: Path) -> None:
    """`unmount` ends the mount and with it the server, and is answered all the same."""
    ending = trio.CancelScope()

    async def unmount(lazy: bool) -> str:
        ending.cancel()
        await trio.sleep(0.05)
        return "gone"

    with socket.socket(socket.AF_UNIX) as client:
        with ending:
            async with serving(layers, unmount=unmount) as served:
                client.connect(str(served.path))
                client.sendall(b'{"jsonrpc":"2.0","method":"unmount","id":1}\n')
                await trio.sleep_forever()
        assert json.loads(client.recv(4096)) == {"jsonrpc": "2.0", "result": {"result": "gone"}, "id": 1}


async def test_unmounting_what_others_mounted_is_not_for_us(layers: Path) -> None:
    async with serving(layers, mount_id=None) as served:
        answer = await (await served.connect()).call("unmount")
    assert answer["error"]["code"] == protocol.UNSUPPORTED


async def test_the_level_of_the_log(layers: Path) -> None:
    async with serving(layers) as served:
        peer = await served.connect()
        before = (await peer.call("log"))["result"]["level"]
        assert (await peer.call("log", level="debug"))["result"] == {"level": "debug", "before": before}
        assert (await peer.call("log", level=before))["result"]["before"] == "debug"
        assert (await peer.call("log", level="loud"))["error"]["code"] == protocol.INVALID_PARAMS


CALLER = Caller(0, 0, 1, 0o022)


def changed_now(union: Union) -> bool:
    """Whether a change may begin."""
    try:
        union.mkdir(union.root, b"probe", 0o755, CALLER)
    except FrozenError:
        return False
    union.rmdir(union.root, b"probe")
    return True


async def test_a_freeze_lasts_until_the_thaw(layers: Path) -> None:
    async with serving(layers) as served:
        union = served.mounted.union
        peer = await served.connect()
        assert (await peer.call("freeze", timeout=50))["result"]["thaws_in"] == 50
        assert (await peer.call("status"))["result"]["frozen"]
        assert not changed_now(union)
        assert union.lookup(union.root, b"a").attr.st.st_size == 1
        assert (await peer.call("freeze"))["error"]["code"] == protocol.BUSY
        assert (await peer.call("thaw"))["result"]["frozen_for"] > 0
        assert changed_now(union)
        assert (await peer.call("thaw"))["result"]["frozen_for"] == 0


async def test_a_freeze_ends_with_its_time(layers: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(layers) as served:
        union = served.mounted.union
        peer = await served.connect()
        for _ in range(2):
            await peer.call("freeze", timeout=0.2)
            assert not changed_now(union)
            await trio.sleep(0.3)
            assert changed_now(union)
        await peer.call("freeze", timeout=0.2)
        await peer.call("thaw")
        await peer.call("freeze", timeout=30)
        await trio.sleep(0.3)
        assert not changed_now(union)
        await peer.call("thaw")
    assert caplog.text.count("thawed") == 2


async def test_a_freeze_waits_for_what_is_under_way(layers: Path) -> None:
    """A copy-up that had begun is done when the freeze is."""
    async with serving(layers) as served, trio.open_nursery() as nursery:
        union = served.mounted.union
        nodeid = union.lookup(union.root, b"a").nodeid
        nursery.start_soon(drive, union.write(nodeid, b"b", 0))
        await trio.lowlevel.checkpoint()
        await (await served.connect()).call("freeze")
        assert (layers / "upper/a").read_text() == "b"
        union.thaw()


async def test_a_freeze_that_cannot_sync_is_none(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    async with serving(layers) as served:
        monkeypatch.setattr(syscalls, "syncfs", fail)
        answer = await (await served.connect()).call("freeze")
        assert answer["error"]["data"] == {"errno": "EIO"}
        assert changed_now(served.mounted.union)


def changes_of(union: Union, nodeid: int) -> dict[str, Callable[[], object]]:
    """Every operation that changes something."""
    root = union.root
    run = steps.run
    return {
        "mknod": lambda: union.mknod(root, b"x", 0o100644, 0, CALLER),
        "mkdir": lambda: union.mkdir(root, b"x", 0o755, CALLER),
        "symlink": lambda: union.symlink(root, b"x", b"y", CALLER),
        "unlink": lambda: run(union.unlink(root, b"a")),
        "rmdir": lambda: union.rmdir(root, b"d"),
        "link": lambda: run(union.link(nodeid, root, b"x")),
        "rename": lambda: run(union.rename(root, b"a", root, b"x", 0)),
        "create": lambda: run(union.create(root, b"x", 0o644, os.O_RDWR, CALLER)),
        "tmpfile": lambda: run(union.tmpfile(root, 0o644, os.O_RDWR, CALLER)),
        "setattr": lambda: run(union.setattr(nodeid, SetAttr(mode=0o600), CALLER)),
        "setxattr": lambda: run(union.setxattr(nodeid, b"user.x", b"1", 0)),
        "removexattr": lambda: run(union.removexattr(nodeid, b"user.x")),
        "open": lambda: run(union.open(nodeid, os.O_RDWR)),
        "write": lambda: run(union.write(nodeid, b"x", 0)),
        "fallocate": lambda: run(union.fallocate(nodeid, 0, 0, 10)),
        "ioctl": lambda: run(union.ioctl(nodeid, syscalls.FS_IOC_SETFLAGS, bytes(8))),
        "copy_file_range": lambda: run(union.copy_file_range(nodeid, 0, nodeid, 0, 1)),
    }


def test_nothing_changes_while_frozen(layers: Path) -> None:
    union = Union.mount(config_of(layers))
    nodeid = union.lookup(union.root, b"a").nodeid
    before = sorted(os.listdir(layers / "upper"))
    union.freeze()
    for name, change in changes_of(union, nodeid).items():
        with pytest.raises(FrozenError):
            change()
        assert sorted(os.listdir(layers / "upper")) == before, name
    union.thaw()
    steps.run(union.write(nodeid, b"x", 0))
    union.close()


@pytest.mark.parametrize("old", [False, True])
async def test_refresh_looks_again_and_tells_the_kernel(layers: Path, old: bool) -> None:
    (layers / "lower/d/same").write_text("same")
    (layers / "lower/d/other").write_text("before")
    (layers / "lower/d/gone").write_text("gone")
    async with serving(layers) as served:
        union = served.mounted.union
        served.told.old = old
        parent = union.lookup(union.root, b"d").nodeid
        same, other, _ = (union.lookup(parent, name).nodeid for name in (b"same", b"other", b"gone"))
        with pytest.raises(FileNotFoundError):
            union.lookup(parent, b"come")
        (layers / "lower/d/gone").unlink()
        (layers / "lower/d/come").write_text("come")
        (layers / "lower/d/fresh").write_text("after")
        (layers / "lower/d/fresh").rename(layers / "lower/d/other")
        peer = await served.connect()
        assert (await peer.call("refresh", path="/d"))["result"] == {"nodes": 3, "replaced": 2, "kernel": not old}
        assert union.lookup(parent, b"same").nodeid == same
        assert union.lookup(parent, b"other").nodeid != other
        union.lookup(parent, b"come")
        with pytest.raises(FileNotFoundError):
            union.lookup(parent, b"gone")
    said = set(served.told.said)
    assert {("inode", parent, 0), ("inode", same, 0), ("entry", parent, b"gone"), ("entry", parent, b"other")} <= said
    assert (("entry", parent, b"come") in said) is old
    assert (("epoch",) in said) is not old


async def test_refresh_of_everything_finds_directories_that_became_files(layers: Path) -> None:
    async with serving(layers) as served:
        union = served.mounted.union
        union.lookup(union.root, b"d")
        union.lookup(union.root, b"a")
        (layers / "lower/d").rmdir()
        (layers / "lower/d").write_text("file now")
        result = (await (await served.connect()).call("refresh"))["result"]
        assert (result["nodes"], result["replaced"]) == (2, 1)
        found = union.lookup(union.root, b"d")
        assert found.attr.st.st_size == len("file now")


async def test_dropping_caches_closes_descriptors_and_forgets_names(layers: Path) -> None:
    (layers / "lower/d/e").mkdir()
    async with serving(layers) as served:
        union = served.mounted.union
        nodeid = union.lookup(union.lookup(union.root, b"d").nodeid, b"e").nodeid
        list(union.listdir(nodeid, 0))
        before = union.holdings()
        result = (await (await served.connect()).call("drop_caches"))["result"]
        assert result["fds"] == before.cached_fds > 0
        assert result["names"] > 0
        assert union.holdings().cached_fds == 0
        assert union.getattr(nodeid).nlink > 0
        assert ("prune", *union.memory.nodeids()) in served.told.said


# Where it is.


def listening(config: MountConfig, number: int | None) -> Control:
    control = Control(config)
    control.listen(number)
    return control


def test_a_socket_appears_with_its_mode_and_goes(layers: Path) -> None:
    with listening(config_of(layers), None) as control:
        assert control.listener is not None
        assert (layers / "socket").stat().st_mode & 0o777 == 0o600
        assert os.listdir(layers).count("socket") == 1
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(layers / "socket"))
        client.close()
    assert not (layers / "socket").exists()
    assert sorted(os.listdir(layers)) == ["lower", "mnt", "upper", "work"]


def test_a_group_may_be_let_in(layers: Path) -> None:
    with listening(config_of(layers)._replace(control_group="54321"), None) as control:
        st = (layers / "socket").stat()
        assert (st.st_mode & 0o777, st.st_gid) == (0o660, 54321)
        assert control.listener is not None
        assert control.listener.gid == 54321
    with pytest.raises(UserError, match="no such group"):
        Control(config_of(layers)._replace(control_group="no such group"))


def test_what_a_dead_mount_left_is_replaced_and_what_lives_is_not(layers: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(layers / "socket"))
    dead.close()
    with listening(config_of(layers), None), pytest.raises(UserError, match="in use"):
        Control(config_of(layers))


@pytest.mark.parametrize("path", ["nowhere/socket", "lower/a", "lower/a/b", "."])
def test_a_place_that_cannot_be_is_refused(layers: Path, path: str) -> None:
    with pytest.raises(UserError, match="control="):
        Control(config_of(layers)._replace(control=bytes(layers) + b"/" + path.encode()))


def test_there_may_be_none(layers: Path) -> None:
    with listening(config_of(layers)._replace(control="off"), 5) as control:
        assert control.listener is None


def test_the_usual_place_has_the_number_of_the_mount(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = layers / "run/unionfsd"
    directory.parent.mkdir()
    monkeypatch.setattr("unionfsd.control.places.own", lambda: [bytes(layers / "nowhere/x"), bytes(directory)])
    with listening(config_of(layers)._replace(control="auto"), 53) as control:
        assert control.listener is not None
        assert control.listener.path == bytes(directory / "53.sock")
        with listening(config_of(layers), 54):
            assert os.readlink(directory / "54.sock") == str(layers / "socket")
        assert os.listdir(directory) == ["53.sock"]
    assert os.listdir(directory) == []


def test_a_directory_that_others_can_write_in_is_not_used(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = layers / "run"
    directory.mkdir()
    directory.chmod(0o777)
    monkeypatch.setattr("unionfsd.control.places.own", lambda: [bytes(directory)])
    with listening(config_of(layers)._replace(control="auto"), 53) as control:
        assert control.listener is None


def test_a_name_that_somebody_else_took_is_left(layers: Path) -> None:
    with listening(config_of(layers), None):
        (layers / "socket").unlink()
        (layers / "socket").write_text("somebody's")
    assert (layers / "socket").read_text() == "somebody's"
