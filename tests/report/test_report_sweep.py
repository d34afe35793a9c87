"""The page of a sweep: whatever became of its runs, and whatever their labels are."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from norm_matters.report.groups import Group
from norm_matters.report.read import read_run
from norm_matters.report.sweep import SweepArm, write_sweep_page

HOSTILE = "<script>alert(1)</script> & 'l1'"


def summary_row(**values: Any) -> dict[str, Any]:
    """A row of summary.csv with these values and nothing else known."""
    columns = [f"{name}val_error1_{part}" for name in ("", "best_") for part in ("mean", "sd", "low", "high")]
    columns += ["baseline", "pairs", "difference", "difference_low", "difference_high", "p_t", "p_holm"]
    return {**dict.fromkeys(columns), "runs": 2, "n": 0, **values}


def written(tmp_path: Path, arms: list[SweepArm], **options: Any) -> str:
    page = tmp_path / "summary.html"
    runs = [{"run": "a", "norm": HOSTILE, "val_error1": 3.25, "error": None}]
    write_sweep_page(page, "Sweep", "two arms", arms, metric="val_error1", measured="last epoch", runs=runs, **options)
    return page.read_text()


def test_a_page_of_two_arms(tmp_path: Path, make_run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    l2 = Group("l2", [read_run(make_run(f"l2-{seed}", [{}, {}], seed=seed)) for seed in (0, 1)])
    l1 = Group(HOSTILE, [read_run(make_run("l1", [{}, {}]))])
    arms = [
        SweepArm(
            l2,
            [3.0, 5.0],
            summary_row(n=2, val_error1_mean=4.0, val_error1_sd=1.4, val_error1_low=-8.7, val_error1_high=16.7),
        ),
        SweepArm(
            l1,
            [6.0],
            summary_row(n=1, val_error1_mean=6.0, baseline="l2", pairs=1, difference=3.0, p_t=1e-6, p_holm=0.02),
        ),
    ]
    text = written(tmp_path, arms, notes=["a run failed"])
    visible = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    for words in (
        "4 ± 1.4",
        "-8.7 to 16.7",
        "1 of 2",
        "+3",
        "&lt; 0.0001",
        "0.02",
        "difference from l2",
        "a run failed",
    ):
        assert words in visible, words
    assert "<script>alert" not in text
    assert "Validation error@1 (%), last epoch" in text
    assert '"name":"CategoricalAxis"' in text  # labels at the ticks, not numbers
    assert not caplog.records  # bokeh logs what is wrong with a plot


def test_a_page_without_one_finished_run(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    begun = Group("begun", [read_run(make_run("begun", []))])
    text = written(tmp_path, [SweepArm(begun, [], summary_row()), SweepArm(Group("none", []), [], summary_row())])
    assert "0 of 2" in text
    assert "No run has ended an epoch" in text


def test_arms_with_baselines_of_their_own_name_them(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    group = Group("a", [read_run(make_run("a", [{}]))])
    rows = [summary_row(n=1, baseline=name, val_error1_mean=1.0) for name in ("l2 at 0.1", "l2 at 0.2")]
    text = written(tmp_path, [SweepArm(group, [1.0], row) for row in rows])
    assert "difference from its baseline" in text
    assert "l2 at 0.2" in text
