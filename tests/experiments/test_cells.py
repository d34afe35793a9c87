"""Cells: what they are called, what they tell a process to do, and that all their mistakes are told at once."""

from typing import Any

import pytest

from norm_matters.core.config import RunConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.experiments.cells import Cell, label, make_cells
from norm_matters.experiments.grid import override, parse_grid
from norm_matters.experiments.sweeping import completion
from norm_matters.run import CHECKS, FREE_TO_CHANGE, complete

FREE = FREE_TO_CHANGE - {"train.epochs"}


def filled(config: RunConfig) -> RunConfig:
    return complete(config, epochs=20)


def cells_of(document: dict[str, Any]) -> list[Cell]:
    return make_cells(parse_grid(document), complete=filled, checks=CHECKS, free=FREE)


def test_names_tell_model_norm_dataset_epochs_and_seed() -> None:
    cells = cells_of({"base": {"epochs": 3}, "grid": {"norm": ["l2", "topk:k=10"], "seed": [0, 1]}})
    assert [cell.name for cell in cells] == [
        "resnet8-l2-digits-3ep-s0",
        "resnet8-l2-digits-3ep-s1",
        "resnet8-topk-k10-digits-3ep-s0",
        "resnet8-topk-k10-digits-3ep-s1",
    ]
    assert cells[3].settings == {"model.norm": "topk:k=10", "seed": 1}
    assert cells[3].arm == {"model.norm": "topk:k=10"}


def test_names_do_not_depend_on_the_rest_of_the_grid() -> None:
    small = cells_of({"base": {"lr": 0.1, "seed": 1}})
    large = cells_of({"grid": {"lr": [0.2, 0.1], "seed": "0..2", "norm": ["l1", "l2"]}, "base": {"epochs": 20}})
    assert small[0].name == "resnet8-l2-digits-20ep-lr0.1-s1"
    assert small[0].name in {cell.name for cell in large}
    assert len({cell.name for cell in large}) == 12


def test_what_no_result_depends_on_is_in_no_name_unless_it_is_varied() -> None:
    (cell,) = cells_of({"base": {"data.workers": 2, "save_memory": True, "device": "cpu"}})
    assert cell.name == "resnet8-l2-digits-20ep-s0"
    names = [cell.name for cell in cells_of({"grid": {"save_memory": [False, True]}})]
    assert names == ["resnet8-l2-digits-20ep-s0", "resnet8-l2-digits-20ep-save_memory-s0"]


def test_long_and_equal_names_get_a_hash() -> None:
    phases = [[{"optimizer": "SGD", "lr": lr, "momentum": 0.9, "weight_decay": 0.0005}] for lr in (0.1, 0.2)]
    found = cells_of({"grid": {"regime.phases": phases, "seed": [0, 1]}})
    assert len({cell.name for cell in found}) == 4
    first, second = (cell.name.removesuffix("-s0").removesuffix("-s1") for cell in found[:2])
    assert first == second  # one arm, one hash
    assert all(len(cell.name) <= 128 for cell in found)
    paths = cells_of({"grid": {"data.name": ["imagefolder:/a/photos", "imagefolder:/b/photos"]}, "base": {"epochs": 1}})
    assert len({cell.name for cell in paths}) == 2


def test_overrides_make_the_configuration_again() -> None:
    document = {
        "base": {"regime": {"phases": [{"optimizer": "SGD", "lr": 0.1}]}, "model.options": {"width": 8}},
        "grid": {"norm": ["group:groups=8,statistic=l1", "l1"], "model.norm_kinds": [["batch"], ["batch", "layer"]]},
    }
    for cell in cells_of(document):
        assert load_config(overrides=cell.overrides()) == cell.config
        assert all("\n" not in text for text in cell.overrides())
    assert "model.norm=group:groups=8,statistic=l1" in cells_of(document)[0].overrides()


def test_equal_configurations_are_one_cell() -> None:
    assert len(cells_of({"grid": {"norm": ["topk:k=10", "topk: k=10", "topk"]}})) == len(
        {filled(load_config(options={"model.norm": text})).model.norm for text in ("topk:k=10", "topk")}
    )
    assert len(cells_of({"grid": {"seed": [0, 1]}, "include": [{"seed": 1}]})) == 2


def test_options_of_the_model_do_not_leak_from_cell_to_cell() -> None:
    document = {
        "base": {"model.options": {"depth": 1}},
        "grid": {"model.options.width": [8, 16]},
        "include": [{"seed": 1}],
    }
    configs = [cell.config.model.options for cell in cells_of(document)]
    assert configs == [{"depth": 1, "width": 8}, {"depth": 1, "width": 16}, {"depth": 1}]


def test_excluded_runs_are_left_out_however_they_are_written() -> None:
    grid = {"norm": ["l2", "topk:k=10"], "seed": [0, 1, 2]}
    cells = cells_of({"grid": grid, "exclude": [{"norm": "topk:k=10", "seed": [1, 2]}]})
    assert [tuple(cell.settings.values()) for cell in cells] == [("l2", 0), ("l2", 1), ("l2", 2), ("topk:k=10", 0)]
    with pytest.raises(UserError, match="no run has"):
        cells_of({"grid": grid, "exclude": [{"norm": "linf"}]})
    with pytest.raises(UserError, match="everything is excluded"):
        cells_of({"grid": grid, "exclude": [{"seed": [0, 1, 2]}]})


def test_excluded_values_that_the_command_line_has_replaced_are_no_mistake() -> None:
    grid = parse_grid({"grid": {"norm": ["l2", "l1"], "seed": [0, 3]}, "exclude": [{"norm": "l1", "seed": 3}]})

    def count(**settings: list[Any]) -> int:
        return len(make_cells(override(grid, settings), complete=filled, checks=CHECKS, free=FREE))

    assert (count(), count(seed=[0]), count(seed=[3]), count(norm=["l2"])) == (3, 2, 1, 2)
    broken = parse_grid({"grid": {"norm": ["l2", "l1"]}, "exclude": [{"norm": "linf"}]})
    with pytest.raises(UserError, match="no run has"):
        make_cells(override(broken, {"seed": [0]}), complete=filled, checks=CHECKS, free=FREE)


def test_all_mistakes_of_all_cells_are_told_once() -> None:
    with pytest.raises(UserError) as caught:
        cells_of(
            {"base": {"epochs": 0}, "grid": {"norm": ["l2", "l3", "topkk"], "seed": [0, -1], "train.clipnorm": [1]}}
        )
    problems = caught.value.problems
    assert len(problems) == len(set(problems)) == 5
    for words in ("train.epochs", "l3", "topkk", "seed: value -1", "train.clipnorm: unknown key"):
        assert sum(words in problem for problem in problems) == 1, words


def test_the_length_of_training_comes_from_the_dataset() -> None:
    config = completion()(RunConfig())
    assert config.train.epochs == 20
    assert config.model.norm == "l2"


def test_labels() -> None:
    assert label({"model.norm": "l1"}) == "l1"
    assert label({"regime.lr": 0.1}) == "lr 0.1"
    assert label({"model.norm": "l1", "regime.lr": 0.1}) == "norm l1, lr 0.1"
    assert label({}) == "all runs"
