import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from norm_matters.core.config import DataConfig, ModelConfig, RunConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import huggingface, load_dataset
from norm_matters.datasets.stored import StoredImages
from norm_matters.plan import prepare

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def png(number: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(start: int, count: int, side: int = 8):
    rows = [{"bytes": png(n, side), "path": f"{n}.png"} for n in range(start, start + count)]
    return pa.table({"img": rows, "label": [n % 3 for n in range(start, start + count)]})


def write_hub(home: Path, name: str = "some-org/pets", folder: str = "data", commit: str = COMMITS[0], start: int = 0):
    """A snapshot as huggingface_hub leaves it: links to blobs."""
    base = home / "hub" / f"datasets--{name.replace('/', '--')}"
    snapshot = base / "snapshots" / commit / folder
    snapshot.mkdir(parents=True)
    (base / "blobs").mkdir(exist_ok=True)
    for part, first, count in (("train", start, 9), ("test", start + 100, 6)):
        blob = base / "blobs" / f"{commit}{folder.replace('/', '-')}{part}"
        pq.write_table(table(first, count), blob)
        (snapshot / f"{part}-00000-of-00001.parquet").symlink_to(os.path.relpath(blob, snapshot))
    return base


def load(name: str, **options):
    return load_dataset(DataConfig(name=f"hf:{name}", **options))


def pixels(number: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(number))))


@pytest.mark.parametrize("name", ["some-org/pets", "pets"])
@pytest.mark.parametrize("folder", ["data", ".", "plain_text"])
def test_parquet_of_the_hub(home, name, folder):
    write_hub(home, name, folder)
    data = load(name)
    assert (len(data.train), len(data.val), data.val_name, data.classes) == (9, 6, "test", ("0", "1", "2"))
    assert np.array_equal(data.train.image(4), pixels(4))
    assert data.size == 8


def test_the_snapshot_that_main_names_or_else_the_newest(home):
    base = write_hub(home, commit=COMMITS[0])
    write_hub(home, commit=COMMITS[1], start=30)
    os.utime(base / "snapshots" / COMMITS[0], (1, 1))
    assert np.array_equal(load("some-org/pets").train.image(0), pixels(30))
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(COMMITS[0])
    assert np.array_equal(load("some-org/pets").train.image(0), pixels(0))
    (base / "refs" / "main").write_text("../../../etc")
    assert np.array_equal(load("some-org/pets").train.image(0), pixels(30))


def test_several_configurations(home):
    base = write_hub(home, folder="small") / "snapshots" / COMMITS[0]
    (base / "large").mkdir()
    pq.write_table(table(30, 9), base / "large" / "train.parquet")
    with pytest.raises(UserError, match=r"several configurations \(large, small\); name one: hf:some-org/pets:CONFIG"):
        load("some-org/pets")
    assert np.array_equal(load("some-org/pets:small").train.image(0), pixels(0))
    assert load("some-org/pets:large").val_name == "holdout 10% of train"


@pytest.mark.parametrize("name", ["../../x", "a/b/c", "..", "a/..", " ", "-/:x"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match=r"hf:"):
        load(name)


def test_what_is_not_there_is_said(home, monkeypatch):
    with pytest.raises(UserError, match=r"'hf:no/where': there is none .*datasets--no--where.*--download.*HF_HOME"):
        load("no/where")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "elsewhere"))
    with pytest.raises(UserError, match=r"elsewhere/datasets--no--where"):
        load("no/where")


def write_arrow(folder: Path, *, names: list[str] | None, side: int = 9) -> None:
    """Arrow files as `datasets.load_dataset` leaves them."""
    folder.mkdir(parents=True)
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names} if names else {}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    for part, start, count in (("train-00000-of-00002", 0, 7), ("train-00001-of-00002", 7, 5), ("validation", 50, 4)):
        rows = table(start, count, side)
        with (
            pa.OSFile(str(folder / f"pets-{part}.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, rows.schema) as writer,
        ):
            writer.write_table(rows, max_chunksize=3)


def test_arrow_files_of_the_datasets_library(home):
    folder = home / "datasets" / "some-org___pets" / "default" / "0.0.0" / "abc"
    write_arrow(folder, names=["ant", "bee", "cow"])
    data = load("some-org/pets")
    assert (len(data.train), len(data.val), data.val_name) == (12, 4, "validation")
    assert data.classes == ("ant", "bee", "cow")
    assert isinstance(data.train, StoredImages)
    for n in range(12):
        assert data.train.content(n) == png(n, 9)
        assert data.train.labels[n] == n % 3
    assert data.train.name(8) == f"{folder / 'pets-train-00001-of-00002.arrow'}, row 1"
    assert data.fingerprint == load("some-org/pets").fingerprint


@pytest.mark.parametrize(
    ("name", "folder"),
    [("MNIST", "mnist"), ("org/TinyPhotos", "org___tiny_photos"), ("Org/HTTPImages2D-1k", "Org___http_images2_d-1k")],
)
def test_names_of_folders_are_those_of_the_library(home, name, folder):
    write_arrow(home / "datasets" / folder / "default" / "0.0.0" / "abc", names=None)
    assert len(load(name).train) == 12


def test_several_configurations_of_arrow_files(home):
    for config in ("one", "two"):
        write_arrow(home / "datasets" / "pets" / config / "0.0.0" / "abc", names=None)
    with pytest.raises(UserError, match=r"several configurations \(one, two\)"):
        load("pets")
    assert load("pets:two").classes == ("0", "1", "2")


def test_damaged_arrow_files_are_named(home):
    folder = home / "datasets" / "pets" / "default" / "0.0.0" / "abc"
    write_arrow(folder, names=None)
    file = folder / "pets-validation.arrow"
    whole = file.read_bytes()
    for place in range(0, 1200, 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            data = load("pets")
            for n in range(len(data.val)):
                data.val.image(n)
        except UserError as error:
            told = error.problems
        else:
            told = ("all is well",)
        assert told
        assert not any("\n" in line for line in told)
    file.write_bytes(whole[:300])
    with pytest.raises(UserError, match=r"pets-validation\.arrow"):
        load("pets")


def test_download_asks_the_hub_once_and_says_what_fails(home, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["repo_type"]))
        if name == "no/where":
            raise OSError("no\nnetwork")
        write_hub(home, name)

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert len(load("some-org/pets", download=True).train) == 9
    assert asked == [("some-org/pets", "dataset")]
    with pytest.raises(UserError, match="--download: hf:no/where could not be fetched: OSError: no network"):
        load("no/where", download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        load("some-org/pets", download=True)
    assert huggingface._home("HF_HUB_CACHE", "hub") == home / "hub"


def test_a_run_is_planned_on_it(home, tmp_path, monkeypatch):
    """What follows the colon is a name, though it looks like a path; nor is it looked for in the data folder."""
    monkeypatch.chdir(tmp_path)
    write_hub(home, "some-org/pets", "plain_text")
    for name in ("hf:some-org/pets", "hf:some-org/pets:plain_text"):
        data = DataConfig(name=name, batch_size=3, dir=str(tmp_path / "elsewhere"))
        plan = prepare(RunConfig(model=ModelConfig(name="resnet8"), data=data, device="cpu"))
        assert (plan.config.data.name, len(plan.dataset.train)) == (name, 9)
