"""The store of images on disk: blobs by digest, layers by ChainID, names; whole after a crash, shared by processes.

::

    ROOT/oci-layout, index.json     names and manifests: the store is itself an OCI image layout
    ROOT/blobs/sha256/HEX           manifests, configurations, layers as they came
    ROOT/layers/HEX/                a layer: diff/ (overlayfs's format), link, lower, tree.zst, layer.json
    ROOT/l/NAME                     symlinks of 26 characters to the diffs, as overlay2 has them
    ROOT/containers/NAME/           writable layers
    ROOT/stage/                     what is being made

Rules this file obeys:

- Whatever has its final name is complete and on disk: it is made in ``stage``, synced, and renamed.
- A stage belongs to who holds a flock on its directory; one that nobody holds is litter, or a blob to go on with.
- ``lock`` is held shared by those who add, and exclusively by those who collect; ``names.lock`` by who changes names. A
  layer's directory is held shared by every mount of it, through a descriptor that the daemon keeps.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence

from unionfsd import syscalls
from unionfsd.errors import BUSY, UserError, reason
from unionfsd.images import beneath, documents, reference, who
from unionfsd.images import digest as digests
from unionfsd.images.documents import Config, Descriptor, Manifest
from unionfsd.images.incoming import Incoming
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final, NamedTuple

#: No such image, layer or container.
NOT_FOUND: Final = 1
_DIRECTORIES: Final = (b"blobs", b"layers", b"l", b"containers", b"stage")
_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_MAX_NAMES: Final = 64 << 20
_READ_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def default_root() -> str:
    """Where the store is unless told: for root ``/var/lib/unionfsd``, else ``$XDG_DATA_HOME/unionfsd``.

    A user's in a namespace is another, ``unionfsd-userns``: in that one owners are real.
    """
    if not who.is_user():
        return "/var/lib/unionfsd"
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(data, "unionfsd-userns" if who.is_unshared() else "unionfsd")


class Image(NamedTuple):
    """An image of the store: its names, the lowest layer first."""

    names: tuple[str, ...]
    manifest: Manifest
    config: Config

    @property
    def digest(self) -> str:
        return self.manifest.digest


class Layer(NamedTuple):
    """A layer of the store; `facts` is its ``layer.json``."""

    chain: str
    facts: dict[str, Any]


class Stage:
    """A directory in which something is made, held by a lock; gone when left, unless `keep` is set."""

    def __init__(self, store: Store, name: bytes, fd: Fd) -> None:
        self._store = store
        self._name = name
        self.fd = fd
        self.keep = False

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if not self.keep:
                beneath.remove(self._store.stage.fd, self._name)
        finally:
            self.fd.close()


class Store:
    """The store in the directory `root`, made if it is not there; UserError when it cannot be."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        try:
            # For its owner alone: layers have setuid programs that nobody will mend (CVE-2021-41091 was Docker's).
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            self.fd = Fd(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            opened = [self._directory(name) for name in _DIRECTORIES]
            self.blobs, self.layers, self.links, self.containers, self.stage = opened
            self._by_algorithm = {name: self._blob_directory(name) for name in ("sha256", "sha512")}
            if syscalls.stat_or_none(self.fd.fd, b"oci-layout") is None:
                self._begin()
        except OSError as error:
            raise UserError(f"{self.root}: cannot be a store: {reason(error)}", hint="--root names another") from None

    def _directory(self, name: bytes) -> Fd:
        with contextlib.suppress(FileExistsError):
            syscalls.mkdir_at(self.fd.fd, name, 0o711)
        return syscalls.open_dir(self.fd.fd, name)

    def _blob_directory(self, algorithm: str) -> Fd:
        with contextlib.suppress(FileExistsError):
            syscalls.mkdir_at(self.blobs.fd, algorithm.encode(), 0o711)
        return syscalls.open_dir(self.blobs.fd, algorithm.encode())

    def _begin(self) -> None:
        with self.lock(b"names.lock", shared=False):
            if syscalls.stat_or_none(self.fd.fd, b"index.json") is None:
                beneath.replace_file(self.fd.fd, b"index.json", documents.dump({"schemaVersion": 2, "manifests": []}))
            beneath.replace_file(self.fd.fd, b"oci-layout", _LAYOUT)

    # Locks.

    @contextlib.contextmanager
    def lock(self, name: bytes = b"lock", *, shared: bool, wait: bool = True) -> Iterator[None]:
        """Hold one of the store's locks; UserError when it is taken and we do not wait."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with Fd(os.open(name, flags, 0o600, dir_fd=self.fd.fd)) as fd:
            how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            try:
                fcntl.flock(fd.fd, how)
            except BlockingIOError:
                raise UserError(f"{self.root}: the store is in use", hint="try again later", code=BUSY) from None
            yield

    def make(self, name: bytes) -> Stage:
        """The stage `name`, held; waits for another process that holds it, and finds what one that died left in it."""
        while True:
            with contextlib.suppress(FileExistsError):
                syscalls.mkdir_at(self.stage.fd, name, 0o700)
            try:
                fd = Fd(os.open(name, _READ_DIR, dir_fd=self.stage.fd))
            except FileNotFoundError:
                continue
            fcntl.flock(fd.fd, fcntl.LOCK_EX)
            st = syscalls.stat_or_none(self.stage.fd, name)
            if st is not None and st.st_ino == os.fstat(fd.fd).st_ino:
                return Stage(self, name, fd)
            fd.close()

    def sweep(self, *, everything: bool = False) -> None:
        """Remove stages that nobody holds; blobs that can be gone on with only with `everything`."""
        for name in beneath.names(self.stage.fd):
            with contextlib.suppress(FileNotFoundError), Fd(os.open(name, _READ_DIR, dir_fd=self.stage.fd)) as fd:
                begun = name.startswith(b"blob-") and syscalls.stat_or_none(fd.fd, b"data") is not None
                if begun and not everything:
                    continue
                try:
                    fcntl.flock(fd.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                beneath.remove(self.stage.fd, name)

    # Blobs.

    def has_blob(self, digest: str) -> bool:
        algorithm, name = digests.split(digest)
        return syscalls.stat_or_none(self._by_algorithm[algorithm].fd, name.encode()) is not None

    def blob_path(self, digest: str) -> str:
        algorithm, name = digests.split(digest)
        return os.path.join(self.root, "blobs", algorithm, name)

    def open_blob(self, digest: str) -> Fd:
        """A blob to read; UserError when the store has none of that digest."""
        algorithm, name = digests.split(digest)
        try:
            return syscalls.open_data(self._by_algorithm[algorithm].fd, name.encode(), os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{digest}: not in the store {self.root}", code=NOT_FOUND) from None

    def document(self, digest: str) -> bytes:
        """A small blob, verified."""
        self.open_blob(digest).close()
        algorithm, name = digests.split(digest)
        data = beneath.read_file(self._by_algorithm[algorithm].fd, name.encode(), documents.MAX_DOCUMENT)
        if not digests.matches(digest, data):
            raise UserError(f"{digest}: damaged in the store {self.root}", hint="unionfsctl image verify tells more")
        return data

    def add_document(self, data: bytes) -> str:
        """Keep a small blob; returns its digest."""
        digest = digests.of(data)
        if not self.has_blob(digest):
            with self.make(b"blob-" + digest.replace(":", "-").encode()) as stage:
                beneath.remove(stage.fd.fd, b"data")
                beneath.write_file(stage.fd.fd, b"data", data)
                self._publish_blob(stage, digest)
        return digest

    def _publish_blob(self, stage: Stage, digest: str) -> None:
        algorithm, name = digests.split(digest)
        directory = self._by_algorithm[algorithm].fd
        syscalls.renameat2(stage.fd.fd, b"data", directory, name.encode())
        beneath.sync_directory(directory)

    def incoming(self, digest: str) -> Incoming:
        """A blob to be written; another process that writes the same is waited for."""
        return Incoming(self, self.make(b"blob-" + digest.replace(":", "-").encode()), digest)

    def all_blobs(self) -> Iterator[str]:
        for algorithm, directory in self._by_algorithm.items():
            yield from (f"{algorithm}:{os.fsdecode(name)}" for name in beneath.names(directory.fd))

    def remove_blob(self, digest: str) -> int:
        """Remove a blob; returns the bytes it had."""
        algorithm, name = digests.split(digest)
        st = syscalls.stat_at(self._by_algorithm[algorithm].fd, name.encode())
        syscalls.unlink_at(self._by_algorithm[algorithm].fd, name.encode())
        return st.st_size

    # Layers.

    def layer(self, chain: str) -> Layer | None:
        """The layer of a ChainID; None when it is not unpacked. UserError for one whose record is damaged."""
        try:
            with self._open_layer(chain) as fd:
                facts = documents.load(beneath.read_file(fd.fd, b"layer.json", 1 << 20), f"{chain}: layer.json")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{chain}: layer.json: {reason(error)}", code=1) from None
        words = all(isinstance(facts.get(key), str) for key in ("chain", "diff_id", "tree"))
        if not words or not isinstance(facts.get("size"), int):
            raise UserError(f"{chain}: layer.json: not what it was", hint="import the image again", code=1)
        return Layer(chain, facts)

    def has_layer(self, chain: str) -> bool:
        """Whether a layer is there, with a good record."""
        with contextlib.suppress(UserError):
            return self.layer(chain) is not None
        return False

    @contextlib.contextmanager
    def _free(self, chain: str) -> Iterator[None]:
        """Hold a layer that no mount holds; UserError."""
        with self._open_layer(chain) as fd:
            try:
                fcntl.flock(fd.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{chain}: damaged, and mounted", hint="unmount it first", code=BUSY) from None
            yield

    def size_of(self, chain: str) -> int:
        """The bytes of the files of a layer; 0 for one that is not there, or damaged."""
        with contextlib.suppress(UserError):
            found = self.layer(chain)
            return found.facts["size"] if found else 0
        return 0

    def _open_layer(self, chain: str) -> Fd:
        return Fd(os.open(layer_name(chain), _READ_DIR, dir_fd=self.layers.fd))

    def open_diff(self, chain: str) -> Fd:
        """O_PATH fd of the directory of a layer; UserError when it is not unpacked."""
        try:
            with self._open_layer(chain) as fd:
                return syscalls.open_dir(fd.fd, b"diff")
        except FileNotFoundError:
            raise UserError(f"{chain}: not unpacked in {self.root}", hint="import the image again") from None

    def hold_layer(self, chain: str) -> Fd:
        """A descriptor that keeps a layer from being collected while it is open; UserError when it is not there."""
        try:
            fd = self._open_layer(chain)
            fcntl.flock(fd.fd, fcntl.LOCK_SH)
            # Who collects holds it for a moment, and may have taken it away.
            if syscalls.stat_at(self.layers.fd, layer_name(chain)).st_ino == os.fstat(fd.fd).st_ino:
                return fd
        except FileNotFoundError:
            pass
        raise UserError(f"{chain}: not unpacked in {self.root}", hint="import the image again")

    def diff_path(self, chain: str) -> str:
        return os.path.join(self.root, "layers", os.fsdecode(layer_name(chain)), "diff")

    def link_path(self, chain: str) -> str:
        """The short path of a layer's directory, for a mount's options."""
        return os.path.join(self.root, "l", link_name(chain))

    def all_layers(self) -> Iterator[str]:
        for name in beneath.names(self.layers.fd):
            yield f"sha256:{os.fsdecode(name)}"

    def publish_layer(self, stage: Stage, chain: str) -> None:
        """Give the finished directory ``layer`` of a stage its place. It, and what is in it, is on disk already.

        One that is there without a good record gives way; UserError while a mount holds that.
        """
        name = layer_name(chain)
        try:
            syscalls.renameat2(stage.fd.fd, b"layer", self.layers.fd, name)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            if not self.has_layer(chain):
                with self._free(chain):
                    syscalls.renameat2(stage.fd.fd, b"layer", self.layers.fd, name, syscalls.RENAME_EXCHANGE)
        beneath.sync_directory(self.layers.fd)
        self.link(chain)

    def link(self, chain: str) -> None:
        """The short name of a layer."""
        target = os.path.join("..", "layers", os.fsdecode(layer_name(chain)), "diff").encode()
        with contextlib.suppress(FileExistsError):
            syscalls.symlink_at(target, self.links.fd, link_name(chain).encode())

    def remove_layer(self, chain: str) -> bool:
        """Remove a layer, out of sight in one step, then away; False when a mount holds it, and it stays."""
        name = layer_name(chain)
        with self._open_layer(chain) as fd, self.make(b"gone-" + name) as stage:
            try:
                fcntl.flock(fd.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            with contextlib.suppress(FileNotFoundError):
                syscalls.unlink_at(self.links.fd, link_name(chain).encode())
            beneath.remove(stage.fd.fd, b"layer")
            syscalls.renameat2(self.layers.fd, name, stage.fd.fd, b"layer")
        return True

    # Names.

    def _index(self) -> list[Descriptor]:
        return list(documents.index(beneath.read_file(self.fd.fd, b"index.json", _MAX_NAMES)))

    @contextlib.contextmanager
    def _changing_names(self) -> Iterator[list[Descriptor]]:
        with self.lock(b"names.lock", shared=False):
            entries = self._index()
            yield entries
            document = {"schemaVersion": 2, "manifests": [entry.to_json() for entry in entries]}
            beneath.replace_file(self.fd.fd, b"index.json", documents.dump(document))

    def set_name(self, name: str | None, descriptor: Descriptor) -> None:
        """Let `name` be the image of `descriptor`; None keeps one without a name."""
        with self._changing_names() as entries:
            entries[:] = [
                entry for entry in entries if name is None or entry.annotations.get(documents.REF_NAME) != name
            ]
            if name is None and any(entry.digest == descriptor.digest for entry in entries):
                return
            named = {documents.REF_NAME: name} if name is not None else {}
            entries[:] = [
                entry
                for entry in entries
                if entry.digest != descriptor.digest or documents.REF_NAME in entry.annotations
            ]
            entries.append(Descriptor(descriptor.media_type, descriptor.digest, descriptor.size, named))

    def remove_name(self, name: str) -> None:
        with self._changing_names() as entries:
            entries[:] = [entry for entry in entries if entry.annotations.get(documents.REF_NAME) != name]

    def remove_image(self, digest: str) -> None:
        """Forget an image and all its names."""
        with self._changing_names() as entries:
            entries[:] = [entry for entry in entries if entry.digest != digest]

    def images(self) -> list[Image]:
        """All images, in the order they came; UserError for a damaged one."""
        named: dict[str, list[str]] = {}
        for entry in self._index():
            found = named.setdefault(entry.digest, [])
            if (name := entry.annotations.get(documents.REF_NAME)) is not None:
                found.append(name)
        return [self._image(digest, tuple(names)) for digest, names in named.items()]

    def _image(self, digest: str, names: tuple[str, ...]) -> Image:
        manifest = documents.manifest(self.document(digest))
        return Image(names, manifest, documents.config(self.document(manifest.config.digest)))

    def image(self, text: str) -> Image:
        """The image that `text` names: a name, a digest, or the beginning of one; UserError."""
        entries = self._index()
        digest = self._resolve(text, entries)
        if digest is None:
            raise UserError(f"{text}: no such image in {self.root}", hint="unionfsctl image ls", code=NOT_FOUND)
        names = [entry.annotations.get(documents.REF_NAME) for entry in entries if entry.digest == digest]
        return self._image(digest, tuple(name for name in names if name is not None))

    @staticmethod
    def _resolve(text: str, entries: Sequence[Descriptor]) -> str | None:
        for wanted in possible_names(text):
            for entry in entries:
                if entry.annotations.get(documents.REF_NAME) == wanted:
                    return entry.digest
        digits = text.removeprefix("sha256:")
        found = {entry.digest for entry in entries if entry.digest.removeprefix("sha256:").startswith(digits)}
        if len(digits) >= 6 and len(found) > 1:
            raise UserError(f"{text}: the beginning of several digests")
        return found.pop() if len(digits) >= 6 and found else None


def possible_names(text: str) -> list[str]:
    """What a name without a host may mean in a store, the most likely first."""
    found = [text]
    for host in (reference.LOCAL, reference.DOCKER_HUB):
        with contextlib.suppress(UserError):
            found.append(str(reference.name(text, host=host)))
    return found


def layer_name(chain: str) -> bytes:
    """What the directory of a layer is called."""
    algorithm, name = digests.split(chain)
    if algorithm != "sha256":  # of a single layer whose DiffID is of another algorithm
        name = digests.split(digests.of(chain.encode()))[1]
    return name.encode()


def link_name(chain: str) -> str:
    """The short name of a layer: 26 characters, as overlay2's are, and always the same ones."""
    return base64.b32encode(bytes.fromhex(layer_name(chain).decode()))[:26].decode()
