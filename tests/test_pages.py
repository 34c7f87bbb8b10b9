"""Reports as a browser shows them, offline, on a desk and on a phone: nothing runs out of the page, every figure is drawn, no script fails."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from outgrow import grow
from outgrow.cli import app
from outgrow.lab import study_page
from outgrow.lab.tiny import TINY, write_tiny

STUDIES = Path(__file__).parent.parent / "studies"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MEASURE = """<script>
const errors = []; addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => setTimeout(() => {
  const box = element => element.getBoundingClientRect();
  const plots = [...document.querySelectorAll(".js-plotly-plot")].map(plot => {
    const axis = plot.querySelector(".xtitle"), legend = plot.querySelector(".legend .bg");
    return {
      drawn: plot.querySelectorAll(".trace").length, right: box(plot.querySelector(".main-svg")).right,
      clear: !axis || !legend || box(legend).top >= box(axis).bottom - 2,
    };
  });
  parent.postMessage(JSON.stringify({width: document.documentElement.scrollWidth, plots, errors}), "*");
}, 500));
</script>"""
FRAME = """<!doctype html><pre id="found"></pre><script>
addEventListener("message", event => document.getElementById("found").textContent = event.data);
</script><iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe>"""


def shown(page: Path, width: int, folder: Path) -> dict:
    """What a page measures of itself in a window of a width."""
    assert BROWSER
    (folder / "page.html").write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{MEASURE}", 1), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        *QUIET,
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--window-size=1400,1000", "--virtual-time-budget=20000", "--dump-dom", f"file://{folder / 'frame.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(found[1])


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The kinds of pages, by name, made of the records of this repository; intervals of few resamples look as those of many do."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(study_page, "fitted_laws", partial(study_page.fitted_laws, resamples=20))
    folder = tmp_path_factory.mktemp("pages")
    made = {name: folder / f"{name}.html" for name in ("studies", "comparison", "fit", "diagnosis")}
    table = folder / "runs.csv"
    rows = [(n, d, 1.7 + 400 / n**0.34 + 410 / d**0.28) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)]
    table.write_text("params,tokens,loss\n" + "".join(f"{n},{d},{loss * (1 + 0.001 * (i % 3))}\n" for i, (n, d, loss) in enumerate(rows)))
    write_tiny(folder / "base", TINY["llama"], dtype=torch.float32)
    grow(folder / "base", folder / "grown", "stack(factor=2)")
    for command in (
        ["report", "operators", "timing", "sizes", "--scale", "nano", "--folder", str(STUDIES), "--output", str(made["studies"])],
        ["report", "--seeds", "0,1,2,3,4", "--runs", str(STUDIES / "results" / "nano"), "--output", str(made["comparison"])],
        ["fit", str(table), "--resamples", "50", "--output", str(made["fit"])],
        ["diagnose", str(folder / "base"), str(folder / "grown"), "--documents", "0", "--output", str(made["diagnosis"])],
    ):
        app(command, standalone_mode=False)
    monkeypatch.undo()
    return made


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine; Debian's is 'apt-get install chromium'")
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("kind", ["studies", "comparison", "fit", "diagnosis"])
def test_a_page_fits_its_window_and_draws_its_figures(pages, kind, width, tmp_path):
    found = shown(pages[kind], width, tmp_path)
    assert found["errors"] == []
    assert found["width"] <= width
    assert found["plots"]
    for plot in found["plots"]:
        assert plot["drawn"]
        assert plot["right"] <= width
        assert plot["clear"], "a legend lies over an axis"


def test_a_page_needs_nothing_from_elsewhere(pages):
    for page in pages.values():
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="?(?:https?:)?//', page.read_text(encoding="utf-8"))
