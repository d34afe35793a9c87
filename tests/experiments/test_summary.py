"""The tables of a sweep: what counts, what is paired with what, and how it is written."""

import csv
import io
import math
from typing import Any

import numpy as np
import pytest

from norm_matters.core.config import RunConfig
from norm_matters.core.errors import UserError
from norm_matters.experiments.cells import Cell
from norm_matters.experiments.summary import (
    Measure,
    Outcome,
    find_baseline,
    run_rows,
    summarise,
    table_csv,
)

VALUES = {"l2": [10.0, 12.0, 11.0], "l1": [10.5, 12.8, 11.2], "linf": [14.0, 13.0, 15.5]}


def outcome(values: list[float | None], *, status: str = "done", **settings: Any) -> Outcome:
    """A run whose val_error1 develops so; settings by name: norm, lr, seed."""
    keys = {"norm": "model.norm", "lr": "regime.lr", "seed": "seed"}
    config = RunConfig.model_validate(
        {
            "model": {"norm": settings.get("norm")},
            "regime": {"lr": settings.get("lr")},
            "seed": settings["seed"],
            "train": {"epochs": max(1, len(values))},
        }
    )
    cell = Cell("-".join(map(str, settings.values())), config, {keys[name]: value for name, value in settings.items()})
    rows = [
        {"epoch": epoch, "val_error1": value, "val_loss": 1.0, "seconds": 2.0, "images_per_second": 5.0}
        for epoch, value in enumerate(values, start=1)
    ]
    return Outcome(cell, status, rows)


def outcomes() -> list[Outcome]:
    return [
        outcome([50.0, v], norm=norm, seed=seed) for norm, values in VALUES.items() for seed, v in enumerate(values)
    ]


def test_arms_have_means_and_pairs_of_seeds() -> None:
    arms = summarise(outcomes(), Measure(), {"model.norm": "l2"})
    assert [arm.label for arm in arms] == ["l2", "l1", "linf"]
    assert [arm.row["n"] for arm in arms] == [3, 3, 3]
    row = arms[1].row
    assert row["val_error1_mean"] == pytest.approx(np.mean(VALUES["l1"]))
    assert row["val_error1_sd"] == pytest.approx(np.std(VALUES["l1"], ddof=1))
    differences = np.subtract(VALUES["l1"], VALUES["l2"])
    assert (row["baseline"], row["pairs"]) == ("l2", 3)
    assert row["difference"] == pytest.approx(differences.mean())
    half = 4.302653 * differences.std(ddof=1) / math.sqrt(3)  # t(0.975; 2)
    assert row["difference_low"] == pytest.approx(differences.mean() - half, abs=1e-6)
    assert row["p_holm"] == pytest.approx(max(row["p_t"], 2 * min(row["p_t"], arms[2].row["p_t"])))
    assert arms[0].row["baseline"] is None
    assert arms[0].row["p_t"] is None


def test_only_finished_runs_count_and_only_common_seeds_are_paired() -> None:
    runs = [
        outcome([10.0], norm="l2", seed=0),
        outcome([11.0], norm="l2", seed=1),
        outcome([12.0], norm="l2", seed=2),
        outcome([13.0], norm="l1", seed=2),
        outcome([10.5], norm="l1", seed=1),
        outcome([99.0], norm="l1", seed=0, status="failed"),
        outcome([math.nan], norm="l1", seed=3),
    ]
    row = summarise(runs, Measure(), {"model.norm": "l2"})[1].row
    assert (row["runs"], row["n"], row["pairs"]) == (4, 2, 2)
    assert row["difference"] == pytest.approx(((13 - 12) + (10.5 - 11)) / 2)


def test_a_baseline_is_that_of_the_same_other_settings() -> None:
    runs = [
        outcome([base + lr], norm=norm, lr=lr, seed=seed)
        for norm, base in (("l2", 10.0), ("l1", 20.0))
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    arms = {arm.label: arm.row for arm in summarise(runs, Measure(), {"model.norm": "l2"})}
    assert arms["norm l1, lr 0.2"]["baseline"] == "norm l2, lr 0.2"
    assert arms["norm l1, lr 0.2"]["difference"] == pytest.approx(10)
    one = {arm.label: arm.row for arm in summarise(runs, Measure(), {"model.norm": "l2", "regime.lr": 0.1})}
    assert one["norm l1, lr 0.2"]["baseline"] == one["norm l2, lr 0.2"]["baseline"] == "norm l2, lr 0.1"


def test_final_and_best_values() -> None:
    rows = outcome([40.0, 20.0, 30.0, 25.0], seed=0).rows
    assert Measure().final(rows) == 25
    assert Measure(last="2ep").final(rows) == 27.5
    assert Measure(last="75%").final(rows) == 25
    assert Measure(last="1%").final(rows) == 25
    assert Measure().best(rows) == (20.0, 2)
    assert (
        Measure("images_per_second").best([{"epoch": 1, "images_per_second": 3}, {"epoch": 2, "images_per_second": 4}])[
            1
        ]
        == 2
    )
    assert math.isnan(Measure(last="2ep").final(outcome([math.nan, 1.0], seed=0).rows))
    assert Measure().best(outcome([math.nan], seed=0).rows)[1] is None


@pytest.mark.parametrize("measure", [Measure("val_eror1"), Measure("epoch"), Measure(last="5st"), Measure(last="long")])
def test_wrong_measures(measure: Measure) -> None:
    with pytest.raises(UserError, match=r"--metric|--last"):
        measure.check()


def test_rows_of_runs_and_their_csv() -> None:
    rows = run_rows(
        [outcome([30.0, 20.0, 25.0], norm='a,"b', seed=1), outcome([], norm="l2", seed=2, status="new")], Measure()
    )
    assert rows[0]["norm"] == 'a,"b'
    assert (rows[0]["val_error1"], rows[0]["best_val_error1"], rows[0]["best_epoch"]) == (25, 20, 2)
    assert (rows[0]["seconds"], rows[1]["epoch"], rows[1]["status"]) == (6, 0, "new")
    read = list(csv.DictReader(io.StringIO(table_csv(rows))))
    assert (read[0]["norm"], read[0]["val_error1"], read[1]["val_error1"]) == ('a,"b', "25.0", "")
    assert table_csv([]) == ""


def test_numbers_of_the_csv_read_back_exactly() -> None:
    value = 0.1 + 0.2
    text = table_csv([{"value": value}])
    assert float(text.splitlines()[1]) == value


def test_baselines_are_checked() -> None:
    cells = [each.cell for each in outcomes()]
    same = lambda config: config  # noqa: E731
    assert find_baseline({"norm": "l2"}, cells, same) == {"model.norm": "l2"}
    with pytest.raises(UserError, match="no run has topk; there are: l2; l1; linf"):
        find_baseline({"norm": "topk"}, cells, same)
    with pytest.raises(UserError, match="is not varied in this sweep; it varies norm"):
        find_baseline({"lr": 0.1}, cells, same)
