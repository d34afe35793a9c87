"""Grids: what the texts and files mean, and what is wrong with them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from norm_matters.core.errors import UserError
from norm_matters.experiments.grid import Grid, override, parse_grid, read_grid, read_setting, read_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("l2,l1,linf,topk:k=10", ["l2", "l1", "linf", "topk:k=10"]),
        ("l2, l1", ["l2", "l1"]),
        ("group:groups=8,statistic=l1,l2", ["group:groups=8,statistic=l1", "l2"]),
        ("l2,ghost:size=32,base=(topk:k=3,center=mean),l1", ["l2", "ghost:size=32,base=(topk:k=3,center=mean)", "l1"]),
        ("[l2, 'group:groups=8,statistic=l1']", ["l2", "group:groups=8,statistic=l1"]),
        ("[[batch], [batch, layer]]", [["batch"], ["batch", "layer"]]),
        ("{width: 8},{width: 16, depth: 2}", [{"width": 8}, {"width": 16, "depth": 2}]),
        ("'a,b',c", ["a,b", "c"]),
        ("0..3", [0, 1, 2, 3]),
        ("-1..1,7", [-1, 0, 1, 7]),
        ("[0..1, 5]", [0, 1, 5]),
        ("0.1,1e-3,true,null,auto", [0.1, 1e-3, True, None, "auto"]),
        ("1,1,1.0,true", [1, 1.0, True]),
    ],
)
def test_values_of_a_text(text: str, values: list) -> None:
    found = read_values(text, "key")
    assert repr(found) == repr(values)


@pytest.mark.parametrize("text", ["", "l1,", ",l1", "a,,b", "[]", "[a", "3..1", "0..99999999"])
def test_wrong_texts(text: str) -> None:
    with pytest.raises(UserError):
        read_values(text, "norm")


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8, unique=True))
def test_numbers_read_back(numbers: list[int]) -> None:
    assert read_values(",".join(map(str, numbers)), "seed") == numbers


def test_common_options_are_names_of_keys() -> None:
    assert read_setting("norm=l1") == ("model.norm", ["l1"])
    assert read_setting("batch-size=8,16") == ("data.batch_size", [8, 16])
    assert read_setting("train.clip_norm=1") == ("train.clip_norm", [1])
    with pytest.raises(UserError, match="KEY=VALUE"):
        read_setting("=3")


DOCUMENT = {
    "base": {"model": {"name": "resnet8"}, "epochs": 3, "train.clip_norm": 1.0},
    "grid": {
        "norm": ["l2", "l1"],
        "seed": "0..2",
        "pace": [{"lr": 0.1, "epochs": 3}, {"regime": {"lr": 0.2}, "epochs": 5}],
    },
    "exclude": [{"norm": "l1", "seed": [1, 2]}],
    "include": [{"norm": "linf", "seed": "0..1"}],
}


def test_a_document_is_a_product_of_axes() -> None:
    grid = parse_grid(DOCUMENT)
    assert grid.base == {"model.name": "resnet8", "train.epochs": 3, "train.clip_norm": 1.0}
    found = list(grid.combinations())
    assert len(found) == 2 * 3 * 2 + 2
    assert {"model.norm": "l1", "seed": 2, "regime.lr": 0.2, "train.epochs": 5}.items() <= found[11].items()
    assert found[12:] == [{**grid.base, "model.norm": "linf", "seed": seed} for seed in (0, 1)]
    assert grid.exclude == [{"model.norm": ["l1"], "seed": [1, 2]}]


def test_the_document_of_a_grid_makes_it_again() -> None:
    grid = parse_grid(DOCUMENT)
    assert parse_grid(grid.document()) == grid


def test_a_grid_of_nothing_but_included_runs_has_these_only() -> None:
    assert len(list(parse_grid({"include": [{"seed": [1, 2]}]}).combinations())) == 2
    assert list(Grid({}, {}).combinations()) == [{}]


def test_options_of_the_model_are_values_not_settings_that_go_together() -> None:
    grid = parse_grid({"grid": {"model.options": [{"width": 8}, {"width": 16}]}})
    assert [each["model.options"]["width"] for each in grid.combinations()] == [8, 16]


def test_the_command_line_wins() -> None:
    grid = override(parse_grid(DOCUMENT), {"norm": ["topk"], "seed": [7, 8], "lr": [0.5]})
    found = list(grid.combinations())[:4]
    assert all(each["model.norm"] == "topk" and each["regime.lr"] == 0.5 for each in found)
    assert [(each["train.epochs"], each["seed"]) for each in found] == [(3, 7), (3, 8), (5, 7), (5, 8)]


def test_the_command_line_wins_in_included_runs_too() -> None:
    document = {"grid": {"norm": ["l2"], "seed": "0..2"}, "include": [{"norm": "linf", "epochs": 3, "seed": "0..1"}]}
    grid = parse_grid(document)

    def runs(**settings: list) -> list[tuple]:
        found = override(grid, settings).combinations()
        return [(each["model.norm"], each["seed"], each.get("train.epochs")) for each in found]

    assert runs(epochs=[1]) == [("l2", seed, 1) for seed in range(3)] + [("linf", seed, 1) for seed in range(2)]
    assert runs(seed=[7]) == [("l2", 7, None), ("linf", 7, 3)]
    assert runs(seed=[7, 8]) == [("l2", 7, None), ("l2", 8, None), ("linf", 7, 3), ("linf", 8, 3)]
    assert runs(norm=["l1"], seed=[7]) == [("l1", 7, None), ("l1", 7, 3)]


def test_a_grid_of_nothing_but_included_runs_stays_one_on_the_command_line() -> None:
    grid = parse_grid({"include": [{"norm": "l1"}, {"norm": "linf"}]})
    assert list(override(grid, {"seed": [0, 1]}).combinations()) == [
        {"model.norm": norm, "seed": seed} for norm in ("l1", "linf") for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"gird": {}}, "unknown part 'gird'; did you mean 'grid'?"),
        ({"model": {"norm": "l1"}}, "a configuration alone is for --config"),
        ({"grid": ["l1"]}, "grid holds"),
        ({"grid": {"norm": []}}, "norm has no values"),
        ({"exclude": {"norm": "l1"}}, "exclude holds"),
        ({"grid": {"name": ["a", "b"]}}, "a sweep names its runs itself"),
        ({"base": {"output": "x"}}, "a sweep names its runs itself"),
    ],
)
def test_wrong_documents(document: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_grid(document, "grid.yaml")
    assert words in str(caught.value)


def test_two_axes_do_not_set_the_same_key() -> None:
    grid = parse_grid({"grid": {"lr": [1, 2], "pace": [{"lr": 3, "seed": 1}, {"lr": 4, "seed": 2}]}})
    with pytest.raises(UserError, match="both set regime"):
        list(grid.combinations())


def test_too_large_grids_are_refused_before_they_are_made() -> None:
    grid = parse_grid({"grid": dict.fromkeys(("seed", "train.epochs", "data.batch_size"), "0..999")})
    with pytest.raises(UserError, match="1,000,000,000 runs"):
        next(grid.combinations())
    included = [{"seed": "0..9999"}, {"seed": "10000..19999"}]
    with pytest.raises(UserError, match="20,001 runs"):
        next(parse_grid({"grid": {"seed": [0]}, "include": included}).combinations())


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("grid:\n  norm: [l2, 'topk:k=10']\n  seed: 0..1\nhistory: [{command: [x]}]\n")
    assert len(list(read_grid(file).combinations())) == 4
    for text, words in (("- 1", "a grid is a mapping"), ("a: [", "line 1")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            read_grid(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_grid(tmp_path / "nowhere.yaml")
