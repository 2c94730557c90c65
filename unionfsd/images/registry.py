"""Registries: pulling from them and pushing to them (distribution-spec v1.1).

Rules this file obeys:

- Nothing a registry says is believed: manifests and blobs are verified against digests by who asked for them.
- A download that breaks off is gone on with where it was, a few times here, and by the next import after that.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import httpx

from unionfsd.errors import UserError
from unionfsd.images import blobs, documents, registriesconf, sources
from unionfsd.images import digest as digests
from unionfsd.images.auth import Credentials
from unionfsd.images.compress import BrokenOffError, Readable
from unionfsd.images.documents import Descriptor
from unionfsd.images.reference import Name
from unionfsd.images.registriesconf import Endpoint
from unionfsd.images.session import RETRIED, TRIES, RegistryError, Session, joined
from unionfsd.typed import Final, TypeVar

_ACCEPT: Final = ", ".join((*documents.MANIFESTS, *documents.INDEXES))
#: Of a list of referrers that are read at most; lists of tags are longer.
_PAGES: Final = 20
_TAG_PAGES: Final = 1000
#: Bytes of a download after which it may break off a few times again.
_PROGRESS: Final = 1 << 20
_Any = TypeVar("_Any")
_RANGE: Final = re.compile(r"bytes (\d+)-")


def referrers_tag(digest: str) -> str:
    """The tag of the list of what refers to a manifest, where the registry keeps none (distribution-spec 1.1)."""
    return digest.replace(":", "-")


class Registry:
    """The repository of `name` in its registry, or `at` another place, for reading and, with `push`, for writing.

    `plain_http` allows HTTP without TLS for any host. `also` are other repositories of the registry that are read.
    Safe to use from several threads.
    """

    def __init__(
        self,
        name: Name,
        *,
        push: bool = False,
        plain_http: bool = False,
        at: Endpoint | None = None,
        credentials: Credentials | None = None,
        also: Sequence[str] = (),
    ) -> None:
        self.name = name
        at = at or Endpoint(name.host, name.path, registriesconf.load().insecure(name))
        scopes = [f"repository:{at.path}:{'pull,push' if push else 'pull'}"]
        scopes += [f"repository:{path}:pull" for path in also]
        self._session = Session(str(name), at, scopes, plain_http=plain_http, credentials=credentials)

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Reading.

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """(bytes, media type) of the manifest or index of a tag or digest; verified when it is a digest."""
        answer = self._session.again(
            lambda: self._session.send("GET", f"manifests/{reference}", headers={"Accept": _ACCEPT})
        )
        raw = answer.content
        if ":" in reference and not digests.matches(digests.checked(reference), raw):
            raise UserError(f"{self.name}: what came for {reference} has another digest")
        return raw, answer.headers.get("content-type", "").partition(";")[0].strip()

    def open(self, digest: str, start: int = 0) -> Readable:
        """The bytes of a blob from `start` on."""
        return _Download(self, digest, start)

    def stream(self, digest: str, start: int) -> tuple[httpx.Response, int]:
        """(an answer to be read, where in the blob it begins)."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        answer = self._session.again(lambda: self._session.send("GET", f"blobs/{digest}", stream=True, headers=headers))
        if answer.status_code != 206:
            return answer, 0
        begins = _RANGE.match(answer.headers.get("content-range", ""))
        if begins is not None and int(begins[1]) != start:
            answer.close()
            raise RegistryError(f"{self.name}: another part of {digest} came than was asked for", 206)
        return answer, start

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
            self._session.again(lambda: self._session.send("HEAD", url, headers={"Accept": _ACCEPT}))
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
        for answer in self._pages(url, documents.OCI_INDEX, _PAGES):
            if documents.kind(answer.content, documents.OCI_INDEX) != documents.OCI_INDEX:
                return
            yield from documents.index(answer.content)

    def tags(self) -> Iterator[str]:
        """The tags of the repository, as the registry lists them."""
        for answer in self._pages("tags/list", "application/json", _TAG_PAGES):
            found = documents.load(answer.content, "list of tags").get("tags") or []
            if not isinstance(found, list):
                raise UserError(f"{self.name.repository}: not a list of tags", code=1)
            yield from (tag for tag in found if isinstance(tag, str))

    def _pages(self, url: str, media_type: str, most: int) -> Iterator[httpx.Response]:
        """A list that may come in parts, each with a link to the next."""
        for _ in range(most):
            ask = partial(self._session.send, "GET", url, headers={"Accept": media_type})
            answer = self._session.again(ask)
            yield answer
            more = answer.links.get("next", {}).get("url")
            if not more:
                return
            url = joined(str(answer.request.url), more)
            if not url.startswith(self._session.base):
                return

    # Writing.

    def upload(self, blob: Descriptor, read: Callable[[], Iterator[bytes]]) -> None:
        """Push a blob, unless it is there; `read` begins it anew for another attempt."""
        if self.has_blob(blob.digest):
            return

        def put() -> httpx.Response:
            begun = self._session.send("POST", "blobs/uploads/", headers={"Content-Length": "0"})
            if "location" not in begun.headers:
                raise RegistryError(f"{self.name}: says not where to push to", begun.status_code)
            where = joined(str(begun.request.url), begun.headers["location"])
            mark = "&" if "?" in where else "?"
            headers = {"Content-Length": str(blob.size), "Content-Type": "application/octet-stream"}
            return self._session.send("PUT", f"{where}{mark}digest={blob.digest}", headers=headers, content=read)

        self._session.again(put)

    def mount(self, digest: str, path: str) -> bool:
        """Let the registry take a blob from its repository `path`; False when it has not, or does not do that."""
        try:
            url = f"blobs/uploads/?mount={digest}&from={path}"
            begun = self._session.again(lambda: self._session.send("POST", url, headers={"Content-Length": "0"}))
        except RegistryError as error:
            if error.status in RETRIED:
                raise
            return False
        if begun.status_code != 201 and "location" in begun.headers:  # an upload was begun that nobody wants
            with contextlib.suppress(RegistryError, BrokenOffError):
                self._session.send("DELETE", joined(str(begun.request.url), begun.headers["location"]))
        return begun.status_code == 201

    def put_manifest(self, raw: bytes, media_type: str, reference: str) -> bool:
        """Push a manifest under a tag or its digest; whether the registry lists it with what its `subject` is."""
        headers = {"Content-Type": media_type}
        answer = self._session.again(
            lambda: self._session.send("PUT", f"manifests/{reference}", headers=headers, content=lambda: raw)
        )
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
        self._tries = TRIES
        self._good = start

    def read(self, size: int, /) -> bytes:
        while True:
            if self._pieces is None:
                self._answer, begins = self._registry.stream(self._digest, self._at)
                self._skip = self._at - begins
                self._pieces = self._answer.iter_raw()  # as it comes: what is held back is lost when the line breaks
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
        self._tries = self._tries - 1 if self._at - self._good < _PROGRESS else TRIES - 1
        self._good = self._at
        if self._tries <= 0:
            raise BrokenOffError(f"{self._digest}: the download broke off: {error}", code=1) from None
        time.sleep(0.1)


