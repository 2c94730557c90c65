"""Registries: pulling from them and pushing to them (distribution-spec v1.1).

Rules this file obeys:

- Nothing a registry says is believed: manifests and blobs are verified against digests by who asked for them.
- Credentials go to the registry, and to the realm it names, over TLS; plain HTTP is for this machine, or by a flag.
- A download that breaks off is gone on with where it was, a few times here, and by the next import after that.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import httpx

from unionfsd import __version__
from unionfsd.errors import UserError
from unionfsd.images import auth, blobs, documents, registriesconf, sources
from unionfsd.images import digest as digests
from unionfsd.images.auth import Credentials
from unionfsd.images.compress import CHUNK, BrokenOffError, Readable
from unionfsd.images.documents import Descriptor
from unionfsd.images.reference import DOCKER_HUB, LOCAL, Name
from unionfsd.images.registriesconf import Endpoint

_HUB: Final = "registry-1.docker.io"
_ACCEPT: Final = ", ".join((*documents.MANIFESTS, *documents.INDEXES))
_TRIES: Final = 4
_TIMEOUT: Final = httpx.Timeout(30.0, read=60.0)
_REDIRECTS: Final = 5
#: Of a list of referrers that are read at most.
_PAGES: Final = 20
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')
_RETRIED: Final = (408, 429, 500, 502, 503, 504)


class RegistryError(UserError):
    """The registry said no; `status` is that of HTTP."""

    def __init__(self, message: str, status: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint, code=1)
        self.status = status


def referrers_tag(digest: str) -> str:
    """The tag of the list of what refers to a manifest, where the registry keeps none (distribution-spec 1.1)."""
    return digest.replace(":", "-")


class Registry:
    """The repository of `name` in its registry, or `at` another place, for reading and, with `push`, for writing.

    `plain_http` allows HTTP without TLS for any host. Safe to use from several threads.
    """

    def __init__(
        self,
        name: Name,
        *,
        push: bool = False,
        plain_http: bool = False,
        at: Endpoint | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.name = name
        at = at or Endpoint(name.host, name.path, registriesconf.load().insecure(name))
        host = _HUB if at.host == DOCKER_HUB else at.host
        self._plain = plain_http or at.insecure or _is_here(host)
        self._scope = f"repository:{at.path}:{'pull,push' if push else 'pull'}"
        self._credentials = credentials or auth.find(f"{at.host}/{at.path}")
        self._authorization: str | None = None
        self._client = httpx.Client(
            timeout=_TIMEOUT,
            headers={"User-Agent": f"unionfsd/{__version__}"},
            follow_redirects=False,
            verify=not at.insecure,
        )
        without = plain_http or _is_here(host) or (at.insecure and not self._speaks_tls(host))
        self._origin = f"{'http' if without else 'https'}://{host}"
        self._base = f"{self._origin}/v2/{at.path}/"

    def _speaks_tls(self, host: str) -> bool:
        """Whether a host that may do without TLS has it."""
        try:
            self._client.head(f"https://{host}/v2/")
        except httpx.HTTPError:
            return False
        return True

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Requests.

    def _send(self, method: str, url: str, *, stream: bool = False, **more: Any) -> httpx.Response:
        """The answer to a request, after a challenge and redirects; RegistryError for one that is no success.

        BrokenOffError when nobody answers.
        """
        content: Callable[[], Any] | None = more.pop("content", None)
        headers: dict[str, str] = more.pop("headers", {})
        target = urljoin(self._base, url)
        challenged = False
        for _ in range(_REDIRECTS + 2):
            mine = dict(headers)
            if self._authorization and target.startswith(self._origin + "/"):
                mine["Authorization"] = self._authorization
            body = content() if content is not None else None
            answer = self._ask(self._client.build_request(method, target, headers=mine, content=body, **more), stream)
            if answer.status_code == 401 and not challenged:
                challenged = True
                answer.close()
                self._authorize(answer.headers.get("www-authenticate", ""))
            elif answer.is_redirect and "location" in answer.headers:
                answer.close()
                target = urljoin(target, answer.headers["location"])
                self._refuse_downgrade(target)
            elif answer.is_success:
                return answer
            else:
                raise self._refused(answer, method)
        raise RegistryError(f"{self.name.repository}: too many redirects", 310)

    def _ask(self, request: httpx.Request, stream: bool) -> httpx.Response:
        try:
            return self._client.send(request, stream=stream)
        except httpx.HTTPError as error:
            raise BrokenOffError(f"{self._origin}: {str(error) or type(error).__name__}", code=1) from None

    def _refuse_downgrade(self, target: str) -> None:
        if urlsplit(target).scheme != "https" and not self._plain:
            raise RegistryError(f"{self.name.repository}: redirects to {target:.200}, which is not https", 310)

    def _refused(self, answer: httpx.Response, method: str) -> RegistryError:
        with contextlib.suppress(httpx.HTTPError):
            answer.read()
        said = ""
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            said = str(answer.json()["errors"][0].get("message") or answer.json()["errors"][0]["code"])
        answer.close()
        hint = {
            401: "log in with podman login, or docker login",
            403: "you may not",
            404: "no such image there, or not for you",
            429: "too many requests: wait a while",
        }.get(answer.status_code)
        what = said or answer.reason_phrase
        return RegistryError(f"{self.name}: {method}: {answer.status_code} {what:.300}", answer.status_code, hint=hint)

    # Authorization: the challenge says how ("Token Authentication Specification" of distribution).

    def _authorize(self, challenge: str) -> None:
        kind, _, rest = challenge.partition(" ")
        found = dict(_CHALLENGE.findall(rest))
        if kind.lower() == "basic" and self._credentials is not None:
            self._authorization = _basic(self._credentials)
        elif kind.lower() == "bearer" and "realm" in found:
            self._authorization = f"Bearer {self._token(found)}"
        else:
            raise RegistryError(
                f"{self.name.repository}: authentication required", 401, hint="podman login, or docker login"
            )

    def _token(self, challenge: Mapping[str, str]) -> str:
        realm = challenge["realm"]
        self._refuse_downgrade(realm)
        params = {"service": challenge.get("service", ""), "scope": self._scope}
        if self._credentials is not None and self._credentials.is_token:
            form = {**params, "grant_type": "refresh_token", "refresh_token": self._credentials.password}
            request = self._client.build_request("POST", realm, data={**form, "client_id": "unionfsd"})
        else:
            headers = {}
            if self._credentials is not None:
                headers["Authorization"] = _basic(self._credentials)
            request = self._client.build_request("GET", realm, params=params, headers=headers)
        answer = self._ask(request, stream=False)
        if not answer.is_success:
            raise self._refused(answer, "token")
        with contextlib.suppress(ValueError):
            document = answer.json()
            if isinstance(document, dict) and (token := document.get("token") or document.get("access_token")):
                return str(token)
        raise RegistryError(f"{self.name.repository}: its realm gave no token", 401)

    # Reading.

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """(bytes, media type) of the manifest or index of a tag or digest; verified when it is a digest."""
        answer = self._again(lambda: self._send("GET", f"manifests/{reference}", headers={"Accept": _ACCEPT}))
        raw = answer.content
        if ":" in reference and not digests.matches(digests.checked(reference), raw):
            raise UserError(f"{self.name}: what came for {reference} has another digest")
        return raw, answer.headers.get("content-type", "").partition(";")[0].strip()

    def _again(self, ask: Callable[[], httpx.Response]) -> httpx.Response:
        """Ask a few times while there is hope."""
        for attempt in range(_TRIES):
            try:
                return ask()
            except BrokenOffError:
                if attempt == _TRIES - 1:
                    raise
            except RegistryError as error:
                if error.status not in _RETRIED or attempt == _TRIES - 1:
                    raise
            time.sleep(0.2 * 2**attempt)
        raise AssertionError

    def open(self, digest: str, start: int = 0) -> Readable:
        """The bytes of a blob from `start` on."""
        return _Download(self, digest, start)

    def stream(self, digest: str, start: int) -> tuple[httpx.Response, int]:
        """(an answer to be read, where in the blob it begins)."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        answer = self._again(lambda: self._send("GET", f"blobs/{digest}", stream=True, headers=headers))
        return answer, start if answer.status_code == 206 else 0

    def document(self, digest: str) -> bytes:
        """A small blob; verified by the caller."""
        return blobs.small(self.open(digest), digest)

    def nested(self, digest: str) -> bytes:
        """A manifest that an index names."""
        return self.manifest(digest)[0]

    def find_manifest(self, reference: str) -> bytes | None:
        """The manifest of a tag or digest; None when there is none."""
        try:
            return self.manifest(reference)[0]
        except RegistryError as error:
            if error.status == 404:
                return None
            raise

    def has_blob(self, digest: str) -> bool:
        return self._has(f"blobs/{digest}")

    def _has(self, url: str) -> bool:
        try:
            self._again(lambda: self._send("HEAD", url, headers={"Accept": _ACCEPT}))
        except RegistryError as error:
            if error.status == 404:
                return False
            raise
        return True

    def referrers(self, digest: str) -> list[Descriptor]:
        """What refers to a manifest by its `subject`; by the fallback tag where the registry has no such list."""
        for url in (f"referrers/{digest}", f"manifests/{referrers_tag(digest)}"):
            try:
                return list(self._referrers(url))
            except RegistryError as error:
                if error.status not in (400, 404, 405):
                    raise
        return []

    def _referrers(self, url: str) -> Iterator[Descriptor]:
        for _ in range(_PAGES):
            answer = self._again(partial(self._send, "GET", url, headers={"Accept": documents.OCI_INDEX}))
            if documents.kind(answer.content, documents.OCI_INDEX) != documents.OCI_INDEX:
                return
            yield from documents.index(answer.content)
            more = answer.links.get("next", {}).get("url")
            if not more:
                return
            url = urljoin(str(answer.request.url), more)
            if not url.startswith(self._base):
                return

    # Writing.

    def upload(self, blob: Descriptor, read: Callable[[], Iterator[bytes]]) -> None:
        """Push a blob, unless it is there; `read` begins it anew for another attempt."""
        if self.has_blob(blob.digest):
            return

        def put() -> httpx.Response:
            begun = self._send("POST", "blobs/uploads/", headers={"Content-Length": "0"})
            where = urljoin(str(begun.request.url), begun.headers["location"])
            mark = "&" if "?" in where else "?"
            headers = {"Content-Length": str(blob.size), "Content-Type": "application/octet-stream"}
            return self._send("PUT", f"{where}{mark}digest={blob.digest}", headers=headers, content=read)

        self._again(put)

    def put_manifest(self, raw: bytes, media_type: str, reference: str) -> bool:
        """Push a manifest under a tag or its digest; whether the registry lists it with what its `subject` is."""
        headers = {"Content-Type": media_type}
        answer = self._again(lambda: self._send("PUT", f"manifests/{reference}", headers=headers, content=lambda: raw))
        return "oci-subject" in answer.headers


