"""sd_notify(3) against a real socket, of both kinds."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from unionfsd.systemd import forget, keeps_fds, listening, notify, store, watchdog


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


@pytest.mark.parametrize(("most", "expected"), [("1", True), ("0", False), ("", False), ("many", False), (None, False)])
def test_whether_descriptors_are_kept(most: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.delenv("FDSTORE", raising=False)
    if most is not None:
        monkeypatch.setenv("FDSTORE", most)
    assert keeps_fds() is expected
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not keeps_fds()


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
