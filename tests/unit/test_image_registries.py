"""registries.conf: which places stand for a name, and what short names mean (containers-registries.conf(5))."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from unionfsd.errors import UserError
from unionfsd.images import reference, registriesconf
from unionfsd.images.registriesconf import Endpoint

CONF: Final = """
unqualified-search-registries = ["first.example", "docker.io"]

[[registry]]
prefix = "example.com/foo"
location = "inner.example/bar"
[[registry.mirror]]
location = "mirror-0.local/mirror-for-foo"
[[registry.mirror]]
location = "mirror-1.local:5000/mirrors/foo"
insecure = true
[[registry.mirror]]
location = "digests.local"
pull-from-mirror = "digest-only"

[[registry]]
location = "example.com/foo/bad"
blocked = true

[[registry]]
prefix = "*.wild.example"
insecure = true

[[registry]]
location = "docker.io"
mirror-by-digest-only = true
[[registry.mirror]]
location = "hub.local"

[aliases]
"tool" = "quay.example/org/tool"
"""
DIGEST: Final = "sha256:" + "0" * 64


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "registries.conf"
    path.write_text(CONF)
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("other.example/a:1", [("other.example", "a", False)]),
        (
            "example.com/foo/image:latest",
            [
                ("mirror-0.local", "mirror-for-foo/image", False),
                ("mirror-1.local:5000", "mirrors/foo/image", True),
                ("inner.example", "bar/image", False),
            ],
        ),
        (
            f"example.com/foo/a@{DIGEST}",
            [
                ("mirror-0.local", "mirror-for-foo/a", False),
                ("mirror-1.local:5000", "mirrors/foo/a", True),
                ("digests.local", "a", False),
                ("inner.example", "bar/a", False),
            ],
        ),
        (
            f"example.com/foo@{DIGEST}",
            [
                ("mirror-0.local", "mirror-for-foo", False),
                ("mirror-1.local:5000", "mirrors/foo", True),
                ("inner.example", "bar", False),
            ],
        ),
        ("example.com/foobar:1", [("example.com", "foobar", False)]),
        ("a.b.wild.example:5000/x", [("a.b.wild.example:5000", "x", True)]),
        ("wild.example/x", [("wild.example", "x", False)]),
        ("debian:12", [("docker.io", "library/debian", False)]),
        (f"debian@{DIGEST}", [("hub.local", "library/debian", False), ("docker.io", "library/debian", False)]),
    ],
)
def test_where_an_image_is_asked_for(conf: Path, name: str, places: list[tuple[str, str, bool]]) -> None:
    found = registriesconf.load().endpoints(reference.name(name))
    assert found == [Endpoint(*place) for place in places]


def test_what_is_blocked_is_not_asked_for(conf: Path) -> None:
    registries = registriesconf.load()
    for name in ("example.com/foo/bad:1", "example.com/foo/bad/inner"):
        with pytest.raises(UserError, match="blocked"):
            registries.endpoints(reference.name(name))
    assert registries.endpoints(reference.name("example.com/foo/badly"))


def test_short_names(conf: Path) -> None:
    def meant(text: str) -> list[str]:
        return [str(name) for name in registriesconf.load().resolve(text)]

    assert meant("tool:2") == ["quay.example/org/tool:2"]
    assert meant(f"tool@{DIGEST}") == [f"quay.example/org/tool@{DIGEST}"]
    assert meant("localhost/tool") == ["localhost/tool:latest"]
    assert meant("thing") == ["first.example/thing:latest", "docker.io/library/thing:latest"]
    assert meant("a/thing:1") == ["first.example/a/thing:1", "docker.io/a/thing:1"]
    conf.write_text('short-name-mode = "enforcing"\n' + CONF)
    with pytest.raises(UserError, match=r"first\.example, docker\.io"):
        meant("thing")
    conf.write_text('short-name-mode = "enforcing"\nunqualified-search-registries = ["one.example"]\n')
    assert meant("thing") == ["one.example/thing:latest"]
    conf.unlink()
    assert meant("thing") == ["docker.io/library/thing:latest"]


def test_files_beside_count_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTAINERS_REGISTRIES_CONF", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "containers"
    (home / "registries.conf.d").mkdir(parents=True)
    (home / "registries.conf").write_text(CONF)
    (home / "registries.conf.d" / "10.conf").write_text(
        '[[registry]]\nprefix = "example.com/foo"\nlocation = "a.example"\n'
    )
    (home / "registries.conf.d" / "20.conf").write_text(
        '[[registry]]\nprefix = "example.com/foo"\nlocation = "b.example/x"\n'
        '[aliases]\n"tool" = ""\n"new" = "n.example/n"\n'
    )
    (home / "registries.conf.d" / "30.txt").write_text("not read")
    registries = registriesconf.load()
    assert registries.endpoints(reference.name("example.com/foo/a")) == [Endpoint("b.example", "x/a", False)]
    assert [str(name) for name in registries.resolve("new")] == ["n.example/n:latest"]
    assert len(registries.resolve("tool")) == 2
    if os.geteuid():
        cached = tmp_path / "cache" / "containers" / "short-name-aliases.conf"
        cached.parent.mkdir(parents=True)
        cached.write_text('[aliases]\n"new" = "cached.example/n"\n')
        assert [str(name) for name in registriesconf.load().resolve("new")] == ["cached.example/n:latest"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[registry]]\n", "without prefix"),
        ('[[registry]]\nprefix = "a.example"\n', "without location"),
        ('[[registry]]\nlocation = "a.*.example"\n', "stands at the beginning"),
        ('[[registry]]\nlocation = "a.example"\nblocked = "yes"\n', "true or false"),
        ("[[registry]]\nlocation = 1\n", "string"),
        ('[[registry]]\nlocation = "a"\n[[registry.mirror]]\ninsecure = true\n', "a mirror without"),
        ('[[registry]]\nlocation = "a"\n[[registry.mirror]]\nlocation = "b"\npull-from-mirror = "some"\n', "pull-from"),
        ('registry = "a"\n', "lists of tables"),
        ('unqualified-search-registries = "a"\n', "list of hosts"),
        ('short-name-mode = "what"\n', "short-name-mode"),
        ('[aliases]\n"a" = "b"\n', "whole one"),
        ('[aliases]\n"a.example/b" = "c.example/d"\n', "short name"),
        ("[registries.search]\nregistries = []\n", "version 1"),
        ("[[registry", "registries.conf"),
    ],
)
def test_what_cannot_be_understood_is_refused(conf: Path, text: str, words: str) -> None:
    conf.write_text(text)
    with pytest.raises(UserError, match=words):
        registriesconf.load()
