"""The pictures of this folder's page, made anew from a demo run and the records of the benchmarks.

    make gallery

Each picture is what a documented command shows. Pages are opened in Debian's chromium (`apt install chromium nodejs
npm`). All images are of the phantom, and no picture shows a path of the machine.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from pfedsam.data.reader import load_picture
from pfedsam.viewer.grid import Grid

HERE = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("pfedsam")
#: A picture has at most so many bytes, and is saved with the first longer side and quality that give so few.
MOST_BYTES, SIDES, QUALITIES = 150_000, (1600, 1300, 1000), (90, 75, 60)
#: Width and height of a laptop's window.
LAPTOP = {"width": 1280, "height": 1000}
#: What a viewer's page says of places on this machine.
PLACES = [["remove", "#place"], ["remove", "#notes"]]


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished `pfedsam demo`")
    parser.add_argument("--table", type=Path, required=True, help="what `make -s bench-phantom` has printed")
    parser.add_argument("--work", type=Path, default=Path("runs/gallery"), help="folder for what is made on the way")
    asked = parser.parse_args()
    browser = Browser(asked.work)
    results = json.loads((asked.run / "results.json").read_text())
    # the site whose images differ most: what personalisation is for
    site = max(results["sites"], key=lambda name: results["sites"][name]["dice_personal"] - _global(results, name))
    page = asked.work / "report.html"
    pfedsam("report", asked.run, "--out", page, "--force")
    with viewer(asked.run) as address:
        shown = {name: best_case(asked.run, results, name) for name in results["sites"]}
        shots = [
            _viewed(address, asked.work / f"phantom-{name}.png", name, *one, only="#canvas")
            for name, one in shown.items()
        ]
        shots.append(_viewed(address, asked.work / "viewer.png", site, *shown[site]))
        shots.append({"address": page.resolve().as_uri(), "file": str(asked.work / "report.png"), **LAPTOP})
        shots.append(_printed(asked.table, asked.work))
        browser.take(shots)
    side_by_side([asked.work / f"phantom-{name}.png" for name in results["sites"]], asked.work / "phantom.png")
    shutil.copy(asked.run / "pictures" / f"{site}-best.png", asked.work / "case.png")
    shutil.copy(overlay(asked.run, site, shown[site][0], asked.work), asked.work / "overlay.png")
    for name in ("phantom", "report", "case", "viewer", "overlay", "table"):
        save(asked.work / f"{name}.png", HERE / f"{name}.webp")


def _global(results: dict[str, Any], site: str) -> float:
    return float(results["sites"][site]["dice_global"])


def pfedsam(*words: str | Path) -> str:
    """What the command prints."""
    line = [str(COMMAND), *map(str, words)]
    environment = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


@contextmanager
def viewer(run: Path) -> Iterator[str]:
    """The address of `pfedsam view` while it runs."""
    process = subprocess.Popen(
        [str(COMMAND), "view", str(run)], stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "500"}
    )
    assert process.stdout is not None
    try:
        yield next(line.strip() for line in process.stdout if line.startswith("http://127.0.0.1:"))
    finally:
        process.terminate()
        process.wait()


def best_case(run: Path, results: dict[str, Any], site: str) -> tuple[str, int]:
    """The test case of a site with the largest personal Dice, and its slice with most of the truth, from 1."""
    cases = [one for one in results["cases"] if (one["site"], one["model"]) == (site, "personal")]
    name = str(max(cases, key=lambda one: sum(one["dice"]))["case"])
    folder = run / "phantom" / site
    image = load_picture(next((folder / "images").glob(f"{name}.*")))
    label = load_picture(next((folder / "labels").glob(f"{name}.*")), label=True)
    return name, int(Grid.of(image).shown(label.values).astype(bool).sum(axis=(0, 1)).argmax()) + 1


def _viewed(address: str, file: Path, site: str, case: str, z: int, only: str = "") -> dict[str, Any]:
    """A page of the viewer with a slice of a case: the image with its truth, or all that the page has."""
    steps: list[list[str]] = [["ready"], ["open", "#site", site], ["ready"], ["quiet"], ["named", "#case", case]]
    steps += [["ready"], ["quiet"], ["slide", "#slice", str(z)], *PLACES]
    if only:
        steps += [["check", f"#layer-{model}", "off"] for model in ("personal", "global")]
    return {"address": address, "file": str(file), "steps": steps, "only": only, **LAPTOP}


def _printed(text: Path, work: Path) -> dict[str, Any]:
    """A terminal with the tables that a command has printed."""
    style = (
        "background:#15181c;color:#e8eaed;font:15px/normal DejaVu Sans Mono,monospace;padding:16px;display:inline-block"
    )
    words = html.escape(tables_in(text.read_text()))
    page = work / "table.html"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8"><title>table</title><pre style="{style}">{words}</pre>')
    file = str(work / "table.png")
    return {"address": page.resolve().as_uri(), "file": file, "only": "pre", "width": 1500, "height": 900}


def tables_in(text: str) -> str:
    """What a command has printed, without lines of progress and lines that name files or records."""
    unlike = re.compile(r"[a-z]/[a-z]|record\(s\)|\bleft: |\b\d+ of \d+, passed")
    return "\n".join(line.rstrip() for line in text.splitlines() if not unlike.search(line)).strip("\n")


def overlay(run: Path, site: str, case: str, work: Path) -> Path:
    """What `pfedsam infer --overlay` writes of a case."""
    images = sorted((run / "phantom" / site / "images").glob(f"{case}.*"))
    pfedsam("infer", images[0], "--run", run, "--site", site, "--overlay", "--out", work / "infer", "--force")
    return next((work / "infer").glob(f"{case}*_overlay.png"))


class Browser:
    """Debian's chromium, through puppeteer of npm.

    Args:
        work: folder for what npm installs.
    """

    def __init__(self, work: Path) -> None:
        found = shutil.which("chromium")
        if not (found and shutil.which("npm")):
            sys.exit("chromium or npm is not installed: apt install chromium nodejs npm")
        self.chromium, self.folder = found, work.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "puppeteer-core@24"], cwd=self.folder, check=True)
        shutil.copy(HERE / "pages.js", self.folder)

    def take(self, shots: list[dict[str, Any]]) -> None:
        """Take pictures of pages, see `pages.js`."""
        wanted = json.dumps([{**one, "file": str(Path(one["file"]).resolve())} for one in shots])
        subprocess.run(["node", "pages.js", self.chromium, wanted], cwd=self.folder, check=True)


def side_by_side(files: list[Path], out: Path, gap: int = 8) -> None:
    """Pictures of one height beside each other, without their black borders."""
    images = []
    for file in files:
        with Image.open(file) as image:
            grey = image.convert("L").point(lambda value: 255 if value > 8 else 0)
            images.append(image.convert("RGB").crop(grey.getbbox()))
    high = min(image.height for image in images)
    images = [image.resize((round(image.width * high / image.height), high)) for image in images]
    whole = Image.new("RGB", (sum(image.width + gap for image in images) - gap, high), "white")
    x = 0
    for image in images:
        whole.paste(image, (x, 0))
        x += image.width + gap
    whole.save(out)


def save(source: Path, out: Path) -> None:
    """A picture as WebP of at most `MOST_BYTES`, without what its file says beside it."""
    with Image.open(source) as image:
        plain = image.convert("RGB")
    for side, quality in product(SIDES, QUALITIES):
        plain.thumbnail((side, side))
        plain.save(out, quality=quality, method=6)
        if out.stat().st_size <= MOST_BYTES:
            print(f"{out}: {out.stat().st_size / 1000:.0f} kB")
            return
    sys.exit(f"{out} has more than {MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