class _Download:
    """A blob as a stream, which goes on by itself when the line breaks."""

    def __init__(self, registry: Registry, digest: str, start: int) -> None:
        self._registry = registry
        self._digest = digest
        self._at = start
        self._pieces: Iterator[bytes] | None = None
        self._answer: httpx.Response | None = None
        self._skip = 0
        self._tries = _TRIES

    def read(self, size: int, /) -> bytes:
        while True:
            if self._pieces is None:
                self._answer, begins = self._registry.stream(self._digest, self._at)
                self._skip = self._at - begins
                self._pieces = self._answer.iter_raw(CHUNK)
            try:
                data = next(self._pieces, b"")
            except httpx.HTTPError as error:
                self._lost(error)
                continue
            if self._skip and data:
                data, self._skip = data[self._skip :], max(0, self._skip - len(data))
                if not data:
                    continue
            self._at += len(data)
            if not data and self._answer is not None:
                self._answer.close()
            return data

    def _lost(self, error: httpx.HTTPError) -> None:
        self._pieces = None
        self._tries -= 1
        if self._tries <= 0:
            raise BrokenOffError(f"{self._digest}: the download broke off: {error}", code=1) from None
        time.sleep(0.1)


def _basic(credentials: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()


def _is_here(host: str) -> bool:
    """Whether a host, perhaps with a port, is this machine."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if name == LOCAL:
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    return False


class Remote(sources.Resolved):
    """An image in a registry, as a `Source`."""

    def __init__(self, registry: Registry, platform: Mapping[str, str]) -> None:
        self.registry = registry
        name = registry.name
        raw, announced = registry.manifest(name.digest or name.tag or "latest")
        #: What the name stands for, which may be an index.
        self.top = raw
        super().__init__(registry, raw, announced, platform, (str(name._replace(digest=None)),) if name.tag else ())

    def blob(self, descriptor: Descriptor, start: int = 0) -> Readable:
        return self.registry.open(descriptor.digest, start)


def connect(name: Name, mirrors: Sequence[str], platform: Mapping[str, str], *, plain_http: bool) -> Remote:
    """The image of a name from the first that has it: `mirrors`, what registries.conf says, its registry. UserError."""
    places = [Endpoint(mirror, name.path, False) for mirror in mirrors] + registriesconf.load().endpoints(name)
    return _first([partial(_connect, name, at, platform, plain_http) for at in places])


def find(text: str, mirrors: Sequence[str], platform: Mapping[str, str], *, plain_http: bool) -> Remote:
    """The same of what `text` may mean, a name without a host perhaps (`registriesconf`)."""
    names = registriesconf.load().resolve(text)
    return _first([partial(connect, name, mirrors, platform, plain_http=plain_http) for name in names])


def _connect(name: Name, at: Endpoint, platform: Mapping[str, str], plain_http: bool) -> Remote:
    registry = Registry(name, plain_http=plain_http, at=at)
    try:
        return Remote(registry, platform)
    except BaseException:
        registry.close()
        raise


def _first(attempts: Sequence[Callable[[], Remote]]) -> Remote:
    """What the first gives that is not refused; the last one's failure counts."""
    for attempt in attempts[:-1]:
        with contextlib.suppress(RegistryError, BrokenOffError):
            return attempt()
    return attempts[-1]()
