"""Registries that answer as they please: challenges, redirects, lines that break, delays, and nonsense."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from tests.images import Made, member, tar
from unionfsd.errors import UserError
from unionfsd.images import challenge, documents, importing, reference, registry
from unionfsd.images import digest as digests
from unionfsd.images.auth import Credentials
from unionfsd.images.challenge import Challenge
from unionfsd.images.compress import BrokenOffError
from unionfsd.images.documents import Descriptor
from unionfsd.images.registry import Registry
from unionfsd.images.session import RegistryError
from unionfsd.images.store import Store

AMD64: Final = {"os": "linux", "architecture": "amd64"}
MADE: Final = Made([tar([member("f", data=b"x" * 100_000)])], "")
BLOB: Final = MADE.blobs[0]
DIGEST: Final = digests.of(BLOB)
ME: Final = Credentials("me", "secret")
BASIC: Final = "Basic " + base64.b64encode(b"me:secret").decode()


class Handler(BaseHTTPRequestHandler):
    """Asks the test what to answer, and remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    answer: Callable[[Handler], None]
    asked: list[tuple[str, str, dict[str, str], bytes]]

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append((self.command, self.path, dict(self.headers.items()), body))
        type(self).answer(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any  # noqa: N815

    def say(self, status: int, body: bytes = b"", *, whole: bool = True, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = not whole

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server:
    """HOST:PORT of one, and what it was asked; ``/v2/`` itself always answers."""

    def __init__(self, answer: Callable[[Handler], None]) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.handler = type("Odd", (Handler,), {"asked": self.asked, "answer": staticmethod(self._answer)})
        self._given = answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, handler: Handler) -> None:
        if handler.path == "/v2/":
            self.asked.pop()
            handler.say(200)
        else:
            self._given(handler)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Handler], None]], Server]]:
    with contextlib.ExitStack() as stack:

        def serve(answer: Callable[[Handler], None]) -> Server:
            made = Server(answer)
            thread = threading.Thread(target=made.server.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(made.server.shutdown)
            stack.callback(made.server.server_close)
            return made

        yield serve


Serve = Callable[[Callable[[Handler], None]], Server]


def connected(host: str, **more: Any) -> Registry:
    return Registry(reference.name(f"{host}/app:1"), **more)


def read(target: Registry, start: int = 0) -> bytes:
    stream = target.open(DIGEST, start)
    return b"".join(iter(lambda: stream.read(1 << 18), b""))


# Who asks.


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (['Bearer realm="https://a/t",scope="x:a,b"'], [("bearer", {"realm": "https://a/t", "scope": "x:a,b"})]),
        (["bearer Realm=https://a/t , SERVICE=s"], [("bearer", {"realm": "https://a/t", "service": "s"})]),
        (['Basic realm="a, \\" c", Bearer realm="r"'], [("basic", {"realm": 'a, " c'}), ("bearer", {"realm": "r"})]),
        (["Negotiate", "Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (["Negotiate, Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        ([""], []),
        (["   ,,, "], []),
        (["=\x01="], []),
    ],
)  # fmt: skip
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert challenge.read(headers) == [Challenge(*each) for each in expected]


def wants_token(handler: Handler, challenge: str, then: Callable[[Handler], None]) -> None:
    if handler.path.startswith("/token"):
        given = handler.headers.get("Authorization") == BASIC
        handler.say(200 if given else 401, json.dumps({"access_token": "t0ken"}).encode())
    elif handler.headers.get("Authorization") != "Bearer t0ken":
        handler.say(401, WWW_Authenticate=challenge.replace("HERE", handler.headers["Host"]))
    else:
        then(handler)


@pytest.mark.parametrize(
    "words",
    [
        'Bearer realm="http://HERE/token?a=b",service="s",scope="x"',
        'Basic realm="x", Bearer realm="http://HERE/token"',
        "bearer realm=http://HERE/token",
    ],
)
def test_a_token_is_got_as_the_challenge_says(serve: Serve, words: str) -> None:
    server = serve(lambda handler: wants_token(handler, words, lambda handler: handler.say(200, BLOB)))
    with connected(server.host, credentials=ME, also=("other/app",)) as target:
        assert read(target) == BLOB
    [token] = [path for _, path, _, _ in server.asked if path.startswith("/token")]
    assert "scope=repository%3Aapp%3Apull&scope=repository%3Aother%2Fapp%3Apull" in token
    assert ("service=s" in token, "a=b" in token) == ("service" in words, "a=b" in words)
    assert "service=&" not in token


def test_where_a_redirect_leads_learns_nothing(serve: Serve) -> None:
    def elsewhere(handler: Handler) -> None:
        handler.say(401, WWW_Authenticate=f'Bearer realm="http://{handler.headers["Host"]}/token"')

    other = serve(elsewhere)
    server = serve(
        lambda handler: wants_token(
            handler,
            'Bearer realm="http://HERE/token"',
            lambda handler: handler.say(307, Location=f"http://{other.host}/blob"),
        )
    )
    with connected(server.host, credentials=ME) as target, pytest.raises(RegistryError, match="401"):
        read(target)
    assert [path for _, path, _, _ in other.asked] == ["/blob"]
    assert all("Authorization" not in headers for _, _, headers, _ in other.asked)


@pytest.mark.parametrize("where", ["http://[::1", "http://a b/", "//", "ftp://127.0.0.1/x", "http://127.0.0.1:x/"])
def test_a_redirect_to_nonsense(serve: Serve, where: str) -> None:
    server = serve(lambda handler: handler.say(307, Location=where))
    with connected(server.host) as target, pytest.raises(UserError):
        target.manifest("1")


@pytest.mark.parametrize("realm", ["", "http://[::1", "nonsense", "https://127.0.0.1:1/"])
def test_a_realm_that_is_none(serve: Serve, realm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = serve(lambda handler: handler.say(401, WWW_Authenticate=f'Bearer realm="{realm}"'))
    with connected(server.host, credentials=ME) as target, pytest.raises(UserError):
        target.manifest("1")


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"errors":["x"]}', b'{"errors":[]}', b'{"errors":{"a":1}}', b"x" * (5 << 20)]
)
def test_a_refusal_in_any_words(serve: Serve, body: bytes) -> None:
    server = serve(lambda handler: handler.say(404, body))
    with connected(server.host) as target, pytest.raises(RegistryError, match="404"):
        target.manifest("1")


