"""Names of images and places, as Docker and skopeo read them."""

from __future__ import annotations

import pytest

from unionfsd.errors import UserError
from unionfsd.images import reference
from unionfsd.images.reference import Place

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("me/app", "docker.io/me/app:latest"),
        ("index.docker.io/me/app", "docker.io/me/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("quay.io/a/b__c-d.e:1", "quay.io/a/b__c-d.e:1"),
        (f"a@{DIGEST}", f"docker.io/library/a@{DIGEST}"),
        (f"a:b@{DIGEST}", f"docker.io/library/a:b@{DIGEST}"),
    ],
)
def test_names(text: str, whole: str) -> None:
    assert str(reference.name(text)) == whole
    assert str(reference.name(whole)) == whole


@pytest.mark.parametrize(
    "text", ["", "a/../b", "/a", "a/", "a:", "a:b:c", "a b", "a@sha256:zz", "a" * 256, "a/B", "..", "-a"]
)
def test_no_names(text: str) -> None:
    with pytest.raises(UserError):
        reference.name(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("oci:/d", Place("oci", "/d", None)),
        ("oci:/d:tag", Place("oci", "/d", "tag")),
        ("docker-archive:f.tar:a:1", Place("docker-archive", "f.tar", "a:1")),
        ("docker://h.io/a:1", Place("docker", "h.io/a:1", None)),
        ("dir:/a:b", Place("dir", "/a:b", None)),
        ("/some/path", None),
        ("c:/odd", None),
    ],
)
def test_places(text: str, place: Place | None) -> None:
    assert reference.place(text) == place
    if place is not None:
        assert reference.place(str(place)) == place


@pytest.mark.parametrize("text", ["oci:", "docker:h/a"])
def test_no_places(text: str) -> None:
    with pytest.raises(UserError):
        reference.place(text)
