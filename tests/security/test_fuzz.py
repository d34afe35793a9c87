"""Mutated files of every kind, some of each (benchmarks/fuzz.py runs thousands), and texts that hypothesis makes up."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError
from norm_matters.core.yaml import read_yaml
from norm_matters.datasets.images import decode_image
from norm_matters.experiments.grid import read_setting
from norm_matters.norms import canonical_spec
from norm_matters.record.table import read_table
from norm_matters.record.tensors import unpack_tensors
from norm_matters.regimes import build_regime

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("norm_matters_fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("kind", "count"), [("checkpoints", 40), ("configs", 40), ("words", 100), ("data", 150)])
def test_mutated_files_are_read_or_refused(kind: str, count: int, fuzz: ModuleType) -> None:
    tally = fuzz.run_kind(kind, count, seed=7)
    assert tally.findings == []
    assert tally.trials == count
    assert tally.taken + tally.refused == count
    assert tally.refused > count / 3


def bad_trial(what: str):
    """A trial that does what none may do."""

    def trial(rng, work: Path) -> None:
        (work / "file").write_text("inside is fine")
        if what == "program":
            os.system("true")
        elif what == "process":
            subprocess.run(["true"])
        elif what == "file":
            (work.parent.parent / "outside").write_text("x")
        elif what == "folder":
            (work.parent / "beside").mkdir()
        elif what == "removal":
            (work / "file").rename(work.parent.parent / "moved")
        elif what == "pickle":
            import pickle

            pickle.loads(pickle.dumps(Path("x")))
        elif what == "exception":
            raise KeyError("x")
        elif what == "crash":
            os._exit(11)
        elif what == "hang":
            time.sleep(100)
        elif what == "long":
            raise UserError(*["x"] * 100)

    return trial


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("program", "os.system"),
        ("process", "subprocess.Popen"),
        ("file", "outside"),
        ("folder", "beside"),
        ("removal", "moved"),
        ("pickle", "pickle.find_class"),
        ("exception", "KeyError"),
        ("crash", "status 11"),
        ("hang", "TimeoutError"),
        ("long", "100 lines"),
    ],
)
def test_the_watch_sees(what: str, problem: str, fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "_warm_up", lambda: None)
    monkeypatch.setitem(fuzz.KINDS, "bad", lambda place: bad_trial(what))
    tally = fuzz.run_kind("bad", 2, seed=0)
    assert len(tally.findings) == 2
    assert problem in tally.findings[0].problem


@FEW
@given(st.text(max_size=60))
def test_any_text_is_a_spec_or_none(text: str) -> None:
    try:
        canonical = canonical_spec(text)
    except UserError:
        return
    assert canonical_spec(canonical) == canonical


@FEW
@given(
    st.lists(
        st.text(max_size=40)
        | st.builds("{}={}".format, st.sampled_from(["model.norm", "seed", "data"]), st.text(max_size=20)),
        max_size=3,
    )
)
def test_any_overrides_are_taken_or_refused(overrides: list[str]) -> None:
    with contextlib.suppress(UserError):
        load_config(overrides=overrides)


@FEW
@given(st.text(max_size=200))
def test_any_text_is_yaml_or_none(text: str) -> None:
    for read in (lambda: read_yaml(text, "text"), lambda: read_setting(text)):
        with contextlib.suppress(UserError):
            read()


@FEW
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_table_an_image_tensors_or_none(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    path.write_bytes(b"epoch,step\n" + data)
    for read, wrong in (
        (lambda: read_table(path), UserError),
        (lambda: decode_image(data, 3), UserError),
        (lambda: unpack_tensors(data), ValueError),
    ):
        with contextlib.suppress(wrong):
            read()


PHASES = st.lists(
    st.dictionaries(
        st.sampled_from(["epoch", "step", "lr", "optimizer", "momentum", "weight_decay", "x"]),
        st.none() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2),
        max_size=4,
    ),
    min_size=1,
    max_size=3,
)


@FEW
@given(PHASES)
def test_any_phases_are_a_regime_or_none(phases: list[dict]) -> None:
    with contextlib.suppress(UserError):
        build_regime(load_config(options={"regime.phases": phases}).regime, default="constant")
