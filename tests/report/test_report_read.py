"""Reading run folders: any state of a run is read, and what is no run is refused in one line."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import UserError
from norm_matters.report.read import best_epoch, flatten, not_finite, read_run, show

LEAVES = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
TREES = st.recursive(
    LEAVES, lambda inner: st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3), max_leaves=8
)


def leaves(value: Any) -> int:
    return sum(map(leaves, value.values())) if isinstance(value, dict) and value else 1


@settings(deadline=None, max_examples=50)
@given(TREES)
def test_flatten_keeps_every_leaf_under_its_own_key(tree: Any) -> None:
    flat = dict(flatten(tree))
    assert len(flat) == leaves(tree)
    for key, value in flat.items():
        found = tree
        for part in key.split(".") if key else []:
            found = found[part]
        assert found == value


def test_flatten_numbers_lists_of_mappings() -> None:
    phases = {"phases": [{"epoch": 0, "lr": 0.1}, {"epoch": 5, "betas": [0.9, 0.99]}], "options": {}}
    assert dict(flatten(phases)) == {
        "phases.0.epoch": 0,
        "phases.0.lr": 0.1,
        "phases.1.epoch": 5,
        "phases.1.betas": [0.9, 0.99],
        "options": {},
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), ("l1", "l1"), (True, "true"), (0.001, "0.001"), ([1, "a"], "1, a"), ([], "[]"), ({}, "{}")],
)
def test_values_are_shown_as_in_a_config(value: Any, text: str) -> None:
    assert show(value) == text


def test_a_run_is_read_whole(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run("a-run", [{}, {"val_error5": None}]))
    assert run.name == "a-run"
    assert run.config["model.norm"] == "l1"
    assert run.provenance["events.0.epoch"] == 2
    assert run.results["epoch"].tolist() == [1, 2]
    assert run.results["val_loss"].tolist() == [3.0, 1.5]
    np.testing.assert_equal(run.results["val_error5"], [30.0, math.nan])
    assert (run.last_epoch, run.planned_epochs) == (2, 3)


def test_a_run_that_has_just_begun_is_read(make_run: Callable[..., Path]) -> None:
    folder = make_run("new", epochs=None)
    (folder / "provenance.json").unlink()
    run = read_run(folder)
    assert (run.last_epoch, run.planned_epochs, run.provenance) == (0, None, {})
    assert best_epoch(run) is None


def test_a_row_that_is_being_written_is_left_out(make_run: Callable[..., Path]) -> None:
    folder = make_run("running", [{}, {}])
    with (folder / "results.csv").open("a") as file:
        file.write("3,33,0.1")
    assert read_run(folder).last_epoch == 2


def test_columns_of_another_version_do_no_harm(make_run: Callable[..., Path]) -> None:
    folder = make_run("other")
    (folder / "results.csv").write_text("epoch,val_loss,novelty\n1,0.5,7\n")
    run = read_run(folder)
    assert run.results["val_loss"].tolist() == [0.5]
    assert np.isnan(run.results["lr"]).all()
    assert "novelty" not in run.results


def test_the_best_epoch_is_the_first_of_the_lowest_errors(make_run: Callable[..., Path]) -> None:
    errors = [math.nan, 20.0, 10.0, 10.0, 30.0]
    assert best_epoch(read_run(make_run("a", [{"val_error1": error} for error in errors]))) == 3


def test_losses_that_are_not_finite_are_named(make_run: Callable[..., Path]) -> None:
    rows = [{}, {"train_loss": math.nan}, {}, {"train_loss": math.inf, "val_loss": -math.inf}]
    assert not_finite(read_run(make_run("a", rows))) == [
        "The training loss is not a finite number in epoch 2 and 1 later.",
        "The validation loss is not a finite number in epoch 4.",
    ]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", None, "is not a run: it has no config.yaml"),
        ("config.yaml", "a: [", "config.yaml, line"),
        ("config.yaml", "- a", "not a config"),
        ("config.yaml", "\udcff", "cannot be read"),
        ("provenance.json", "{", "provenance.json: broken JSON"),
        ("provenance.json", "[" * 100_000, "provenance.json: broken JSON"),
        ("results.csv", "val_loss\n1\n", "does not count up"),
        ("results.csv", "epoch,val_loss\n2,1\n1,1\n", "does not count up"),
        ("results.csv", "epoch,val_loss\n1,1\n1,1\n", "does not count up"),
        ("results.csv", "epoch,val_loss\n1.5,1\n", "does not count up"),
        ("results.csv", f"epoch,val_loss\n{10**30},1\n", "does not count up"),
        ("results.csv", "epoch,val_loss\n1,<b>\n", "results.csv, line 2"),
    ],
)
def test_damaged_runs_are_refused(make_run: Callable[..., Path], file: str, text: str | None, message: str) -> None:
    path = make_run("damaged", [{}]) / file
    path.unlink()
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message) as caught:
        read_run(path.parent)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_beyond_floats_are_infinite(make_run: Callable[..., Path]) -> None:
    folder = make_run("huge")
    (folder / "results.csv").write_text(f"epoch,val_loss\n1,{10**400}\n")
    assert read_run(folder).results["val_loss"].tolist() == [math.inf]
