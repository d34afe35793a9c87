"""Ranks together do what one process does with the whole batch: steps, decisions, evaluation, optimizer state."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from norm_matters.core.distributed import ALONE

WORKER = Path(__file__).with_name("engine_worker.py")
sys.path.insert(0, str(WORKER.parent))
from engine_worker import evaluated, trained  # noqa: E402  (tests are no package)

SYNC = {"sync": True}
LONG = {"sync": True, "dtype": "float64", "steps": 50}
ADAM = {"optimizer": "AdamW", "lr": 1e-3}
SKIP = {"sync": True, "dtype": "float64", "steps": 6, "nonfinite": "skip", "poisoned": [1, 2]}

# Name -> case, which also says within what the ranks agree with one process.
CASES: dict[str, dict[str, Any]] = {
    **{f"one step, {norm}": {"norm": norm, **SYNC} for norm in ("l2", "l1", "linf", "topk:k=3")},
    **{f"uneven shares, {norm}": {"norm": norm, "images": 11, **SYNC} for norm in ("l2", "linf")},
    **{f"50 steps, {norm}": {"norm": norm, **LONG} for norm in ("l2", "l1", "linf", "topk:k=3")},
    "50 steps, ghost": {"norm": "ghost:size=4", "images": 16, **LONG},
    "no batch norm": {"norm": "layer", "dtype": "float64", "steps": 10, "images": 11},
    "accumulation": {"norm": "l1", "accumulate": 3, "images": 17, **LONG, "steps": 10},
    "clipping": {"norm": "l2", "clip": 0.1, **LONG, "steps": 10},
    "deferred": {"norm": "l2", "deferred": True, **LONG, "steps": 10},
    "saving memory": {"norm": "l2", "save_memory": True, **LONG, "steps": 5},
    "sharded SGD": {"norm": "l2", "shard": True, **LONG, "steps": 10},
    "sharded AdamW": {"norm": "l2", "shard": True, "settings": ADAM, **LONG, "steps": 10},
    "sharded, deferred, skipping": {"norm": "l2", "shard": True, "deferred": True, **SKIP},
    "skipping": {"norm": "l2", **SKIP},
    "skipping on the last rank": {"norm": "l2", "poisoned_image": 11, **SKIP},
    "skipping unsynchronised": {"norm": "layer", **SKIP, "sync": False, "poisoned_image": 11},
    "rolling back": {"norm": "l2", **SKIP, "nonfinite": "rollback", "poisoned_image": 11},
    "loss scale": {"norm": "l2", "precision": "amp-fp16", "steps": 3, **SYNC, "poisoned": [1], "nonfinite": "skip"},
    "masters": {"norm": "l2", "precision": "bf16", "steps": 3, **SYNC},
    "sharded masters": {"norm": "l2", "precision": "bf16", "steps": 3, "shard": True, **SYNC},
}
FOLDERS = {2: "two_ranks", 3: "three_ranks"}
WORLDS = [2, pytest.param(3, marks=pytest.mark.slow)]
SIZES = [(1007, 13), (1007, 256), (12, 13), (5, 2)]


def tolerance(case: dict[str, Any]) -> float:
    if case.get("dtype") == "float64":
        return 1e-9
    return 2e-2 if "precision" in case else 1e-5


def facts_of(folder: Path, world: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, run_ranks) -> Path:
    folder = tmp_path_factory.mktemp("two")
    work = {
        "train": list(CASES.values()),
        "evaluate": SIZES,
        "accumulate": [1, 3],
        "failure": True,
        "agreements": True,
    }
    (folder / "cases.json").write_text(json.dumps(work))
    for status, _, errors in run_ranks(2, [WORKER, folder]):
        assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory, run_ranks) -> Path:
    folder = tmp_path_factory.mktemp("three")
    work = {"train": [CASES["sharded AdamW"]], "evaluate": SIZES, "agreements": True}
    (folder / "cases.json").write_text(json.dumps(work))
    for status, _, errors in run_ranks(3, [WORKER, folder]):
        assert status == 0, errors
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(name, two_ranks):
    case = CASES[name]
    number = list(CASES).index(name)
    expected = trained({**case, "shard": False}, ALONE)
    found = [load_file(two_ranks / f"rank-{rank}.safetensors") for rank in (0, 1)]
    own = [
        {key.partition("/")[2]: value for key, value in part.items() if key.startswith(f"{number}/")} for part in found
    ]
    # The first rank gathers everything there is to save; weights and buffers every rank has, to the bit.
    assert own[0].keys() == expected.keys()
    for key, value in expected.items():
        limit = tolerance(case)
        torch.testing.assert_close(own[0][key], value, rtol=limit, atol=limit, msg=f"{key}: {own[0][key]} {value}")
        if key in own[1] and not key.startswith("optimizer/"):
            assert torch.equal(own[0][key], own[1][key]), key


def test_a_poisoned_step_was_skipped(two_ranks):
    """What the cases above compare is not that nothing was skipped anywhere."""
    found = load_file(two_ranks / "rank-0.safetensors")
    for name, case in CASES.items():
        assert found[f"{list(CASES).index(name)}/skipped"] == len(case.get("poisoned", [])), name


@pytest.mark.parametrize("world", WORLDS)
def test_evaluation_is_the_same_to_the_last_digit(world, request):
    expected = [evaluated(ALONE, *sizes) for sizes in SIZES]
    assert [scores[3] for scores in expected] == [count for count, _ in SIZES]
    for facts in facts_of(request.getfixturevalue(FOLDERS[world]), world):
        assert facts["evaluated"] == expected


def test_accumulation_exchanges_gradients_once_a_step(two_ranks):
    once, accumulated = facts_of(two_ranks, 2)[0]["exchanges"]
    assert once == accumulated == 1


def test_all_ranks_raise_the_same_error_which_names_rank_and_layer(two_ranks):
    messages = {facts["failure"]["raised"] for facts in facts_of(two_ranks, 2)}
    (message,) = messages
    assert message.startswith(
        "the training loss is not finite in epoch 1, step 3: on rank 1, the images are not finite"
    )


@pytest.mark.slow
def test_three_ranks_share_out_the_optimizer(three_ranks):
    found = load_file(three_ranks / "rank-0.safetensors")
    expected = trained({**CASES["sharded AdamW"], "shard": False}, ALONE)
    for key, value in expected.items():
        torch.testing.assert_close(found[f"0/{key}"], value, rtol=1e-9, atol=1e-9)
    entries = [
        {key for key in load_file(three_ranks / f"rank-{rank}.safetensors") if "/optimizer/" in key}
        for rank in range(3)
    ]
    assert entries[1] == entries[2] == set()  # gathered by the first alone


@pytest.mark.parametrize("world", WORLDS)
def test_what_ranks_tell_each_other(world, request):
    for rank, facts in enumerate(facts_of(request.getfixturevalue(FOLDERS[world]), world)):
        found = facts["agreements"]
        assert found["gathered"] == [[r, 0.1 * r, None] for r in range(world)]
        assert found["alone"] == {"from": 0}
        assert found["sums"] == [sum([0.1] * world), sum(1e-17 * (r + 1) for r in range(world))]
        assert found["largest"] == 0
        assert found["flags"] == [True, False]
        assert found["copied"] == [[[1] * 3] * 2, False, 1.5]
        assert found["sent"] == [0, 1, 2]
        assert found["parts"] == ([[r] * (r + 1) for r in range(world)] if rank == 0 else [])
        assert found["together"] == ["UserError", "ValueError: out of order", world - 1]
        assert found["alone_failed"] == 0
