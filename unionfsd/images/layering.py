"""From the stream of a layer to a layer of the store: verified on the way, unpacked, its tree written down, published.

`fetch` may run for several layers of an image at once, `settle` only in their order: what a layer hides, and how
directories look that it only implies, depends on the layers below it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from unionfsd import syscalls
from unionfsd.errors import UserError, reason
from unionfsd.images import beneath, compress, documents, store, tree
from unionfsd.images import digest as digests
from unionfsd.images.below import Below
from unionfsd.images.compress import BrokenOffError, Readable, Verified
from unionfsd.images.documents import Descriptor
from unionfsd.images.events import Events
from unionfsd.images.incoming import At, Incoming
from unionfsd.images.inodedigests import InodeDigests
from unionfsd.images.store import Layer, Stage, Store
from unionfsd.images.tarread import Limits, TarReader
from unionfsd.images.unpack import Unpacker
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final, NamedTuple

_MANIFEST: Final = b"tree.zst"
INDEX: Final = b"tree.index"
_BATCH: Final = 1000
_MAX_INDEX: Final = 1 << 30
_ZSTD_LEVEL: Final = 3


class Wanted(NamedTuple):
    """A layer of an image: the blob, the DiffID it must have, its ChainID and that of the layer below it."""

    descriptor: Descriptor
    diff_id: str
    chain: str
    parent: str | None

    @property
    def label(self) -> str:
        return self.descriptor.digest


class Fetched(NamedTuple):
    """A layer whose objects are made and whose whiteouts are yet to be."""

    wanted: Wanted
    stage: Stage
    unpacker: Unpacker
    diff: Fd


#: Gives the bytes of a blob from a position on.
Open = Callable[[Descriptor, int], Readable]


class CancelledError(Exception):
    """Another layer failed, or somebody interrupted us."""


class Layering:
    """The making of layers in `into`; `cancel` stops all of it."""

    def __init__(self, into: Store, open_blob: Open, limits: Limits, events: Events, *, keep_blobs: bool) -> None:
        self._store = into
        self._open = open_blob
        self._limits = limits
        self._events = events
        self._keep = keep_blobs
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def _seen(self, label: str) -> Callable[[int], None]:
        def seen(count: int) -> None:
            if self._cancelled.is_set():
                raise CancelledError
            self._events.advance(label, count)

        return seen

    def fetch(self, wanted: Wanted) -> Fetched | None:
        """Make the objects of a layer; None when the store has it. UserError for one that is not what it should be."""
        if wanted.descriptor.size > self._limits.size * 2:  # as it came; headers and padding count
            hint = "--max-layer raises the limit"
            raise UserError(f"{wanted.label}: {wanted.descriptor.size} bytes are too many for a layer", hint=hint)
        if self._there(wanted):
            return None
        stage = self._store.make(b"layer-" + store.layer_name(wanted.chain))
        try:
            if self._there(wanted):  # another process made it while we waited
                stage.__exit__()
                return None
            self._events.begin(wanted.label, "unpack", wanted.descriptor.size)
            beneath.remove(stage.fd.fd, b"layer")
            syscalls.mkdir_at(stage.fd.fd, b"layer", 0o711)
            with syscalls.open_dir(stage.fd.fd, b"layer") as layer:
                syscalls.mkdir_at(layer.fd, b"diff", 0o755)
                diff = syscalls.open_dir(layer.fd, b"diff")
            unpacker = Unpacker(diff, self._limits)
            self._unpack(wanted, unpacker)
            self._events.end(wanted.label)
            return Fetched(wanted, stage, unpacker, diff)
        except BaseException as error:
            stage.__exit__()
            if isinstance(error, UserError) and wanted.label not in error.message:
                error.message = f"{wanted.label}: {error.message}"
            raise

    def _there(self, wanted: Wanted) -> bool:
        if not self._store.has_layer(wanted.chain):
            return False
        self._store.link(wanted.chain)  # it was published before a crash, perhaps
        if self._keep and not self._store.has_blob(wanted.descriptor.digest):
            self._events.begin(wanted.label, "download", wanted.descriptor.size)
            with self._store.incoming(wanted.descriptor.digest) as incoming:
                if not incoming.complete:
                    for _ in self._kept(wanted, incoming):
                        pass
            self._events.end(wanted.label)
        else:
            self._events.begin(wanted.label, "there", None)
        return True

    def _unpack(self, wanted: Wanted, unpacker: Unpacker) -> None:
        descriptor = wanted.descriptor
        if descriptor.media_type.endswith("+encrypted"):
            raise UserError(f"{descriptor.digest}: an encrypted layer")
        if not self._keep:
            stream = Verified(self._open(descriptor, 0), descriptor.digest, descriptor.size, self._seen(wanted.label))
            self.unpack_stream(wanted, stream, unpacker)
            return
        with self._store.incoming(descriptor.digest) as incoming:
            if incoming.complete:
                self._unpack_kept(wanted, unpacker)
                return
            if incoming.have and self._completed(wanted, incoming):
                self._events.begin(wanted.label, "unpack", descriptor.size)  # it is read again
                self._unpack_kept(wanted, unpacker)
                return
            try:
                self.unpack_stream(wanted, _Iterated(self._kept(wanted, incoming)), unpacker)
            except (BrokenOffError, CancelledError):
                raise
            except BaseException:
                incoming.restart()
                raise

    def _unpack_kept(self, wanted: Wanted, unpacker: Unpacker) -> None:
        descriptor = wanted.descriptor
        with self._store.open_blob(descriptor.digest) as fd:
            stream = Verified(At(fd.fd, 0), descriptor.digest, descriptor.size, self._seen(wanted.label))
            self.unpack_stream(wanted, stream, unpacker)

    def _completed(self, wanted: Wanted, incoming: Incoming) -> bool:
        """Go on with a blob that was begun once; False when what there was, was wrong, and is gone."""
        try:
            for _ in self._kept(wanted, incoming):
                pass
        except BrokenOffError:
            raise
        except UserError:
            return False
        return True

    def _kept(self, wanted: Wanted, incoming: Incoming) -> Iterator[bytes]:
        """The bytes of a blob while they are written to the store: first what came before, then the rest."""
        descriptor = wanted.descriptor
        if incoming.have > descriptor.size:
            incoming.restart()
        had = incoming.have
        stream = Verified(
            _Tee(incoming, had, lambda: self._open(descriptor, had) if had < descriptor.size else io.BytesIO()),
            descriptor.digest,
            descriptor.size,
            self._seen(wanted.label),
        )
        try:
            while data := stream.read(compress.CHUNK):
                yield data
        except BrokenOffError:
            raise
        except UserError:
            incoming.restart()
            raise
        incoming.commit(verified=True)

    @staticmethod
    def unpack_stream(wanted: Wanted, stream: Readable, unpacker: Unpacker) -> None:
        """Make the objects that are in the blob `stream`; UserError unless it has the DiffID."""
        algorithm = digests.split(wanted.diff_id)[0]
        with compress.Ahead(compress.pieces(stream)) as found:
            source = compress.Source(found, unpacker._limits.size * 2, algorithm=algorithm)
            reader = TarReader(source, unpacker._limits)
            unpacker.unpack(reader)
            source.drain()
        if source.digest != wanted.diff_id:
            raise UserError(f"{wanted.descriptor.digest}: unpacks to {source.digest}, and should to {wanted.diff_id}")

    def settle(self, fetched: Fetched, parents: Sequence[str]) -> None:
        """Finish a layer over its `parents`, the lowest first, and give it its place; on disk when this returns."""
        wanted = fetched.wanted
        with fetched.stage as stage:
            fetched.unpacker.finish(Below([self._store.open_diff(chain) for chain in reversed(parents)]))
            with syscalls.open_dir(stage.fd.fd, b"layer") as layer:
                written = write_manifest(layer, fetched.diff, fetched.unpacker.digests)
                facts = {
                    "chain": wanted.chain,
                    "diff_id": wanted.diff_id,
                    "parent": wanted.parent,
                    "size": fetched.unpacker.size,
                    "tree": written.tree_digest,
                    "index": written.index_digest,
                    "notes": dict(fetched.unpacker.notes),
                }
                beneath.write_file(layer.fd, b"link", store.link_name(wanted.chain).encode())
                lower = ":".join(f"l/{store.link_name(chain)}" for chain in reversed(parents))
                beneath.write_file(layer.fd, b"lower", lower.encode())
                beneath.write_file(layer.fd, b"layer.json", documents.dump(facts))
            syscalls.syncfs(stage.fd.fd)
            self._store.publish_layer(stage, wanted.chain)
        for note, count in fetched.unpacker.notes.items():
            self._events.note(f"{wanted.label}: not kept as it was, {count} times: {note}")


@contextlib.contextmanager
def unpacked(into: Store, wanted: Wanted, below: Below) -> Iterator[Iterator[bytes]]:
    """The manifest of the tree that a layer's blob, which the store has, makes now; there for as long as it lasts."""
    with into.lock(shared=True), into.make(b"again-" + store.layer_name(wanted.chain)) as stage:
        beneath.remove(stage.fd.fd, b"diff")
        syscalls.mkdir_at(stage.fd.fd, b"diff", 0o755)
        diff = syscalls.open_dir(stage.fd.fd, b"diff")
        unpacker = Unpacker(diff, Limits())
        with into.open_blob(wanted.descriptor.digest) as fd:
            stream = Verified(At(fd.fd, 0), wanted.descriptor.digest, wanted.descriptor.size)
            Layering.unpack_stream(wanted, stream, unpacker)
        unpacker.finish(below)
        yield map(tree.line, tree.entries(diff, unpacker.digests))


