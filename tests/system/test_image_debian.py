"""A Debian root, of packages of this machine, in layers as people build them: podman's root and ours agree."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests import harness
from tests.system.built import Built, view
from tests.system.built import image as image

#: A layer each. Together they have hard links (perl), setuid programs (login, passwd), links to directories (/bin).
PACKAGES: Final = (
    ("base-files", "base-passwd"),
    ("libc6", "libgcc-s1", "libcrypt1", "libtinfo6", "libselinux1", "libpcre2-8-0", "libacl1", "libattr1", "libgmp10"),
    ("bash", "dash", "coreutils", "debianutils", "diffutils", "findutils", "grep", "gzip", "sed", "tar", "hostname"),
    ("perl-base",),
    ("passwd", "login", "mount", "util-linux-extra", "bsdutils", "libpam0g", "libaudit1", "libcap-ng0", "libblkid1"),
)
STEPS: Final = """\
RUN rm -r /usr/share/doc /usr/share/man && sed -i s/^PRETTY_NAME=.*/PRETTY_NAME=ours/ /etc/os-release
RUN mkdir -p /srv/app && cp -a /usr/bin/perl /srv/app/perl && mv /usr/share/lintian /srv/app/lintian && chmod 1777 /tmp
CMD ["perl", "-e", "print join(q( ), sort glob q(/srv/app/*))"]
"""


def files_of(packages: tuple[str, ...]) -> list[str]:
    """What packages installed, with the directories it lies in, by names that lead through no symlink."""
    listed = subprocess.run(["dpkg-query", "-L", *packages], capture_output=True, text=True, check=True).stdout
    found = set()
    for path in listed.splitlines():
        wanted = path.startswith("/") and os.path.lexists(path) and path != "/."
        if wanted and (packages[0] == "base-files" or not path.startswith(("/usr/share/doc", "/usr/share/locale"))):
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            found.add(real)
            found |= {str(parent) for parent in Path(real).parents}
    return sorted(found - {"/"})


def fill(context: Path) -> None:
    for number, packages in enumerate(PACKAGES):
        names = "\0".join(name.lstrip("/") for name in files_of(packages)).encode()
        command = ["tar", "-C", "/", "--null", "--no-recursion", "-T", "-", "-cf", str(context / f"{number}.tar")]
        subprocess.run(command, input=names, check=True)


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    root = Path(tempfile.mkdtemp(prefix="unionfsd-", dir=harness.DISK))
    adds = "".join(f"ADD {number}.tar /\n" for number in range(len(PACKAGES)))
    try:
        yield Built(root, f"FROM scratch\n{adds}{STEPS}", fill, ("docker-archive", "oci"))
    finally:
        harness.remove(root)


def test_a_debian_root_is_podmans_root(built: Built, image: Any, disk: Path) -> None:
    image("import", f"docker-archive:{built.root}/docker-archive", "--name", "saved:1")
    image("import", f"oci:{built.root}/oci:tag", "--name", "layout:1")
    layers = [json.loads(image("inspect", name, "--json"))["layers"] for name in ("saved:1", "layout:1")]
    assert [layer["diff_id"] for layer in layers[0]] == [layer["diff_id"] for layer in layers[1]]
    assert len(layers[0]) == len(PACKAGES) + 2
    point = disk / "point"
    point.mkdir()
    image("mount", "layout:1", point, "--verify")
    try:
        ours = view(point)
    finally:
        image("umount", point)
    assert len(ours) > 1000
    with built.mounted() as theirs:
        assert ours == view(theirs)
    expected = "/srv/app/lintian /srv/app/perl"
    assert image("run", "saved:1") == expected
    image("create", "saved:1", "--name", "work")
    image("run", "--name", "work", "saved:1", "--", "bash", "-c", "passwd --help >/srv/help; echo Debian >/srv/name")
    image("commit", "work", "made:1")
    image("export", "made:1", f"docker-archive:{disk}/a.tar:localhost/made:1")
    built.podman("load", "--quiet", f"--input={disk}/a.tar")
    assert built.run("localhost/made:1") == expected
    assert built.run("localhost/made:1", "cat", "/srv/name") == "Debian\n"
