"""Makes the pictures of the README from the real programs: docs/images/top.svg and docs/images/demo.svg.

    make screenshots

Needs root. `unionfsctl top` is drawn of a mount that is worked in, over its control socket, and the demo is run in a
terminal. Everything happens in a mount namespace of its own.
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from unionfsd.ctl import find
from unionfsd.ctl.live import Watcher
from unionfsd.ctl.screen import screen

if TYPE_CHECKING:
    from rich.console import RenderableType

IMAGES: Final = Path(__file__).resolve().parents[1] / "docs" / "images"
INSIDE: Final = "UNIONFSD_SCREENSHOTS_INSIDE"
#: Lines of the demo that are shown: the merged tree and the first work in it.
DEMO_LINES: Final = 64


def main() -> None:
    """Make both."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp(
            "unshare", ["unshare", "--mount", "--propagation=private", sys.executable, "-m", "scripts.screenshots"]
        )
    IMAGES.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "srv", "/srv"], check=True)
    save("top.svg", top(), "unionfsctl top", width=124, height=34)
    save("demo.svg", demo(), "make demo", width=112, height=None)


def save(name: str, what: RenderableType, title: str, *, width: int, height: int | None) -> None:
    """Draw `what` as a terminal would show it."""
    console = Console(
        record=True, width=width, height=height or 25, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(what)
    svg = console.export_svg(title=title)
    # Fonts come from those who look at it, not from the network.
    (IMAGES / name).write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))
    print(f"docs/images/{name}")


def top() -> RenderableType:
    """The screen of a mount in which files are read, made, renamed and copied up."""
    mountpoint = stage()
    done = threading.Event()
    workers = [threading.Thread(target=work, args=(mountpoint, done))]
    try:
        with find.connect(find.locate(os.fsencode(mountpoint)).socket, 30.0) as client:
            watcher = Watcher(client)
            watcher.moment()
            workers[0].start()
            time.sleep(1)
            before = watcher.moment()
            time.sleep(0.5)
            workers.append(threading.Thread(target=os.utime, args=(mountpoint / "video/film.mkv",)))
            workers[1].start()
            now = watcher.moment()
            while workers[1].is_alive() and not now.work["work"]:
                now = watcher.moment()
    finally:
        done.set()
        for worker in workers:
            worker.join()
        subprocess.run(["umount", mountpoint], check=True)
    return screen(before, now)


def stage() -> Path:
    """Layers of a web server, mounted."""
    srv = Path("/srv")
    for name in ("layers/base/etc", "layers/site/www", "layers/base/video", "upper", "work", "web"):
        (srv / name).mkdir(parents=True)
    for number in range(200):
        (srv / f"layers/site/www/page{number}.html").write_text("page\n" * 100)
    (srv / "layers/base/etc/hosts").write_text("127.0.0.1 localhost\n")
    with open(srv / "layers/base/video/film.mkv", "wb") as file:
        for _ in range(192):
            file.write(os.urandom(1 << 20) * 8)
    options = "lowerdir=/srv/layers/site:/srv/layers/base,upperdir=/srv/upper,workdir=/srv/work"
    subprocess.run([sys.executable, "-m", "unionfsd", "/srv/web", "-o", options], check=True)
    return srv / "web"


def work(mountpoint: Path, done: threading.Event) -> None:
    """What goes on in it."""
    number = 0
    while not done.wait(0.001):
        number += 1
        page = mountpoint / "www" / f"page{number % 200}.html"
        page.read_text()
        fresh = page.with_suffix(".new")
        with suppress(OSError):
            fresh.write_text("new page\n")
            os.rename(fresh, page)
        if number % 10 == 0:
            with suppress(OSError):
                (mountpoint / "www").rmdir()
            (mountpoint / "etc/hosts").chmod(0o644)
            os.listdir(mountpoint / "www")


def demo() -> RenderableType:
    """What the demo prints on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "scripts.demo"], stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    with suppress(OSError):  # EIO: its end
        while data := os.read(ours, 1 << 16):
            said += data
    os.close(ours)
    if process.wait() != 0:
        raise SystemExit(f"the demo failed:\n{said.decode(errors='replace')}")
    lines = said.decode().replace("\r\n", "\n").splitlines()
    return Text.from_ansi("\n".join([*lines[:DEMO_LINES], "..."]))


if __name__ == "__main__":
    main()
