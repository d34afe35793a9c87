"""Run folders as a training leaves them, without training."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from norm_matters.core.config import DataConfig, ModelConfig, RunConfig, TrainConfig, dump_config
from norm_matters.record.instruments import append_measurements, write_layout
from norm_matters.record.table import append_row

PROVENANCE = {
    "command": ["norm-matters", "train", "--name", "two words"],
    "package": {"version": "0.1.0", "commit": "0123abc", "dirty": False},
    "data": {"val": "test", "classes": ["cat", "dog"]},
    "events": [{"event": "resumed", "epoch": 2}],
}


def _row(epoch: int) -> dict[str, float | None]:
    """A row of results.csv whose values tell its epoch."""
    return {
        "epoch": epoch,
        "step": 11 * epoch,
        "train_loss": 2 / epoch,
        "val_loss": 3 / epoch,
        "train_error1": 60 / epoch,
        "val_error1": 80 / epoch,
        "train_error5": 20 / epoch,
        "val_error5": 30 / epoch,
        "lr": 0.1,
        "seconds": 2.0,
        "images_per_second": 500.0 + epoch,
        "val_seconds": 0.5,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes the folder of a run; `rows` says how each epoch's row differs from the usual one."""

    def make(
        name: str,
        rows: Sequence[Mapping[str, float | None]] = (),
        *,
        norm: str | None = "l1",
        model: str = "resnet8",
        dataset: str = "digits",
        seed: int = 0,
        epochs: int | None = 3,
        provenance: Any = PROVENANCE,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = RunConfig(
            model=ModelConfig(name=model, norm=norm),
            data=DataConfig(name=dataset),
            train=TrainConfig(epochs=epochs),
            seed=seed,
        )
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "provenance.json").write_text(json.dumps(provenance))
        for epoch, changes in enumerate(rows, start=1):
            append_row(folder / "results.csv", _row(epoch) | dict(changes))
        return folder

    return make


@pytest.fixture
def runs_in_all_states(make_run: Callable[..., Path]) -> dict[str, Path]:
    """A finished run, one in its first epoch, one after it, and some whose loss or everything is lost."""
    lost = {"train_loss": math.nan, "val_loss": math.inf}
    metrics = set(_row(1)) - {"epoch"}
    return {
        "done": make_run("done", [{}, {}, {}]),
        "none": make_run("none", seed=1),
        "one": make_run("one", [{"train_error5": None, "val_error5": None}], seed=2),
        "lost": make_run("lost", [{}, lost, lost], seed=3),
        "huge": make_run("huge", [{}, dict.fromkeys(metrics, 1e308), dict.fromkeys(metrics, -1e308)], seed=4),
        "all lost": make_run("all lost", [dict.fromkeys(metrics, math.nan)], norm="l2"),
        "all infinite": make_run("all infinite", [dict.fromkeys(metrics, math.inf)], norm="l2", seed=1),
        "all empty": make_run("all empty", [dict.fromkeys(metrics)], norm="l2", seed=2),
    }


@pytest.fixture(scope="module")
def open_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """A function that opens a file at a width and returns the browser; the browser is the same one every time."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{argument}")
    for argument in ("disable-background-networking", "disable-component-update", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def visit(page: Path, width: int):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for log in ("browser", "performance"):
            browser.get_log(log)  # forgets what earlier pages did
        browser.get(page.as_uri())
        drawn = "return window.Bokeh === undefined || Bokeh.documents.length == 1 && Bokeh.documents[0].is_idle"
        WebDriverWait(browser, 30).until(lambda _: browser.execute_script(drawn))
        return browser

    yield visit
    browser.quit()


@pytest.fixture
def add_measurements() -> Callable[..., None]:
    """A function that gives a run measurements of some epochs, for weights and norms of the names given."""

    def add(
        run: Path,
        epochs: Sequence[int],
        *,
        weights: Sequence[str] = ("conv1", "fc"),
        norms: Sequence[str] = ("bn1",),
        inputs: bool = False,
        value: float | None = None,
    ) -> None:
        columns = [("weight_norm", layer, 3 + i) for i, layer in enumerate(weights)]
        for name, size in (("effective_lr", 1), ("angle", 5), ("layer_angle", 1), ("equilibrium", 1)):
            columns += [(name, layer, size) for layer in weights]
        columns += [("sigma", norm, 5) for norm in norms]
        if inputs:
            for name in ("input_max", "input_sum_abs", "input_sum_squares", "input_outside_float16"):
                columns += [(name, norm, 1) for norm in norms]
            columns += [("scale_change", layer, 1) for layer in weights]
        write_layout(run, columns)
        width = sum(size for _, _, size in columns)
        for epoch in epochs:
            row = 1e-6 * np.arange(1, width + 1) * epoch if value is None else np.full(width, value)
            append_measurements(run, epoch, row)

    return add
