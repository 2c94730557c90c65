"""Importing an image, beside what others do to have it unpacked: skopeo copy and umoci unpack, podman pull.

    python -m scripts.bench_images [--rounds N] [--mebibytes N] [--files N] [--dir DIR]

The image is an OCI layout of 5 layers, compressed with gzip, of files that compress to about half. Everybody begins
with nothing and ends with the files on disk; in turns, and the page cache has the layout. Times are wall clock, in
seconds; memory is the peak of the largest process. Needs root, skopeo, umoci and podman; no network.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple

from tests import harness
from unionfsd.images import digest as digests
from unionfsd.images import documents

LAYERS: Final = 5


class Took(NamedTuple):
    """Seconds, and MiB at the most in one process."""

    seconds: float
    peak: float


def layer(number: int, size: int, files: int) -> Iterator[bytes]:
    """The tar of a layer with `size` bytes in so many files, in pieces."""
    chance = random.Random(number)
    words = chance.randbytes(1 << 20)
    each = size // files
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for at in range(files):
            entry = tarfile.TarInfo(f"layer{number}/directory{at // 100:05d}/file{at:07d}")
            entry.size, entry.mtime = each, 1_700_000_000
            half = chance.randbytes(each - each // 2)
            start = chance.randrange(len(words) // 2)
            repeated = (words[start : start + 4096] * (each // 2 // 4096 + 1))[: each // 2]
            archive.addfile(entry, io.BytesIO(half + repeated))
            yield out.getvalue()
            out.seek(0)
            out.truncate()
    yield out.getvalue()


def layout(root: Path, size: int, files: int) -> None:
    """Write an OCI layout of an image with `size` bytes in so many files."""
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    descriptors, diff_ids = [], []
    for number in range(LAYERS):
        packer, plain, packed = zlib.compressobj(1, wbits=31), digests.hasher("sha256:"), digests.hasher("sha256:")
        with open(blobs / "new", "wb") as file:
            for piece in layer(number, size // LAYERS, max(1, files // LAYERS)):
                plain.update(piece)
                packed.update(data := packer.compress(piece))
                file.write(data)
            packed.update(data := packer.flush())
            file.write(data)
        (blobs / "new").rename(blobs / packed.hexdigest())
        diff_ids.append(f"sha256:{plain.hexdigest()}")
        length = (blobs / packed.hexdigest()).stat().st_size
        descriptors.append(
            documents.Descriptor(documents.OCI_LAYER + "+gzip", f"sha256:{packed.hexdigest()}", length, {}).to_json()
        )

    def put(document: dict[str, object], media_type: str) -> dict[str, object]:
        raw = documents.dump(document)
        (blobs / digests.of(raw).partition(":")[2]).write_bytes(raw)
        return documents.Descriptor(media_type, digests.of(raw), len(raw), {}).to_json()

    config = put(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": f"layer {number}"} for number in range(LAYERS)],
        },
        documents.OCI_CONFIG,
    )
    manifest = put(
        {"schemaVersion": 2, "mediaType": documents.OCI_MANIFEST, "config": config, "layers": descriptors},
        documents.OCI_MANIFEST,
    )
    entry = {**manifest, "annotations": {documents.REF_NAME: "tag"}}
    (root / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (root / "index.json").write_bytes(documents.dump({"schemaVersion": 2, "manifests": [entry]}))


def timed(*commands: list[str]) -> Took:
    """Run commands one after the other."""
    begun, peak = monotonic(), 0.0
    for command in commands:
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                raise SystemExit(f"{' '.join(command)}: {said.read().decode(errors='replace')}")
        peak = max(peak, usage.ru_maxrss / 1024)
    return Took(monotonic() - begun, peak)


def ours(source: Path, room: Path) -> Took:
    return timed(
        [
            sys.executable,
            "-m",
            "unionfsd.ctl",
            "image",
            "import",
            f"oci:{source}:tag",
            "--root",
            f"{room}/store",
            "--quiet",
        ]
    )


def without_blobs(source: Path, room: Path) -> Took:
    words = ["image", "import", f"oci:{source}:tag", "--root", f"{room}/store", "--quiet", "--discard-blobs"]
    return timed([sys.executable, "-m", "unionfsd.ctl", *words])


def umoci(source: Path, room: Path) -> Took:
    copy = ["skopeo", "copy", "--quiet", f"oci:{source}:tag", f"oci:{room}/copy:tag"]
    return timed(copy, ["umoci", "unpack", "--image", f"{room}/copy:tag", f"{room}/bundle"])


def podman(source: Path, room: Path) -> Took:
    with tempfile.TemporaryDirectory(dir="/tmp") as run:  # its name may not be long
        options = [f"--root={room}/storage", f"--runroot={run}", "--storage-driver=overlay"]
        return timed(["podman", *options, "pull", "--quiet", f"oci:{source}:tag"])


CONTENDERS: Final[dict[str, Callable[[Path, Path], Took]]] = {
    "unionfsctl image import": ours,
    "... --discard-blobs": without_blobs,
    "skopeo copy, umoci unpack": umoci,
    "podman pull": podman,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the import of an image beside others.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--dir", default=harness.DISK, help="where everything is made")
    given = parser.parse_args()
    took: dict[str, list[Took]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="unionfsd-bench-", dir=given.dir) as work:
        source = Path(work, "oci")
        layout(source, given.mebibytes << 20, given.files)
        for number in range(given.rounds):
            for name, run in CONTENDERS.items():
                with tempfile.TemporaryDirectory(prefix="room-", dir=work) as room:
                    subprocess.run(["sync", "-f", work], check=True)
                    took[name].append(run(source, Path(room)))
                    harness.remove(Path(room))
                    os.mkdir(room)
                print(f"round {number + 1}: {name}: {took[name][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    base = statistics.median(each.seconds for each in took["unionfsctl image import"])
    print(f"{'':28} {'seconds':>9} {'ratio':>6} {'MiB':>6}")
    for name, rounds in took.items():
        seconds = statistics.median(each.seconds for each in rounds)
        print(f"{name:28} {seconds:9.1f} {seconds / base:6.2f} {max(each.peak for each in rounds):6.0f}")


if __name__ == "__main__":
    main()
