"""Comparing runs: what is one group, what its figures are, and what a reader is told about them."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import StorageError, UserError
from norm_matters.report import compare
from norm_matters.report.groups import Group, differing_keys, group_runs
from norm_matters.report.read import METRICS, RunFiles, read_run


def a_run(folder: str, values: list[float], **config: object) -> RunFiles:
    """A run whose every metric has the same values, from epoch 1."""
    columns = {metric: np.array(values, float) for metric in METRICS}
    epochs = np.arange(1, len(values) + 1)
    return RunFiles(Path(folder), {"model.norm": "l1", "seed": 0} | config, {}, {"epoch": epochs, **columns})


def body(page: Path) -> str:
    return page.read_text().partition("<script>")[0].partition("</style>")[2]


def test_runs_that_differ_in_seed_and_place_only_are_one_group() -> None:
    runs = [
        a_run("l1-s0", [1], seed=0, output="runs", name=None),
        a_run("l2-s0", [1], **{"model.norm": "l2"}),
        a_run("l1-s1", [1], seed=1, output="elsewhere", name="l1-s1"),
        a_run("l1-lr", [1], **{"regime.lr": 0.1}),
        a_run("l1-text", [1], **{"regime.lr": "0.1"}),
    ]
    groups = group_runs(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("l1", 2), ("l2", 1), ("l1-lr", 1), ("l1-text", 1)]
    assert groups[0].seeds == ["0", "1"]
    assert differing_keys(groups) == ["model.norm", "regime.lr"]
    assert differing_keys(groups[:1]) == []


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([1, 2]), st.integers(0, 3)), max_size=8), st.integers()
)
def test_every_run_is_in_one_group_whatever_the_order(facts: list[tuple[str, int, int]], order: int) -> None:
    runs = [a_run(f"run{i}", [1], seed=seed, model=model, epochs=n) for i, (model, n, seed) in enumerate(facts)]
    random.Random(order).shuffle(runs)
    groups = group_runs(runs)
    assert sorted(run.name for group in groups for run in group.runs) == sorted(run.name for run in runs)
    assert len(groups) == len({(model, n) for model, n, _ in facts})
    assert len({group.label for group in groups}) == len(groups)
    for group in groups:
        assert len({(run.config["model"], run.config["epochs"]) for run in group.runs}) == 1


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["net-s1", "net-s1-2"], ["net", "net-2"]),
        (["a/net-s1", "b/net-s1"], ["net", "net (2)"]),
        (["net-s10", "s1-net"], ["net-s10", "s1-net"]),
        (["net-s10-s1"], ["net-s10"]),
    ],
)
def test_labels_are_folder_names_without_the_seed(names: list[str], labels: list[str]) -> None:
    runs = [a_run(name, [1], seed=1, number=number) for number, name in enumerate(names)]
    assert [group.label for group in group_runs(runs)] == labels


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4), min_size=1, max_size=4))
def test_figures_are_those_of_the_last_epoch_that_all_runs_have(values: list[list[float]]) -> None:
    group = Group("g", [a_run(f"r{seed}", some, seed=seed) for seed, some in enumerate(values)])
    row, shortest = group.row(), min(map(len, values))
    last = [some[shortest - 1] for some in values]
    assert (row["n"], row["epoch"]) == (len(values), shortest)
    assert row["val_loss"] == pytest.approx(math.fsum(last) / len(last), abs=1e-6)
    if len(values) == 1:
        assert math.isnan(row["val_loss_std"])
    else:
        variance = math.fsum((value - math.fsum(last) / len(last)) ** 2 for value in last) / (len(last) - 1)
        assert row["val_loss_std"] == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-6)
    epochs, (mean, low, high) = group.curve("val_loss")
    assert epochs.tolist() == list(range(1, max(map(len, values)) + 1))
    for epoch, *found in zip(epochs, mean, low, high, strict=True):
        there = [some[epoch - 1] for some in values if len(some) >= epoch]
        assert found == pytest.approx([sum(there) / len(there), min(there), max(there)], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_lost_run_is_never_averaged_away(bad: float) -> None:
    group = Group("g", [a_run("a", [1, 2], seed=0), a_run("b", [1, bad], seed=1)])
    assert math.isnan(group.row()["val_loss"])
    assert math.isnan(group.row()["val_loss_std"])
    np.testing.assert_equal(group.curve("val_loss")[1], [[1, math.nan]] * 3)
    assert group.notes() == [
        "b: The training loss is not a finite number in epoch 2.",
        "b: The validation loss is not a finite number in epoch 2.",
    ]


def test_a_reader_is_told_what_a_mean_hides() -> None:
    runs = [a_run("a", [1, 2]), a_run("b", [1]), a_run("c", []), a_run("d", [1, 2], seed=1)]
    (group,) = group_runs(runs)
    assert group.notes() == [
        "a: 1 of 4 runs without an ended epoch, not counted.",
        "a: the runs are not equally long (a: 2, b: 1, d: 2); compared at epoch 1.",
        "a: a seed occurs twice; the spread is smaller than that of different seeds.",
    ]
    assert Group("fine", [runs[0], runs[3]]).notes() == []


def test_a_comparison_has_table_and_page(make_run: Callable[..., Path], tmp_path: Path) -> None:
    errors = {("l1", 0): 10.0, ("l1", 1): 14.0, ("l2", 0): 11.0}
    runs = [
        make_run(f"{norm}-s{seed}", [{}, {"val_error1": error}], norm=norm, seed=seed)
        for (norm, seed), error in errors.items()
    ]
    found = compare([*runs, runs[0], tmp_path / "." / "l1-s0"], tmp_path / "page.html")
    expected = {"run": ["l1", "l2"], "n": [2, 1], "seeds": ["0, 1", "0"], "epoch": [2, 2], "val_error1": [12.0, 11.0]}
    pd.testing.assert_frame_equal(found.table[list(expected)], pd.DataFrame(expected), check_dtype=False)
    np.testing.assert_allclose(found.table["val_error1_std"], [math.sqrt(8), math.nan])
    assert (found.page, found.notes) == (tmp_path / "page.html", [])
    text = body(found.page)
    assert "<h1>Comparison of 3 runs</h1>" in text
    assert "12 ± 2.8" in text
    assert "Band: from their minimum to their maximum" in text
    assert '<th scope="col">model.norm</th>' in text
    assert all(run.name in text for run in runs)
    assert text.count("<figure") == 8


def test_runs_in_all_states_can_be_compared(runs_in_all_states: dict[str, Path], tmp_path: Path) -> None:
    found = compare(list(runs_in_all_states.values()), tmp_path / "page.html")
    assert found.table["n"].tolist() == [4, 3]
    text = body(found.page)
    assert "1 of 5 runs without an ended epoch" in text
    assert all(state in text for state in runs_in_all_states)


def test_runs_without_epochs_have_a_table_and_no_plots(make_run: Callable[..., Path], tmp_path: Path) -> None:
    found = compare([make_run("a"), make_run("b", norm="l2")], tmp_path / "page.html")
    assert found.table["n"].tolist() == [0, 0]
    assert found.table["epoch"].isna().all()
    assert "No run has ended an epoch" in body(found.page)
    assert "<figure" not in body(found.page)


def test_hostile_names_are_escaped(make_run: Callable[..., Path], tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    text = compare([make_run(name, [{}], norm="</script>")], tmp_path / "page.html").page.read_text()
    assert name not in text
    assert text.count("<script>") == text.count("</script>") == 3


def test_mistakes_are_user_errors_and_write_nothing(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, output = make_run("run"), tmp_path / "page.html"
    for runs, target, message in [
        ([], output, "at least one run"),
        ([run, tmp_path / "missing"], output, "missing' is not a run"),
        ([run], tmp_path, "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            compare(runs, target)
    with pytest.raises(StorageError, match=r"page\.html"):
        compare([run], tmp_path / "no-folder" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_without_its_report_is_compared_as_it_is(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run("run", [{}])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    compare([folder], tmp_path / "page.html")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert read_run(folder).last_epoch == 1
