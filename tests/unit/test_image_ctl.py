"""The command line of ``unionfsctl image``: its table, and what it prints and exits with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final

import pytest

from tests.images import Made, files
from unionfsd.ctl.image import VERBS
from unionfsd.ctl.main import Verb, main
from unionfsd.images import digest as digests

LAYERS = [files({"a": b"1"}), files({"b": b"2"})]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_its_function(verb: Verb) -> None:
    function = verb.function.replace("-", "_") + "_"
    assert callable(getattr(import_module(f"unionfsd.ctl.{verb.where}"), function))


def test_images_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def image(verb: str, *words: str) -> str:
        capsys.readouterr()
        assert main(["image", verb, f"--root={tmp_path}/store", *words]) == 0
        return capsys.readouterr().out

    one, two = Made(LAYERS), Made(LAYERS[:1])
    assert image("import", str(one.oci(tmp_path / "one")), "--name", "one") == one.digest + "\n"
    image("import", str(two.oci(tmp_path / "two")), "--name", "two:2")
    listed = {tuple(row["names"]): row["layers"] for row in json.loads(image("ls", "--json"))}
    assert listed == {("localhost/one:latest",): 2, ("localhost/two:2",): 1}
    assert [step["created_by"] for step in json.loads(image("history", "one", "--json"))] == ["step 1", "step 0"]
    (top,) = json.loads(image("tree", "--json"))
    assert (top["images"], top["children"][0]["images"]) == (["localhost/two:2"], ["localhost/one:latest"])
    assert "└─" in image("tree")
    assert image("diff", "two:2", "one") == "A /b\n"
    assert image("diff", "one", "two:2") == "D /b\n"
    used = {row["name"]: row["unique"] for row in json.loads(image("du", "--json"))}
    assert used == {"localhost/one:latest": 1, "localhost/two:2": 0}
    assert one.chain_ids[1][7:] in image("inspect", "one")
    assert "image_env='PATH=/bin '" in image("config", "one", "--shell")
    image("tag", "one", "three:3")
    image("rm", "one")
    assert "three:3" in image("ls")
    assert set(image("ls", "--quiet").splitlines()) == {"localhost/two:2", "localhost/three:3"}
    image("create", "three:3", "--name", "work")
    assert image("containers", "--quiet") == "work\n"
    image("remove", "work")
    image("rm", "three:3")
    assert json.loads(image("gc", "--json"))["layers"] == [one.chain_ids[1]]
    assert image("verify") == ""
    assert main(["image", "--root", str(tmp_path / "store"), "ls", "--quiet"]) == 0
    assert capsys.readouterr().out == "localhost/two:2\n"
    assert main(["image", "--root", str(tmp_path / "other"), "ls", "--root", str(tmp_path / "store"), "--quiet"]) == 0
    assert capsys.readouterr().out == "localhost/two:2\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["inspect", "none"], 1),
        (["import", "oci:/not/there"], 2),
        (["import", "/not/there"], 2),
        (["export", "none", "/tmp/x"], 2),
        (["frobnicate"], 2),
        (["import", "--platform", "linux", "oci:/x"], 2),
        (["import", "--jobs", "0", "."], 2),
        (["start", "../.."], 1),
        (["umount", "/proc"], 5),
        (["umount", "/not/there"], 5),
        (["diff", "none"], 1),
        (["import", "docker-archive:/etc/passwd"], 2),
        (["import", "containers-storage:/etc@none"], 2),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> None:
    assert (
        main(["image", words[0], *([] if code == 2 and len(words) == 1 else [f"--root={tmp_path}"]), *words[1:]])
        == code
    )
    assert capsys.readouterr().err.startswith("unionfsctl: ")


DAMAGES: Final[dict[str, Callable[[Path], object]]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256))),
    "other": lambda path: path.write_bytes(b'{"size":{}}'),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["layer.json", "tree.zst", "tree.index", "manifest", "config", "container.json", "signature"]
)
def test_a_damaged_store_is_told_and_can_be_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    """By every verb in words; what can be had again, an import brings back."""

    def image(verb: str, *words: str) -> int:
        return main(["image", verb, f"--root={tmp_path}/store", *words])

    made = Made(LAYERS)
    layout = str(made.oci(tmp_path / "oci"))
    image("import", layout, "--name", "one")
    image("create", "one", "--name", "work")
    image("generate-key", "--prefix", str(tmp_path / "k"))
    image("sign", "one", "--key", str(tmp_path / "k.key"))
    store = tmp_path / "store"
    layer = store / "layers" / made.chain_ids[1][7:]
    places = {
        "manifest": store / "blobs" / "sha256" / made.digest[7:],
        "config": store / "blobs" / "sha256" / digests.of(made.config)[7:],
        "container.json": store / "containers" / "work" / "container.json",
        "signature": next((store / "signatures").iterdir()),
    }
    DAMAGES[damage](places.get(name, layer / name))
    capsys.readouterr()
    codes = {
        verb: image(verb, *words)
        for verb, words in {
            **dict.fromkeys(("ls", "tree", "du", "containers", "verify"), ()),
            **dict.fromkeys(("inspect", "history"), ("one",)),
            "diff": ("work",),
            "verify-signature": ("one", "--key", str(tmp_path / "k.pub")),
            "export": ("one", f"oci:{tmp_path}/exported"),
            "commit": ("work", "two", "--quiet"),
        }.items()
    }
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if name in ("layer.json", "tree.zst", "tree.index"):
        assert (codes["ls"], codes["tree"], codes["inspect"], codes["verify"]) == (0, 0, 0, 1)
        assert made.chain_ids[1] in said.out
    if name == "container.json":
        assert (codes["ls"], codes["verify"], bool(codes["containers"])) == (0, 0, True)
    if name == "signature":
        assert codes["verify-signature"] != 0
    if name == "layer.json":
        assert image("import", layout, "--name", "one", "--quiet") == 0
        assert (image("verify"), capsys.readouterr().err) == (0, "")
        assert os.listdir(store / "stage") == []
