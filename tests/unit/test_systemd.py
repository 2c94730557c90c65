"""sd_notify(3) against a real socket, of both kinds."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from unionfsd.systemd import forget, listening, notify, room_for_fds, settle, store, stored, watchdog


def listener(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.bind(address)
    return sock


def test_assignments_arrive_as_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listener(str(tmp_path / "notify")) as sock:
        assert notify("READY=1", "STATUS=grün")
        assert sock.recv(1000).decode() == "READY=1\nSTATUS=grün"


def test_an_at_sign_stands_for_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"unionfsd-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
    with listener("\0" + name) as sock:
        assert notify("READY=1")
        assert sock.recv(1000) == b"READY=1"


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


@pytest.mark.parametrize("address", ["", "relative", "/nonexistent/notify", "@unionfsd-nobody", "vsock:2:1234"])
def test_an_address_that_nobody_listens_to_is_no_failure(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_who_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, expected in {"": False, "relative": False, "/run/notify": True, "@abstract": True}.items():
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert listening() is expected


@pytest.mark.parametrize(
    ("microseconds", "pid", "expected"),
    [
        ("30000000", None, 30.0),
        ("1500000", str(os.getpid()), 1.5),
        ("1500000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        ("", None, None),
    ],
)
def test_the_watchdog_s_patience(
    microseconds: str, pid: str | None, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog() == expected


@pytest.mark.parametrize(("most", "expected"), [("1", 1), ("1024", 1024), ("0", 0), ("", 0), ("many", 0), (None, 0)])
def test_how_many_descriptors_are_kept(most: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.delenv("FDSTORE", raising=False)
    if most is not None:
        monkeypatch.setenv("FDSTORE", most)
    assert room_for_fds() == expected
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert room_for_fds() == 0


def test_a_descriptor_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    reader, writer = os.pipe()
    with listener(str(tmp_path / "notify")) as sock:
        assert store("fuse", writer)
        message, (copy,), _, _ = socket.recv_fds(sock, 1000, 4)
        assert message == b"FDSTORE=1\nFDNAME=fuse"
        os.close(writer)
        os.write(copy, b"the same")
        assert os.read(reader, 100) == b"the same"
        os.close(copy)
        assert forget("fuse")
        assert sock.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=fuse"
    os.close(reader)


def test_what_was_kept_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unionfsd.systemd._LISTEN_FDS_START", start := os.dup(0))
    second = os.dup2(0, start + 1)
    for fd in (start, second):
        os.set_inheritable(fd, True)
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_FDNAMES", "fuse:ledger")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert stored() == {"fuse": start, "ledger": second}
    assert not os.get_inheritable(start)
    assert stored() == {}
    for fd in (start, second):
        os.close(fd)


def test_what_was_kept_for_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "fuse")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert stored() == {}


def test_settling_waits_until_all_was_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listener(str(tmp_path / "notify")) as sock:
        assert not settle(0.05), "nobody has read it"
        message, fds, _, _ = socket.recv_fds(sock, 1000, 4)
        assert (message, len(fds)) == (b"BARRIER=1", 1)
        os.close(fds[0])
        heard: list[bytes] = []

        def hear() -> None:
            message, fds, _, _ = socket.recv_fds(sock, 1000, 4)
            heard.append(message)
            os.close(fds[0])

        manager = threading.Thread(target=hear)
        manager.start()
        assert settle(5)
        manager.join()
        assert heard == [b"BARRIER=1"]
