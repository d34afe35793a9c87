"""Ranks with synchronised norms together do what one process does with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from norm_matters.core.errors import UserError
from norm_matters.norms import NORMS, create_norm, spec_of, sync_norm

WORKER = Path(__file__).with_name("sync_worker.py")
sys.path.insert(0, str(WORKER.parent))
from sync_worker import CALIBRATION, calibrated, step  # noqa: E402  (tests are no package)

CHANNELS = 6
EQUAL, UNEQUAL = (4, 4), (5, 3)
# Settings beside the defaults of every norm that has the option.
MORE = ["topk:k=3", "topk:k=40", "lp:p=3", "lp:p=1.5", "mean:scale=true", "linf:constant=paper", "l2:stats_dtype=input"]


def specs() -> list[str]:
    """Every registered norm that its name alone builds, and some settings more; not those of fixed statistics."""
    found = list(MORE)
    for name in NORMS.names():
        try:
            norm = create_norm(name, 8)
        except UserError:
            continue  # it needs an option, as timm:NAME does
        if not getattr(norm, "stats_frozen", False):
            found.append(name)
    return found


def synchronised(spec: str) -> str:
    """The spec with `sync=true` where it has the option."""
    if "sync" not in create_norm(spec, 8).OPTIONS:
        return spec
    return f"{spec}{',' if ':' in spec else ':'}sync=true"


def cases() -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (spec, dtype, sizes)
        for spec in specs()
        for dtype in ("float64", "float32")
        for sizes in (EQUAL, UNEQUAL)
        # The groups of a ghost norm stay on their rank: those of 4 + 4 images are those of 8.
        if not (spec.startswith("ghost") and sizes == UNEQUAL)
    ]


def sized(spec: str) -> str:
    """A ghost norm whose groups divide the batch; other specs as they are."""
    return spec.replace("ghost", "ghost:size=4", 1) if spec == "ghost" else spec


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The batch, and what the two ranks found for every case."""
    folder = tmp_path_factory.mktemp("sync")
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(8, 24, 5, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    # Ties on both ranks at the top of the first channels, and a constant channel.
    x[:, 0] = x[:, 0].sign()
    x[0::3, 1, 0, 0], x[:, 2] = 9.0, 1.0
    save_file({"x": x, "g": g}, folder / "batch.safetensors")
    listed = [(synchronised(sized(spec)), dtype, sizes) for spec, dtype, sizes in cases()]
    (folder / "cases.json").write_text(json.dumps(listed))
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(folder), str(rank), "2"], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return load_file(folder / "batch.safetensors"), [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(cases())), ids=lambda i: "-".join(map(str, cases()[i])).replace("/", "_"))
def test_two_ranks_equal_one_process(number, ranks):
    spec, dtype, _ = cases()[number]
    batch, found = ranks
    whole = step(sized(spec), *(batch[key].to(getattr(torch, dtype)) for key in ("x", "g")))
    tolerance = 1e-9 if dtype == "float64" else 1e-5
    for key, expected in whole.items():
        parts = [rank[f"{number}/{key}"] for rank in found]
        if key in ("y", "dx"):
            together = torch.cat(parts)
        elif key.endswith(".grad"):
            together = sum(parts)
        else:
            torch.testing.assert_close(parts[0], parts[1], rtol=0, atol=0)
            together = parts[0]
        torch.testing.assert_close(together, expected, rtol=tolerance, atol=tolerance, msg=f"{key} differs")


def test_ranks_calibrate_to_the_statistics_of_the_whole_batches(ranks):
    """Each batch weighs by its values on all ranks, not by this rank's part."""
    batch, found = ranks
    whole = calibrated("l2", list(batch["x"].split([size for size, _ in CALIBRATION])))
    for key, expected in whole.items():
        for rank in found:
            torch.testing.assert_close(rank[f"calibrated/{key}"], expected, rtol=1e-9, atol=1e-9)


def test_sync_norm_sets_the_option_and_names_what_it_leaves():
    model = torch.nn.Sequential(create_norm("l1", 4), create_norm("layer", 4))
    report = sync_norm(model)
    assert [spec_of(norm) for norm in model] == ["l1:sync=true", "layer"]
    assert (report.count, report.rows[0].after) == (1, "l1:sync=true")
    assert report.left[0].note == "takes no statistics over the batch"
    sync_norm(model, False)
    assert spec_of(model[0]) == "l1"
    with pytest.raises(ValueError, match=r"sync_norm: layer '1' \(layer\): takes no statistics over the batch"):
        sync_norm(model, include="1")


@pytest.fixture
def alone(tmp_path):
    """A group of ranks with one member."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "mean", "smooth", "renorm", "noisy:base=l1"])
def test_one_value_per_channel_over_all_ranks_is_named(spec, alone):
    norm = create_norm(synchronised(spec), 3)
    with pytest.raises(ValueError, match=r"needs more than one value per channel in training, got \(1, 3\)"):
        norm(torch.ones(1, 3))
    assert norm(torch.ones(2, 3)).shape == (2, 3)


def test_sync_changes_nothing_on_one_process():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(create_norm("l1:sync=true", 3)(x), create_norm("l1", 3)(x))
