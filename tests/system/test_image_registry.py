"""Pulling from and pushing to the distribution's registry, with skopeo as the other client; signatures all the way."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

from tests import images
from tests.harness import run, wait_for
from tests.images import Made, directory, member, tar
from unionfsd.ctl.main import main
from unionfsd.errors import UserError
from unionfsd.images import collect, documents, importing, policy, pushing, reference, registry, sources, trust
from unionfsd.images import digest as digests
from unionfsd.images.admission import admit, check
from unionfsd.images.auth import Credentials
from unionfsd.images.compress import BrokenOffError
from unionfsd.images.events import Events
from unionfsd.images.registry import Registry
from unionfsd.images.session import RegistryError
from unionfsd.images.store import Image, Store
from unionfsd.images.trust import Signature, UntrustedError

BASE: Final = tar([directory("bin"), member("bin/sh", mode=0o755, data=b"shell"), member("a", data=b"a")])
TOP: Final = tar([member(".wh.a"), member("b", data=os.urandom(3 << 20))])
AMD64: Final = {"os": "linux", "architecture": "amd64"}
TOKEN: Final = "t0ken"
Connect = Callable[..., registry.Remote]
# Of "secret", by bcrypt.
PASSWORD: Final = "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(root: Path, auth: str = "", http: str = "") -> Iterator[str]:
    """A registry that keeps its blobs in `root`; HOST:PORT."""
    port = free_port()
    (root / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {root}/data}}}}\nhttp:\n  addr: '127.0.0.1:{port}'\n{http}{auth}"
    )
    with open(root / "log", "w") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(root / "config.yml")], stdout=log, stderr=log)
    try:
        wait_for(
            lambda: _answers(port) or bool(http and _listens(port)),
            f"the registry does not start: {(root / 'log').read_text()}",
        )
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=1).close()
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as root, serving(Path(root)) as address:
        yield address


class Between(BaseHTTPRequestHandler):
    """Stands before a registry: wants a token, cuts the first answers of blobs off, and has lists of referrers."""

    protocol_version = "HTTP/1.0"
    behind: ClassVar[str]
    cuts: ClassVar[int]
    ranges: ClassVar[list[str]]
    token: ClassVar[bool] = True
    #: Pages of the lists, by digest; None for a registry that has none.
    referrers: ClassVar[dict[str, list[list[Any]]] | None] = None

    def do_GET(self) -> None:
        if self.path.startswith("/token"):
            self._token()
        elif self.token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send_response(401)
            here = f"http://{self.headers['Host']}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{here}",service="test",scope="x"')
            self.end_headers()
        elif self.referrers is not None and "/referrers/" in self.path:
            self._list(*self.path.rpartition("/")[2].partition("?page=")[::2], self.referrers)
        else:
            self._pass_on()

    def _list(self, digest: str, page: str, lists: dict[str, list[list[Any]]]) -> None:
        pages, at = lists.get(digest) or [[]], int(page or 0)
        self.send_response(200)
        self.send_header("Content-Type", documents.OCI_INDEX)
        if at + 1 < len(pages):
            self.send_header("Link", f'<{self.path.partition("?")[0]}?page={at + 1}>; rel="next"')
        self.end_headers()
        index = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": pages[at]}
        self.wfile.write(json.dumps(index).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def _token(self) -> None:
        given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic "))
        self.send_response(200 if given == b"me:secret" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"token": TOKEN}).encode())

    def _pass_on(self) -> None:
        headers = {key: value for key, value in self.headers.items() if key in ("Accept", "Range")}
        request = urllib.request.Request(f"http://{self.behind}{self.path}", headers=headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
            self.send_response(answer.status)
            for key in ("Content-Type", "Content-Length", "Content-Range"):
                if key in answer.headers:
                    self.send_header(key, answer.headers[key])
            self.end_headers()
        if "/blobs/" in self.path and len(body) > 100_000:
            type(self).ranges.append(self.headers.get("Range", ""))
            if self.cuts > 0:
                type(self).cuts -= 1
                body = body[: len(body) // 3]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def between(host: str) -> Iterator[tuple[str, type[Between]]]:
    """HOST:PORT of a proxy before the registry, and its handler."""
    handler = type("Handler", (Between,), {"behind": host, "cuts": 0, "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def bring(store: Store, source: sources.Source, *names: str, **more: Any) -> Image:
    return importing.import_image(store, source, importing.names_for(source, list(names)), **more)


def local(store: Store, made: Made, path: Path, *names: str) -> Image:
    return bring(store, sources.open_source(f"oci:{made.oci(path)}", store.stage, AMD64).source, *names)


@pytest.fixture
def remote() -> Iterator[Callable[..., registry.Remote]]:
    """Connects to an image in a registry."""
    with contextlib.ExitStack() as stack:

        def remote(name: str, mirrors: Sequence[str] = ()) -> registry.Remote:
            found = registry.connect(reference.name(name), mirrors, AMD64, plain_http=False)
            stack.enter_context(found.registry)
            return found

        yield remote


def pushed(store: Store, made: Made, path: Path, name: str) -> Image:
    image = local(store, made, path, name)
    with Registry(reference.name(name), push=True) as target:
        pushing.push(store, image, target, Events())
    return image


def test_skopeo_copies_what_we_pushed_and_we_pull_what_it_did(
    store: Store, host: str, tmp_path: Path, remote: Connect
) -> None:
    made = Made([BASE, TOP])
    pushed(store, made, tmp_path / "oci", f"{host}/a/ours:1")
    run("skopeo", "copy", "--src-tls-verify=false", f"docker://{host}/a/ours:1", f"dir:{tmp_path}/copied")
    assert (tmp_path / "copied" / "manifest.json").read_bytes() == made.manifest
    run("skopeo", "copy", "--dest-tls-verify=false", f"dir:{tmp_path}/copied", f"docker://{host}/theirs:2")
    again = Store(str(tmp_path / "again"))
    image = bring(again, remote(f"{host}/theirs:2"))
    assert image.names == (f"{host}/theirs:2",)
    assert image.digest == made.digest
    assert list(collect.verify(again, image)) == []
    by_digest = bring(again, remote(f"{host}/theirs@{made.digest}"))
    assert by_digest.digest == made.digest


def test_the_command_line(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made([BASE])
    layout, root = made.oci(tmp_path / "oci"), f"--root={tmp_path}/store"
    assert main(["image", "import", root, str(layout), "--name", f"{host}/cli:1"]) == 0
    assert main(["image", "push", root, f"{host}/cli:1"]) == 0
    assert main(["image", "pull", f"--root={tmp_path}/other", f"docker://{host}/cli:1", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out[said.out.index("{") :])["digest"] == made.digest
    events = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events][:1] == ["begin"]
    assert main(["image", "pull", root, f"docker://{host}/none:1"]) == 1
    assert "404" in capsys.readouterr().err


def test_a_layer_is_taken_from_another_repository_of_the_registry(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Made([tar([member("shared", data=b"only here")])])
    root = f"--root={tmp_path}/store"
    assert main(["image", "import", root, str(made.oci(tmp_path / "oci")), "--name", f"{host}/first:1"]) == 0
    assert main(["image", "push", root, f"{host}/first:1"]) == 0
    capsys.readouterr()
    assert main(["image", "push", root, f"{host}/first:1", f"docker://{host}/second/app:1", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["what"] for event in events] == ["there", "there"]
    assert main(["image", "push", root, f"{host}/first:1", f"docker://{host}/second/app:2", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["image", "tags", f"docker://{host}/second/app"]) == 0
    assert capsys.readouterr().out.split() == ["1", "2"]
    assert main(["image", "pull", f"--root={tmp_path}/other", f"docker://{host}/second/app:2", "--quiet"]) == 0


def test_an_index_in_a_registry(store: Store, host: str, tmp_path: Path, remote: Connect) -> None:
    made = Made([BASE])
    name = reference.name(f"{host}/multi:1")
    pushed(store, made, tmp_path / "oci", str(name._replace(tag="amd64")))
    entry = {**images.descriptor(documents.OCI_MANIFEST, made.manifest), "platform": AMD64}
    index = json.dumps({"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": [entry]}).encode()
    with Registry(name, push=True) as target:
        target.put_manifest(index, documents.OCI_INDEX, "1")
    assert bring(Store(str(tmp_path / "again")), remote(str(name))).digest == made.digest


def test_tokens_and_lines_that_break(
    store: Store,
    host: str,
    between: tuple[str, type[Between]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remote: Connect,
) -> None:
    made = Made([BASE, TOP])
    pushed(store, made, tmp_path / "oci", f"{host}/broken:1")
    proxy, handler = between
    file = tmp_path / "auth.json"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
    file.write_text("{}")
    with pytest.raises(RegistryError, match="401"):
        remote(f"{proxy}/broken:1")
    file.write_text(json.dumps({"auths": {proxy: {"auth": base64.b64encode(b"me:secret").decode()}}}))
    handler.cuts = 2
    again = Store(str(tmp_path / "again"))
    image = bring(again, remote(f"{proxy}/broken:1"))
    assert list(collect.verify(again, image)) == []
    assert handler.ranges[0] == ""
    assert all(each.startswith("bytes=") and each != "bytes=0-" for each in handler.ranges[1:])
    assert len(handler.ranges) == 3


def test_an_interrupted_pull_goes_on_where_it_was(
    store: Store,
    host: str,
    between: tuple[str, type[Between]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remote: Connect,
) -> None:
    made = Made([BASE, TOP])
    pushed(store, made, tmp_path / "oci", f"{host}/killed:1")
    proxy, handler = between
    monkeypatch.setattr("unionfsd.images.auth.find", lambda repository: Credentials("me", "secret"))
    handler.cuts = 1000
    again = Store(str(tmp_path / "again"))
    with pytest.raises(UserError, match="broke off"):
        bring(again, remote(f"{proxy}/killed:1"))
    assert again.images() == []
    handler.cuts = 0
    handler.ranges.clear()
    image = bring(again, remote(f"{proxy}/killed:1"))
    assert list(collect.verify(again, image)) == []
    assert handler.ranges[0].startswith("bytes=")
    assert os.listdir(Path(again.root) / "stage") == []


def test_mirrors_are_asked_first(store: Store, host: str, tmp_path: Path, remote: Connect) -> None:
    made = Made([BASE])
    pushed(store, made, tmp_path / "oci", f"{host}/library/thing:1")
    dead = f"127.0.0.1:{free_port()}"
    image = bring(Store(str(tmp_path / "again")), remote("thing:1", mirrors=[dead, host]))
    assert image.digest == made.digest
    assert image.names == ("docker.io/library/thing:1",)


def test_a_password(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "htpasswd").write_text(PASSWORD)
    auth = f"auth: {{htpasswd: {{realm: here, path: {tmp_path}/htpasswd}}}}\n"
    with serving(tmp_path, auth) as host:
        monkeypatch.setattr("unionfsd.images.auth.find", lambda repository: Credentials("me", "wrong"))
        with pytest.raises(RegistryError, match="401"):
            pushed(store, Made([BASE]), tmp_path / "oci", f"{host}/secret:1")
        monkeypatch.setattr("unionfsd.images.auth.find", lambda repository: Credentials("me", "secret"))
        pushed(store, Made([BASE]), tmp_path / "oci", f"{host}/secret:1")


# Signatures.


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key pairs of each kind, by openssl: KIND.key, KIND.pub, and other-KIND."""
    root = tmp_path_factory.mktemp("keys")
    kinds = {"ec": ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"], "rsa": ["RSA"], "ed25519": ["ED25519"]}
    for kind, words in kinds.items():
        for name in (kind, f"other-{kind}"):
            run("openssl", "genpkey", "-algorithm", *words, "-out", root / f"{name}.key")
            run("openssl", "pkey", "-in", root / f"{name}.key", "-pubout", "-out", root / f"{name}.pub")
    return root


@pytest.mark.parametrize("kind", ["ec", "rsa", "ed25519"])
def test_openssl_and_we_agree_about_signatures(keys: Path, tmp_path: Path, kind: str) -> None:
    digest, name = digests.of(b"manifest"), "example.com/app:1"
    ours = trust.sign(str(keys / f"{kind}.key"), name, digest)
    (tmp_path / "payload").write_bytes(ours.payload)
    (tmp_path / "signature").write_bytes(ours.signature)
    raw = ["-rawin"] if kind == "ed25519" else ["-rawin", "-digest", "sha256"]
    files = ["-in", str(tmp_path / "payload")]
    verifying = ["-verify", "-pubin", "-inkey", str(keys / f"{kind}.pub"), "-sigfile", str(tmp_path / "signature")]
    run("openssl", "pkeyutl", *verifying, *raw, *files)
    # The example of the specification (SIGNATURE_SPEC.md, "Simple Signing"), about this digest.
    example = (
        '{\n    "critical": {\n        "identity": {\n            "docker-reference": "example.com/app"\n        },\n'
        f'        "image": {{\n            "docker-manifest-digest": "{digest}"\n        }},\n'
        '        "type": "cosign container image signature"\n    },\n    "optional": {\n'
        '        "creator": "Bob the Builder",\n        "timestamp": 1458239713\n    }\n}\n'
    )
    (tmp_path / "payload").write_text(example)
    run("openssl", "pkeyutl", "-sign", "-inkey", keys / f"{kind}.key", *raw, *files, "-out", tmp_path / "signature")
    theirs = Signature(example.encode(), (tmp_path / "signature").read_bytes())
    assert trust.verify([theirs], [str(keys / f"{kind}.pub")], digest, [name]) == theirs
    for signature in (ours, theirs):
        with pytest.raises(UntrustedError, match="key"):
            trust.verify([signature], [str(keys / f"other-{kind}.pub")], digest, [name])
        with pytest.raises(UntrustedError, match="another image"):
            trust.verify([signature], [str(keys / f"{kind}.pub")], digests.of(b"other"), [name])
        with pytest.raises(UntrustedError, match="signed as"):
            trust.verify([signature], [str(keys / f"{kind}.pub")], digest, ["example.com/other:1"])
        changed = signature._replace(payload=signature.payload.replace(b"app", b"abb"))
        with pytest.raises(UntrustedError, match="key"):
            trust.verify([changed], [str(keys / f"{kind}.pub")], digest, [name])


def rules(path: Path, keys: Path, pattern: str) -> policy.Policy:
    path.write_text(
        f'default = "reject"\n[[rule]]\nname = "{pattern}"\naction = "signed"\nkeys = ["{keys}/ec.pub"]\n'
        '[[rule]]\nname = "localhost/*"\naction = "accept"\n'
    )
    return policy.load(str(path), "/nowhere")


def test_only_what_is_signed_comes_in(store: Store, host: str, keys: Path, tmp_path: Path, remote: Connect) -> None:
    made = Made([BASE])
    name = f"{host}/prod/app:1"
    image = pushed(store, made, tmp_path / "oci", name)
    wanted = rules(tmp_path / "policy.toml", keys, f"{host}/prod/*")
    again = Store(str(tmp_path / "again"))

    def pull(*names: str) -> Image:
        source = remote(name)
        given = importing.names_for(source, list(names))
        return bring(again, source, *names, allowed=lambda source: admit(again, source, given, wanted))

    for names in ((), ("localhost/free:1",)):
        with pytest.raises(UntrustedError, match="no signature"):
            pull(*names)
    trust.keep(store, image.digest, [trust.sign(str(keys / "other-ec.key"), name, image.digest)])
    with Registry(reference.name(name), push=True) as target:
        pushing.push(store, image, target, Events())
        with pytest.raises(UntrustedError, match="key"):
            pull()
        assert again.images() == []
        trust.keep(store, image.digest, [trust.sign(str(keys / "ec.key"), name, image.digest)])
        pushing.push(store, image, target, Events())
    assert pull().digest == made.digest
    check(again, again.image(name), wanted)
    # Tampered with in the store: the signature, the layer, the configuration.
    facts = Path(again.diff_path(made.chain_ids[0])).parent / "layer.json"
    facts.write_text(facts.read_text().replace(made.diff_ids[0], digests.of(b"other")))
    with pytest.raises(UserError, match="not that of the image"):
        check(again, again.image(name), wanted)
    config = Path(again.blob_path(digests.of(made.config)))
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(UserError, match="damaged"):
        again.image(name)
    (signatures,) = (Path(again.root) / "signatures").iterdir()
    signatures.unlink()
    with pytest.raises(UntrustedError):
        wanted.check([name], made.digest, trust.kept(again, made.digest))
    with pytest.raises(UntrustedError, match="rejected"):
        wanted.check(["docker.io/library/app:1"], made.digest, [])


def test_signatures_travel_in_a_layout(store: Store, keys: Path, tmp_path: Path) -> None:
    made = Made([BASE])
    name = "example.com/app:1"
    image = local(store, made, tmp_path / "oci", name)
    root = f"--root={store.root}"
    assert main(["image", "sign", root, name, "--key", str(keys / "ec.key")]) == 0
    assert main(["image", "verify-signature", root, name, "--key", str(keys / "ec.pub")]) == 0
    assert main(["image", "verify-signature", root, name, "--key", str(keys / "other-ec.pub")]) == 1
    assert main(["image", "export", root, name, f"oci:{tmp_path}/out:{name}"]) == 0
    rules(tmp_path / "policy.toml", keys, "example.com/*")
    more = [f"--policy={tmp_path}/policy.toml", f"--root={tmp_path}/again"]
    assert main(["image", "import", *more, f"oci:{tmp_path}/out:{name}"]) == 0
    assert main(["image", "import", *more, f"oci:{tmp_path}/oci", "--name", name]) == 1
    assert trust.kept(Store(f"{tmp_path}/again"), image.digest)


def test_a_pair_of_our_own_signs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In cosign's format; Debian's skopeo, podman and buildah are built without it (see test_image_keys)."""
    monkeypatch.setenv("COSIGN_PASSWORD", "secret")
    name, prefix, root = "example.com/app:1", str(tmp_path / "mine"), f"--root={store.root}"
    local(store, Made([BASE]), tmp_path / "oci", name)
    assert main(["image", "generate-key", "--prefix", prefix]) == 0
    assert capsys.readouterr().out.split() == [f"{prefix}.key", f"{prefix}.pub"]
    assert main(["image", "sign", root, name, "--key", f"{prefix}.key"]) == 0
    assert main(["image", "verify-signature", root, name, "--key", f"{prefix}.pub"]) == 0
    monkeypatch.setenv("COSIGN_PASSWORD", "wrong")
    assert main(["image", "sign", root, name, "--key", f"{prefix}.key"]) == 2


def test_registries_conf_counts(
    store: Store, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Made([BASE])
    pushed(store, made, tmp_path / "oci", f"{host}/moved/app:1")
    conf = tmp_path / "registries.conf"
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(conf))
    conf.write_text(
        f'[[registry]]\nprefix = "example.invalid/org"\nlocation = "example.invalid/org"\n'
        f'[[registry.mirror]]\nlocation = "127.0.0.1:{free_port()}/moved"\n'
        f'[[registry.mirror]]\nlocation = "{host}/moved"\n'
        '[[registry]]\nlocation = "bad.invalid"\nblocked = true\n'
        '[aliases]\n"tool" = "example.invalid/org/app"\n'
    )
    root = f"--root={tmp_path}/again"
    for text in ("example.invalid/org/app:1", "tool:1"):
        assert main(["image", "pull", root, "--quiet", text]) == 0
        assert capsys.readouterr().out.strip() == made.digest
    assert Store(f"{tmp_path}/again").image("example.invalid/org/app:1").names == ("example.invalid/org/app:1",)
    assert main(["image", "pull", root, "bad.invalid/app"]) == 1
    assert "blocked" in capsys.readouterr().err


def test_an_untrusted_certificate_is_for_insecure_registries(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt")]
    run("openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *files, *subject)
    tls = f"  tls: {{certificate: {tmp_path}/crt, key: {tmp_path}/key}}\n"
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
    made = Made([BASE])
    with serving(tmp_path, http=tls) as host:
        name = f"{host}/app:1"
        with pytest.raises(BrokenOffError, match="certificate"):
            pushed(store, made, tmp_path / "oci", name)
        root = f"--root={store.root}"
        assert main(["image", "push", root, name, "--tls-verify=false"]) == 0
        assert main(["image", "pull", root, f"docker://{name}"]) == 1
        assert main(["image", "pull", root, f"docker://{name}", "--tls-verify=false"]) == 0
        (tmp_path / "registries.conf").write_text(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
        pushed(store, made, tmp_path / "oci", name)
        found = registry.find(name, [], AMD64, plain_http=False)
        with found.registry:
            assert bring(Store(str(tmp_path / "again")), found).digest == made.digest


def test_signatures_are_pushed_as_referrers(store: Store, host: str, keys: Path, tmp_path: Path) -> None:
    """Debian's registry keeps no lists: the tag that stands for one names the signature, once, beside what it named."""
    made = Made([BASE])
    name = reference.name(f"{host}/referred/app:1")
    image = pushed(store, made, tmp_path / "oci", str(name))
    trust.keep(store, image.digest, [trust.sign(str(keys / "ec.key"), str(name), image.digest)])
    with Registry(name, push=True) as target:
        for _ in range(2):
            pushing.push(store, image, target, Events(), referrers=True)
        (listed,) = target.referrers(image.digest)
        assert listed.artifact_type == trust.ARTIFACT
        assert pushing.subject(target.manifest(listed.digest)[0]) == image.digest
        trust.keep(store, image.digest, [trust.sign(str(keys / "other-ec.key"), str(name), image.digest)])
        pushing.push(store, image, target, Events(), referrers=True)
        assert target.referrers(image.digest)[0] == listed
        assert len(target.referrers(image.digest)) == 2
        raw = target.manifest(trust.tag(image.digest))[0]
        assert set(trust.read(raw, target)) == set(pushing.signatures(target, image.digest, None))


def test_signatures_are_found_in_a_list_of_referrers(
    store: Store, host: str, keys: Path, tmp_path: Path, between: tuple[str, type[Between]]
) -> None:
    """OCI 1.1: a registry that has such lists gives them in pages; Debian's has none, so what stands before it does."""
    address, handler = between
    made = Made([BASE])
    name = reference.name(f"{host}/native/app:1")
    image = pushed(store, made, tmp_path / "oci", str(name))
    handler.token = False
    signature = trust.sign(str(keys / "ec.key"), str(name), image.digest)
    manifest, blobs = trust.manifest([signature])
    raw = documents.dump(
        {**json.loads(manifest.raw), "subject": images.descriptor(documents.OCI_MANIFEST, made.manifest)}
    )
    with Registry(name, push=True) as target:
        for digest, data in blobs.items():
            target.upload(documents.Descriptor("", digest, len(data), {}), lambda data=data: iter([data]))  # type: ignore[misc]
        target.put_manifest(raw, documents.OCI_MANIFEST, digests.of(raw))
    other = {**images.descriptor(documents.OCI_MANIFEST, made.manifest), "artifactType": "application/other"}
    mine = {**images.descriptor(documents.OCI_MANIFEST, raw), "artifactType": trust.ARTIFACT}
    for entries, found in (([[other], [mine]], [signature]), ([[other]], []), ([], [])):
        handler.referrers = {image.digest: entries}
        with Registry(reference.name(f"{address}/native/app:1")) as seen:
            assert pushing.signatures(seen, image.digest, None) == found


@pytest.mark.parametrize("found_by", ["tag", "referrers"])
def test_a_signed_index_vouches_for_what_is_in_it(
    store: Store, host: str, keys: Path, tmp_path: Path, remote: Connect, found_by: str
) -> None:
    made, stranger = Made([BASE]), Made([TOP])
    name = reference.name(f"{host}/indexed-{found_by}/app:1")
    entry = {**images.descriptor(documents.OCI_MANIFEST, made.manifest), "platform": AMD64}
    index = json.dumps({"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": [entry]}).encode()
    signature = trust.sign(str(keys / "ec.key"), str(name), digests.of(index))
    manifest, blobs = trust.manifest([signature])
    pushed(store, made, tmp_path / "oci", str(name._replace(tag="amd64")))
    with Registry(name, push=True) as target:
        target.put_manifest(index, documents.OCI_INDEX, "1")
        for digest, data in blobs.items():
            target.upload(documents.Descriptor("", digest, len(data), {}), lambda data=data: iter([data]))  # type: ignore[misc]
        if found_by == "tag":
            target.put_manifest(manifest.raw, documents.OCI_MANIFEST, trust.tag(digests.of(index)))
        else:
            # As a registry without a list of referrers has it (distribution-spec, "Referrers Tag Schema").
            subject = images.descriptor(documents.OCI_INDEX, index)
            raw = documents.dump({**json.loads(manifest.raw), "subject": subject})
            target.put_manifest(raw, documents.OCI_MANIFEST, digests.of(raw))
            listed = {**images.descriptor(documents.OCI_MANIFEST, raw), "artifactType": trust.ARTIFACT}
            referrers = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": [listed]}
            tag = digests.of(index).replace(":", "-")
            target.put_manifest(documents.dump(referrers), documents.OCI_INDEX, tag)
    wanted = rules(tmp_path / "policy.toml", keys, f"{host}/indexed-*")
    again = Store(str(tmp_path / "again"))
    image = bring(again, remote(str(name)), allowed=lambda source: admit(again, source, source.names, wanted))
    check(again, image, wanted)
    (kept,) = trust.kept(again, made.digest)
    with pytest.raises(UntrustedError, match="another image"):
        trust.verify([kept], [str(keys / "ec.pub")], stranger.digest, [str(name)])
    other = kept._replace(signed_index=index.replace(made.digest.encode(), stranger.digest.encode()))
    with pytest.raises(UntrustedError, match="another image"):
        trust.verify([other], [str(keys / "ec.pub")], stranger.digest, [str(name)])
