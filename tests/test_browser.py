"""What a user sees in a browser: a search in TensorBoard, and the page of a comparison."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_autolr import cli

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CONFIGS = Path(__file__).parents[1] / "configs" / "digits"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A page with what it asked for and what it complained of."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1500, "height": 1000}, **options)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)


def pixels(png: bytes) -> Any:
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(png)).convert("RGB"), dtype=int)


def share_like(picture: Any, color: str, distance: int = 60) -> float:
    """Share of the pixels that differ less than this from a colour, in the sum over its three channels."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(picture - wanted).sum(axis=-1) < distance).mean())


# --- TensorBoard


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs with one search of AutoLRS in it."""
    folder = tmp_path_factory.mktemp("runs")
    path = list(sys.path)
    options = ["--trainer.max_steps=400", "--trainer.val_check_interval=50", f"--trainer.logger.save_dir={folder}"]
    try:
        assert cli.main(["fit", "--config", str(CONFIGS / "autolrs.yaml"), *QUIET, *options]) == 0
    finally:
        sys.path[:] = path
    return folder


@pytest.fixture(scope="module")
def tensorboard(run: Path) -> Iterator[str]:
    """Address of a TensorBoard on these runs, at a port that was free."""
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={run}", "--host=127.0.0.1", "--port=0"]
    command += ["--load_fast=false", "--reload_interval=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            found = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in process.stdout)
            yield next(match[0] for match in found if match)
        finally:
            process.terminate()


def test_tensorboard_shows_the_learning_rate_and_the_cost(tensorboard: str, browser: Any) -> None:
    # One name at a time: of a group that has more than six, the others are on its next page.
    for name in ("autolr/search_seconds", "autolr/candidates", "autolr/coarse_candidates", "val_loss", "autolr/lr"):
        page = Visit(browser, f"{tensorboard}?tagFilter={name}#timeseries").page
        page.get_by_title(name, exact=True).first.wait_for(timeout=30_000)
    chart = page.locator("scalar-card line-chart").first  # of autolr/lr, the last name
    chart.wait_for(timeout=30_000)
    page.wait_for_timeout(1500)  # it is drawn on a canvas, after its data have come
    drawn = pixels(chart.screenshot())
    assert (drawn.sum(axis=-1) < 500).mean() > 0.002  # a dark line on white


def test_tensorboard_shows_the_figures_at_their_size(tensorboard: str, browser: Any) -> None:
    page = Visit(browser, f"{tensorboard}#images").page
    for name in ("candidates", "probes", "schedule"):
        picture = page.locator("tf-image-loader", has_text=f"autolr/{name}").locator("img")
        picture.wait_for(timeout=30_000)
        page.wait_for_function("image => image.naturalWidth == 720", arg=picture.element_handle(), timeout=30_000)
        box = picture.bounding_box()
        assert box is not None
        assert box["width"] > 300  # letters of 9 points are then 8 pixels high, and more
        shown = pixels(picture.screenshot())
        assert 0.5 < share_like(shown, "#ffffff") < 0.98


def test_tensorboard_compares_options_with_the_final_metric(tensorboard: str, browser: Any, run: Path) -> None:
    page = Visit(browser, f"{tensorboard}#hparams").page
    for name in ("autolr/method", "hp_metric", "autolr/search_steps"):
        page.get_by_text(name, exact=True).first.wait_for(timeout=30_000)
    loss = json.loads(next(run.rglob("result.json")).read_text())["metrics"]["val_loss"]
    page.get_by_text(f"{loss:.5g}").first.wait_for(timeout=30_000)  # the metric at the end of training


# --- a comparison


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of four configurations over two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    configs = [str(CONFIGS / f"{name}.yaml") for name in ("cosine", "rex", "constant", "autolrs")]
    options = ["--seeds=2", "--jobs=2", "--equal-total-steps", f"--out={folder}"]
    short = ["--trainer.max_steps=40", "--trainer.val_check_interval=10", *QUIET]
    command = [sys.executable, "-m", "lightning_autolr", "compare", *configs, *options, "--", *short]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    return folder / "comparison.html"


def test_the_page_of_a_comparison_needs_nothing_but_itself(comparison: Path, browser: Any) -> None:
    visit = Visit(browser, comparison.as_uri(), offline=True)
    visit.page.wait_for_load_state("networkidle")
    assert visit.errors == []
    assert visit.requests == [comparison.as_uri()]
    assert visit.page.locator("table tbody tr").count() == 4
    assert visit.page.locator("h1").inner_text() == "test_loss of 4 configurations, 2 seeds"


def test_the_page_of_a_comparison_shows_curves_of_every_configuration(comparison: Path, browser: Any) -> None:
    page = Visit(browser, comparison.as_uri()).page
    figure = page.locator(".figure svg")
    box = figure.bounding_box()
    assert box is not None
    assert box["width"] > 1000
    shown = pixels(figure.screenshot())
    for color in ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"):
        assert share_like(shown, color, 150) > 2e-4
    configurations = page.locator("details")
    assert configurations.count() == 4
    configurations.first.locator("summary").click()
    assert "lightning_autolr.ScheduleCallback" in configurations.first.locator("pre").inner_text()


def test_the_page_of_a_comparison_fits_a_narrow_window(comparison: Path, browser: Any) -> None:
    page = Visit(browser, comparison.as_uri()).page
    page.set_viewport_size({"width": 420, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