@pytest.mark.parametrize("host", ["[::1]", "[::1]:5000", "localhost", "localhost:5000", "127.9.9.9:1"])
def test_this_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name: nothing listens there, and nothing but that is told."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with Registry(reference.name(f"{host}/none/app:1")) as target, pytest.raises(BrokenOffError, match="http://"):
        target.manifest("1")


# What is asked for.


def test_more_than_a_document_is_refused(serve: Serve) -> None:
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1 << 14):
                handler.wfile.write(bytes(1 << 16))
        handler.close_connection = True

    server = serve(endless)
    with connected(server.host) as target, pytest.raises(UserError, match="more than"):
        target.manifest("1")


def test_nothing_is_compressed_on_the_way(serve: Serve) -> None:
    server = serve(lambda handler: handler.say(200, MADE.manifest, Content_Type=documents.OCI_MANIFEST))
    with connected(server.host) as target:
        assert target.manifest("1") == (MADE.manifest, documents.OCI_MANIFEST)
    assert server.asked[0][2]["Accept-Encoding"] == "identity"


def test_no_proxy_leads_to_this_machine(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server = serve(lambda handler: handler.say(200, MADE.manifest))
    for host in (server.host, server.host.replace("127.0.0.1", "localhost")):
        with connected(host) as target:
            assert target.manifest("1")[0] == MADE.manifest


@pytest.mark.parametrize("wait", ["1", "date"])
def test_a_registry_that_is_busy_is_asked_again_when_it_says(serve: Serve, wait: str) -> None:
    def busy(handler: Handler) -> None:
        if len(server.asked) < 3:
            handler.say(429, Retry_After=formatdate(time.time() + 2, usegmt=True) if wait == "date" else wait)
        else:
            handler.say(200, MADE.manifest)

    server = serve(busy)
    began = time.monotonic()
    with connected(server.host) as target:
        assert target.manifest("1")[0] == MADE.manifest
    assert 1.9 < time.monotonic() - began < 10


def test_we_do_not_wait_for_ever(serve: Serve) -> None:
    server = serve(lambda handler: handler.say(429, Retry_After="3600"))
    with connected(server.host) as target, pytest.raises(RegistryError, match="wait 3600 s"):
        target.manifest("1")
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", ["kept", "ignored"])
def test_a_blob_that_breaks_off_again_and_again(serve: Serve, ranges: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unionfsd.images.registry._PROGRESS", 1000)

    def breaking(handler: Handler) -> None:
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if ranges == "kept" else 0
        length = 10_000 if ranges == "kept" else 10_000 * len(server.asked)
        headers: dict[str, Any] = {"Content_Range": f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"} if start else {}
        rest = BLOB[start:]
        handler.say(206 if start else 200, rest[:length], whole=False, Content_Length=str(len(rest)), **headers)

    server = serve(breaking)
    with connected(server.host) as target:
        assert read(target) == BLOB
    assert len(server.asked) > 5


def test_another_part_than_was_asked_for_is_refused(serve: Serve) -> None:
    server = serve(lambda handler: handler.say(206, BLOB[:100], Content_Range=f"bytes 0-99/{len(BLOB)}"))
    with connected(server.host) as target, pytest.raises(RegistryError, match="another part"):
        read(target, 5000)


def test_a_line_that_stays_dead(serve: Serve) -> None:
    server = serve(lambda handler: handler.say(200, b"", whole=False, Content_Length=str(len(BLOB))))
    with connected(server.host) as target, pytest.raises(BrokenOffError):
        read(target)


def test_a_mirror_with_something_else_is_passed_over(serve: Serve) -> None:
    def image(handler: Handler) -> None:
        answers = {digests.of(MADE.manifest): MADE.manifest, digests.of(MADE.config): MADE.config, DIGEST: BLOB}
        found = answers.get(handler.path.rpartition("/")[2])
        handler.say(200 if found else 404, found or b"")

    wrong, right = serve(lambda handler: handler.say(200, b"{}")), serve(image)
    name = reference.name(f"{right.host}/app@{digests.of(MADE.manifest)}")
    with registry.connect(name, [wrong.host], AMD64).registry as found:
        assert found.document(digests.of(MADE.config)) == MADE.config
    assert wrong.asked


def test_tags_come_in_pages(serve: Serve) -> None:
    pages = [["1", "2"], ["3"], []]

    def list_(handler: Handler) -> None:
        at = int(handler.path.partition("?last=")[2] or 0)
        more: dict[str, Any] = {"Link": f'</v2/app/tags/list?last={at + 1}>; rel="next"'} if at + 1 < len(pages) else {}
        handler.say(200, json.dumps({"name": "app", "tags": pages[at] or None}).encode(), **more)

    server = serve(list_)
    assert registry.tags(f"{server.host}/app") == ["1", "2", "3"]


# Pushing.


def test_a_blob_is_mounted_from_another_repository(serve: Serve) -> None:
    def registry(handler: Handler) -> None:
        if handler.command == "POST":
            has = "from=other/app" in handler.path
            handler.say(201 if has else 202, Location="/v2/app/blobs/uploads/1")
        else:
            handler.say(202)

    server = serve(registry)
    with connected(server.host, push=True) as target:
        assert target.mount(DIGEST, "other/app")
        assert not target.mount(DIGEST, "else/app")
    assert [method for method, _, _, _ in server.asked] == ["POST", "POST", "DELETE"]
    assert server.asked[0][1] == f"/v2/app/blobs/uploads/?mount={DIGEST}&from=other/app"


def test_a_registry_that_says_not_where_to_push_to(serve: Serve) -> None:
    server = serve(lambda handler: handler.say(404 if handler.command == "HEAD" else 202))
    with connected(server.host, push=True) as target, pytest.raises(RegistryError, match="where to push"):
        target.upload(Descriptor("", DIGEST, len(BLOB), {}), lambda: iter([BLOB]))


def test_what_came_whole_is_not_asked_for_again(serve: Serve, tmp_path: Path) -> None:
    """As it is when somebody is killed between the last byte and the name."""

    def image(handler: Handler) -> None:
        answers = {"1": MADE.manifest, digests.of(MADE.config): MADE.config}
        found = answers.get(handler.path.rpartition("/")[2])
        handler.say(200 if found else 416, found or b"")

    server = serve(image)
    store = Store(str(tmp_path / "store"))
    with store.incoming(DIGEST) as incoming:
        incoming.write(BLOB)
    source = registry.connect(reference.name(f"{server.host}/app:1"), [], AMD64)
    with source.registry:
        made = importing.import_image(store, source, ("app:1",))
    assert made.digest == digests.of(MADE.manifest)


def test_an_interrupt_does_not_wait_for_a_registry_that_says_nothing(serve: Serve, tmp_path: Path) -> None:
    stalled, over = threading.Event(), threading.Event()

    def image(handler: Handler) -> None:
        found = {"1": MADE.manifest, digests.of(MADE.config): MADE.config}.get(handler.path.rpartition("/")[2])
        if not handler.path.endswith(DIGEST):
            handler.say(200 if found else 404, found or b"")
            return
        handler.say(200, BLOB[:80_000], Content_Length=str(len(BLOB)))
        stalled.set()
        over.wait(30)

    server = serve(image)
    words = [sys.executable, "-m", "unionfsd.ctl", "image", "pull", f"--root={tmp_path}/store", f"{server.host}/app:1"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert stalled.wait(20)
            time.sleep(0.3)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert time.monotonic() - began < 10
        finally:
            process.kill()
            over.set()
    store = Store(str(tmp_path / "store"))
    assert store.images() == []
    store.sweep()
    assert all(name.startswith("blob-") for name in os.listdir(tmp_path / "store" / "stage"))


def test_a_certificate_of_its_own_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry on this machine that speaks TLS, known by certs.d."""
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    subprocess.run(
        [*words, "-keyout", tmp_path / "key", "-out", tmp_path / "crt", *subject], check=True, capture_output=True
    )
    server = Server(lambda handler: handler.say(200, MADE.manifest, Content_Type=documents.OCI_MANIFEST))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    server.server.socket = tls.wrap_socket(server.server.socket, server_side=True)
    host = server.host.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    thread = threading.Thread(target=server.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        with connected(host) as target, pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
            target.manifest("1")
        known = tmp_path / "containers" / "certs.d" / host
        known.mkdir(parents=True)
        (known / "ca.crt").write_bytes((tmp_path / "crt").read_bytes())
        with connected(host) as target:
            assert target.manifest("1")[0] == MADE.manifest
        (known / "ca.crt").write_bytes(b"nonsense")
        with pytest.raises(UserError, match=r"ca\.crt"):
            connected(host)
    finally:
        server.server.shutdown()
        thread.join()
        server.server.server_close()