class Remote(sources.Resolved):
    """An image in a registry, as a `Source`."""

    def __init__(self, registry: Registry, platform: Mapping[str, str]) -> None:
        self.registry = registry
        name = registry.name
        raw, announced = registry.manifest(name.digest or name.tag or "latest")
        super().__init__(registry, raw, announced, platform, (str(name._replace(digest=None)),) if name.tag else ())

    def blob(self, descriptor: Descriptor, start: int = 0) -> Readable:
        return self.registry.open(descriptor.digest, start)


def connect(
    name: Name, mirrors: Sequence[str], platform: Mapping[str, str], *, plain_http: bool = False, insecure: bool = False
) -> Remote:
    """The image of a name from the first that has it: `mirrors`, what registries.conf says, its registry. UserError."""
    places = [Endpoint(mirror, name.path, False) for mirror in mirrors] + registriesconf.load().endpoints(name)
    places = [at._replace(insecure=at.insecure or insecure) for at in places]
    return _first([partial(_connect, name, at, platform, plain_http) for at in places])


def find(
    text: str, mirrors: Sequence[str], platform: Mapping[str, str], *, plain_http: bool = False, insecure: bool = False
) -> Remote:
    """The same of what `text` may mean, a name without a host perhaps (`registriesconf`)."""
    names = registriesconf.load().resolve(text)
    ways = {"plain_http": plain_http, "insecure": insecure}
    return _first([partial(connect, name, mirrors, platform, **ways) for name in names])


def writable(name: Name, *, also: Sequence[str] = (), plain_http: bool = False, insecure: bool = False) -> Registry:
    """The repository of `name` to push to, and others of its registry that blobs may be taken from."""
    at = Endpoint(name.host, name.path, insecure or registriesconf.load().insecure(name))
    return Registry(name, push=True, plain_http=plain_http, at=at, also=also)


def tags(text: str, *, plain_http: bool = False, insecure: bool = False) -> list[str]:
    """The tags of a repository, sorted, from the first place that has it; UserError."""
    name = registriesconf.load().resolve(text)[0]
    places = [at._replace(insecure=at.insecure or insecure) for at in registriesconf.load().endpoints(name)]
    return _first([partial(_tags, name, at, plain_http) for at in places])


def _tags(name: Name, at: Endpoint, plain_http: bool) -> list[str]:
    with Registry(name, plain_http=plain_http, at=at) as registry:
        return sorted(registry.tags())


def _connect(name: Name, at: Endpoint, platform: Mapping[str, str], plain_http: bool) -> Remote:
    registry = Registry(name, plain_http=plain_http, at=at)
    try:
        return Remote(registry, platform)
    except BaseException:
        registry.close()
        raise


def _first(attempts: Sequence[Callable[[], _Any]]) -> _Any:
    """What the first gives that has it, and gives what it should; the last one's failure counts."""
    for attempt in attempts[:-1]:
        with contextlib.suppress(UserError):
            return attempt()
    return attempts[-1]()
