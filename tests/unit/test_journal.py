"""The journal's protocol, against a real socket."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from unionfsd import journal, logs
from unionfsd.journal import Journal


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.settimeout(5)
        yield sock


def fields(entry: bytes) -> dict[str, str]:
    """An entry read as the journal does."""
    found = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", entry)
            value, end, entry = entry[8 : 8 + size], entry[8 + size : 9 + size], entry[9 + size :]
            assert end == b"\n"
        found[name.decode()] = value.decode("utf-8", "surrogateescape")
    return found


def test_an_entry_arrives_as_it_was(receiver: socket.socket) -> None:
    given = {"MESSAGE": "two\nlines", "PRIORITY": "4", "NAME": "a=b", "EMPTY": "", "BYTES": "\udcff"}
    with closing(Journal(receiver.getsockname())) as to:
        to.send(given)
    assert fields(receiver.recv(4096)) == given


def test_one_too_large_for_a_datagram_comes_as_a_sealed_file(receiver: socket.socket) -> None:
    given = {"MESSAGE": "x" * 5_000_000, "PRIORITY": "3"}
    with closing(Journal(receiver.getsockname())) as to:
        to.send(given)
    data, (fd,), _, _ = socket.recv_fds(receiver, 4096, 4)
    assert data == b""
    with open(fd, "rb", buffering=0) as file:
        assert fields(os.pread(fd, 6_000_000, 0)) == given
        with pytest.raises(OSError):
            os.pwrite(file.fileno(), b"y", 0)


def test_without_a_journal_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Journal(str(tmp_path / "socket"))


def test_log_records_have_fields(receiver: socket.socket) -> None:
    handler = logs._Journal(Journal(receiver.getsockname()), b"/srv/m\xff")
    logger = logging.getLogger("unionfsd.test")
    logger.addHandler(handler)
    try:
        try:
            raise FileNotFoundError(2, "No such file or directory")
        except OSError:
            logger.exception("it failed: %d", 7)
    finally:
        logger.removeHandler(handler)
        handler.close()
    entry = fields(receiver.recv(65536))
    assert entry["MESSAGE"].startswith("it failed: 7\nTraceback")
    assert (entry["PRIORITY"], entry["ERRNO"], entry["SYSLOG_IDENTIFIER"]) == ("3", "2", "unionfsd")
    assert (entry["UNIONFSD_MOUNTPOINT"], entry["UNIONFSD_LOGGER"]) == ("/srv/m\udcff", "unionfsd.test")
    assert (entry["CODE_FILE"], entry["CODE_FUNC"]) == (__file__, "test_log_records_have_fields")
    assert journal.SOCKET.startswith("/run/systemd/journal/")