class _Tee:
    """What an incoming blob has, then what `rest` opens, which is written to it as it passes."""

    def __init__(self, incoming: Incoming, had: int, rest: Callable[[], Readable]) -> None:
        self._incoming = incoming
        self._kept = incoming.reader()
        self._left = had
        self._rest = rest
        self._stream: Readable | None = None

    def read(self, size: int, /) -> bytes:
        if self._left > 0:
            data = self._kept.read(min(size, self._left))
            self._left -= len(data)
            return data
        if self._stream is None:
            self._stream = self._rest()
        data = self._stream.read(size)
        self._incoming.write(data)
        return data


class _Iterated:
    """Pieces as a stream that gives each as it is."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def read(self, size: int, /) -> bytes:
        return next(filter(None, self._pieces), b"")


class Written(NamedTuple):
    """What says of a layer what it must hold: digests of the tree manifest, before compression, and of its index."""

    tree_digest: str
    index_digest: str


def write_manifest(layer: Fd, diff: Fd, known: InodeDigests | None) -> Written:
    """Write the tree manifest of `diff`, and its index, into the directory `layer`."""
    import zstandard

    made = hashlib.sha256()
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    indexer = tree.Indexer()
    with syscalls.create_at(layer.fd, _MANIFEST, 0o644) as fd:
        at = 0
        found = _indexed(tree.entries(diff, known), indexer)
        while data := b"".join(itertools.islice(found, _BATCH)):
            made.update(data)
            at = _put(fd, compressor.compress(data), at)
        _put(fd, compressor.flush(), at)
    return Written(f"sha256:{made.hexdigest()}", _write_index(layer, indexer))


def _indexed(entries: Iterator[tree.Entry], indexer: tree.Indexer) -> Iterator[bytes]:
    for entry in entries:
        indexer.add(entry)
        yield tree.line(entry)


def _write_index(layer: Fd, indexer: tree.Indexer) -> str:
    """Returns its digest."""
    made = hashlib.sha256()
    with syscalls.create_at(layer.fd, INDEX, 0o644) as fd:
        at = 0
        for piece in indexer.pieces():
            made.update(piece)
            at = _put(fd, piece, at)
    return f"sha256:{made.hexdigest()}"


def _put(fd: Fd, data: bytes, at: int) -> int:
    """Write all of `data` at `at`; returns where it ends."""
    view = memoryview(data)
    while view:
        count = syscalls.pwrite(fd.fd, view, at)
        view, at = view[count:], at + count
    return at


def index_holds(into: Store, chain: str) -> bool:
    """Whether the index of a layer, if it has one, is as it was made."""
    found = into.layer(chain)
    if found is None or found.facts.get("index") is None:
        return True
    try:
        with into.hold_layer(chain) as made:
            return digests.matches(found.facts["index"], beneath.read_file(made.fd, INDEX, _MAX_INDEX))
    except OSError:
        return False


def add_index(into: Store, layer: Layer) -> str:
    """Give a layer that was made without one its index; returns its digest."""
    indexer = tree.Indexer()
    for line in read_manifest(into, layer.chain):
        indexer.add(json.loads(line))
    with into.make(b"index-" + store.layer_name(layer.chain)) as stage, into.hold_layer(layer.chain) as made:
        beneath.remove(stage.fd.fd, INDEX)
        digest = _write_index(stage.fd, indexer)
        syscalls.syncfs(stage.fd.fd)
        syscalls.renameat2(stage.fd.fd, INDEX, made.fd, INDEX)
        beneath.replace_file(made.fd, b"layer.json", documents.dump({**layer.facts, "index": digest}))
    return digest


def read_manifest(into: Store, chain: str) -> Iterator[bytes]:
    """The lines of the tree manifest of a layer, verified by the end; UserError for a damaged one."""
    found = into.layer(chain)
    if found is None:
        raise UserError(f"{chain}: not unpacked in {into.root}")
    facts: dict[str, Any] = found.facts
    try:
        with into.hold_layer(chain) as made:
            opened = syscalls.open_data(made.fd, _MANIFEST, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{chain}: the manifest of its tree: {reason(error)}", code=1) from None
    with opened as fd:
        source = compress.Source(compress.pieces(At(fd.fd, 0)))
        rest = b""
        while piece := source.read(1 << 20):
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
        if rest or source.digest != facts.get("tree"):
            raise UserError(f"{chain}: the manifest of its tree is damaged")
