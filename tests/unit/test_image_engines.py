"""Docker's store, as dockerd lays it out, found and read with nothing changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.images import Made, files
from tests.trees import fingerprint
from unionfsd.errors import UserError
from unionfsd.images import digest as digests
from unionfsd.images import engines


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    made = Made([files({"a": b"1"}), files({"b": b"2"})])
    base = tmp_path / "image" / "overlay2"
    identity = digests.of(made.config)
    content = base / "imagedb" / "content" / "sha256"
    content.mkdir(parents=True)
    (content / identity[7:]).write_bytes(made.config)
    tags = {"app": {"app:1": identity, f"app@{made.digest}": identity}}
    (base / "repositories.json").write_text(json.dumps({"Repositories": tags}))
    for at, chain in enumerate(made.chain_ids):
        layer = base / "layerdb" / "sha256" / chain[7:]
        layer.mkdir(parents=True)
        (layer / "cache-id").write_text(f"cache{at}")
        (tmp_path / "overlay2" / f"cache{at}" / "diff").mkdir(parents=True)
    return tmp_path


def test_an_image_of_docker_is_found(docker: Path) -> None:
    before = fingerprint(docker)
    image = engines.find(f"{docker}@app:1")
    assert image.names == ("docker.io/library/app:1",)
    assert image.diffs == tuple(f"{docker}/overlay2/cache{at}/diff" for at in range(2))
    assert engines.find(f"{docker}@{image.identity[:12]}") == image
    assert fingerprint(docker) == before


def test_what_is_not_there_is_said(docker: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image"):
        engines.find(f"{docker}@other")
    (docker / "overlay2" / "cache1" / "diff").rmdir()
    with pytest.raises(UserError, match="cache1"):
        engines.find(f"{docker}@app:1")
    (docker / "image" / "overlay2" / "layerdb" / "sha256").joinpath(
        Made([files({"a": b"1"})]).chain_ids[0][7:], "cache-id"
    ).write_text("../../etc")
    with pytest.raises(UserError, match="no layer"):
        engines.find(f"{docker}@app:1")
    with pytest.raises(UserError, match="neither"):
        engines.find(f"{docker / 'image'}@app:1")
