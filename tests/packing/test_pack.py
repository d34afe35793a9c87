import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import load_dataset, manifest, webdataset
from norm_matters.datasets.shards import pack_shards, unpack_shards
from norm_matters.datasets.stored import ByteRanges, StoredImages
from norm_matters.packing import PackSettings, check_packed, estimate_packing, open_source, pack_dataset, parse_bytes
from norm_matters.packing.source import PackSource

FORMATS = ["webdataset", "parquet"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_photos(root: Path, train: int = 30, val: int = 9) -> None:
    """Photographs of three classes, in several formats and sizes."""
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            kind, ending = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[number % 3]
            shape = (20 + number % 7, 30 - number % 5, 3)
            pixels = np.random.default_rng([number, len(part)]).integers(0, 256, shape, dtype=np.uint8)
            path = root / part / "abc"[number * 3 // count] / f"photo no.{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, kind)


@pytest.fixture
def photos(tmp_path) -> Path:
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


def pack(source: Path | PackSource, folder: Path, format: str = "webdataset", **options):
    options = {"shard_images": 7, **options}
    if not isinstance(source, PackSource):
        source = open_source(str(source))
    return pack_dataset(source, folder, PackSettings(format=format, **options), workers=0, command=["pack"])


def load(format: str, folder: Path):
    return load_dataset(DataConfig(name=f"{format}:{folder}"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_content(images) -> dict[bytes, int]:
    return {images.content(n): int(images.labels[n]) for n in range(len(images))}


@pytest.mark.parametrize("format", FORMATS)
def test_every_image_arrives_byte_for_byte(photos, tmp_path, format):
    packed = pack(photos, tmp_path / "out", format)
    assert (packed.images, packed.shards, packed.skipped) == ({"train": 30, "validation": 9}, 7, ())
    ending = "tar" if format == "webdataset" else "parquet"
    names = [f"train-{n:06}.{ending}" for n in range(5)] + [f"validation-{n:06}.{ending}" for n in range(2)]
    assert sorted(contents(tmp_path / "out")) == sorted([*names, "dataset.json", "index.safetensors"])
    data, original = load(format, tmp_path / "out"), load_dataset(DataConfig(name=f"imagefolder:{photos}"))
    assert data.classes == original.classes == ("a", "b", "c")
    assert data.val_name == "validation"
    for part in ("train", "val"):
        assert by_content(getattr(data, part)) == by_content(getattr(original, part))
    # Those to evaluate on keep their order, and the others are mixed.
    assert data.val.labels.tolist() == original.val.labels.tolist()
    assert data.train.labels.tolist() != original.train.labels.tolist()
    assert isinstance(data.train, StoredImages)
    assert isinstance(data.train.store, ByteRanges)
    # Keys say which image it was: its number, and its name up to the first dot.
    key = data.val.name(1).rpartition(", ")[2]
    assert key.startswith("00000001-photo_no.")
    assert Path(key).suffix == Path(original.val.name(1)).suffix


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_images_give_the_same_bytes(photos, tmp_path, format):
    pack(photos, tmp_path / "one", format)
    time.sleep(1.1)  # a time in a header would show
    source = open_source(str(photos))
    pack_dataset(source, tmp_path / "two", PackSettings(format=format, shard_images=7), workers=2, command=["pack"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    pack(photos, tmp_path / "other", format, seed=1)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_shards_by_bytes(photos, tmp_path):
    packed = pack(photos, tmp_path / "out", shard_bytes=9000, shard_images=None)
    assert packed.shards > 3
    for part in json.loads((tmp_path / "out" / "dataset.json").read_text())["parts"].values():
        for shard in part["shards"]:
            with tarfile.open(tmp_path / "out" / shard["name"]) as archive:
                images = [member.size for member in archive if not member.name.endswith(".cls")]
            assert len(images) == shard["images"]
            assert sum(images) <= 9000 or len(images) == 1
    # However small a shard is to be, an image fits.
    assert pack(photos, tmp_path / "single", shard_bytes=1).shards == 39


def test_resized_images(photos, tmp_path):
    for n, path in enumerate(sorted((photos / "val").rglob("*.*"))):
        # A smooth image, for noise is another one after JPEG.
        ramp = np.add.outer(np.linspace(0, 120, 20 + n), np.linspace(0, 120, 30))
        Image.fromarray(np.stack([ramp, ramp / 2, 250 - ramp], 2).astype(np.uint8)).save(path)
    pack(photos, tmp_path / "out", resize=22, quality=95)
    data = load("webdataset", tmp_path / "out")
    original = load_dataset(DataConfig(name=f"imagefolder:{photos}"))
    resized = 0
    for n in range(len(data.val)):
        image, before = data.val.image(n), original.val.image(n)
        resized += min(before.size) > 22
        if min(before.size) <= 22:
            assert data.val.content(n) == original.val.content(n)
            continue
        assert data.val.name(n).endswith(".jpg")
        assert min(image.size) == 22
        assert abs(image.width / image.height - before.width / before.height) < 0.05
        expected = before.resize(image.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 3
    assert 3 < resized < 9


@pytest.mark.parametrize("format", FORMATS)
def test_packed_sets_can_be_packed_again(photos, tmp_path, format):
    pack(photos, tmp_path / "one", format)
    pack(tmp_path / "one", tmp_path / "two", "parquet" if format == "webdataset" else "webdataset", shard_images=10)
    other = "parquet" if format == "webdataset" else "webdataset"
    assert by_content(load(format, tmp_path / "one").train) == by_content(load(other, tmp_path / "two").train)


def test_images_in_memory_are_packed_as_png(tmp_path):
    packed = pack(open_source("digits"), tmp_path / "out", shard_images=1000)
    assert packed.images == {"train": 1438, "test": 359}
    data, original = load("webdataset", tmp_path / "out"), load_dataset(DataConfig())
    assert data.val.labels.tolist() == original.val.labels.tolist()
    assert np.array_equal(np.asarray(data.val.image(5))[..., 0], np.asarray(original.val.image(5)))


def test_small_images_of_parquet_files_are_copied_not_decoded(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    pq.write_table(pa.table({"image": [{"bytes": buffer.getvalue()}] * 8, "label": [0, 1] * 4}), tmp_path / "a.parquet")
    pack(tmp_path / "a.parquet", tmp_path / "out")
    assert load("webdataset", tmp_path / "out").train.content(0) == buffer.getvalue()


def test_shards_without_their_index_are_read_by_their_headers(photos, tmp_path, monkeypatch):
    pack(photos, tmp_path / "out")
    scans, scan = [], webdataset.scan_tar
    monkeypatch.setattr(webdataset, "scan_tar", lambda file: (scans.append(file), scan(file))[1])
    with_index = load("webdataset", tmp_path / "out")
    assert not scans
    (tmp_path / "out" / "index.safetensors").unlink()
    without = load("webdataset", tmp_path / "out")
    assert len(scans) == 7
    for part in ("train", "val"):
        one, other = getattr(with_index, part), getattr(without, part)
        assert [one.name(n) for n in range(len(one))] == [other.name(n) for n in range(len(other))]
        assert by_content(one) == by_content(other)


@pytest.mark.parametrize("format", FORMATS)
def test_an_index_that_does_not_fit_is_not_used(photos, tmp_path, format):
    pack(photos, tmp_path / "out", format)
    pack(photos, tmp_path / "other", format, seed=1)
    expected = by_content(load(format, tmp_path / "out").train)
    index = tmp_path / "out" / "index.safetensors"
    own = index.read_bytes()
    facts = manifest.read_manifest(tmp_path / "out")
    assert facts is not None
    # That of another packing; and one with other labels, whole in itself.
    shutil.copy(tmp_path / "other" / "index.safetensors", index)
    assert by_content(load(format, tmp_path / "out").train) == expected
    table = unpack_shards(own, [shard.bytes for shard in facts.shards])
    index.write_bytes(pack_shards([shard._replace(labels=shard.labels[::-1]) for shard in table]))
    assert by_content(load(format, tmp_path / "out").train) == expected
    # Then the shards of another one.
    index.write_bytes(own)
    for shard in (tmp_path / "other").glob("train-*"):
        shutil.copy(shard, tmp_path / "out")
    assert by_content(load(format, tmp_path / "out").train) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_shards_that_change_places_are_noticed(tmp_path, format):
    """Files of the same size: only what stands before an image tells them apart."""
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.{'bmp' if number < 6 else 'ppm'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + number % 5, 5), (number, 0, 0)).save(path)
    pack(tmp_path / "photos", tmp_path / "out", format, shard_images=3)
    before = by_content(open_source(str(tmp_path / "out")).parts["train"])
    files = sorted((tmp_path / "out").glob("train-*"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    assert by_content(open_source(str(tmp_path / "out")).parts["train"]) == before


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_hostile_manifest_or_index_is_one_line_or_not_used(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    if not folder.exists():
        write_photos(folder / "photos", 9, 3)
        pack(folder / "photos", folder / "out", shard_images=4)
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(folder / "out", copy, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["dataset.json", "index.safetensors"]))
    content = bytearray((copy / name).read_bytes())
    if name == "dataset.json" and data.draw(st.booleans()):
        tree = json.loads(content)
        node, key = tree, data.draw(st.sampled_from(list(tree)))
        while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
            node = node[key]
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        node[key] = data.draw(
            st.sampled_from([None, -1, 2**63, 1.5, "", "../../etc/passwd", "x", [], {}, True, float("nan")])
        )
        content = bytearray(json.dumps(tree).encode())
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.sampled_from([len(content), len(content) // 2]))]
    (copy / name).write_bytes(content)
    for act in (lambda: load("webdataset", copy).train.image(0), lambda: check_packed(copy, workers=0)):
        try:
            act()
        except UserError as error:
            told = error.problems
        else:
            told = ("all is well",)
        assert told
        assert not any("\n" in line for line in told)


def test_changes_are_found(photos, tmp_path):
    pack(photos, tmp_path / "out")
    check_packed(tmp_path / "out", workers=2)
    shard = tmp_path / "out" / "train-000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    (tmp_path / "out" / "validation-000001.tar").unlink()
    with pytest.raises(UserError) as caught:
        check_packed(tmp_path / "out", workers=0)
    assert "bytes instead of" in caught.value.problems[0]
    assert "cannot be read" in caught.value.problems[1]
    assert len(caught.value.problems) == 2
    shard.write_bytes(whole[:900] + b"x" + whole[901:])
    with pytest.raises(UserError, match=r"train-000002\.tar has been changed"):
        check_packed(tmp_path / "out", workers=0)
    with pytest.raises(UserError, match=r"dataset\.json is missing: only what"):
        check_packed(photos, workers=0)


def broken_photos(root: Path) -> None:
    (root / "train" / "a" / "broken.jpg").write_text("no image")
    whole = (root / "train" / "b" / "photo no.12.jpg").read_bytes()
    (root / "train" / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "c" / "empty.png").write_bytes(b"")


def test_broken_images(photos, tmp_path):
    broken_photos(photos)
    with pytest.raises(UserError, match=r"(broken|cut|empty)\.\w+: .*--bad-images skip"):
        pack(photos, tmp_path / "out")
    # What is whole is no loss: the same folder goes on without the broken ones.
    packed = pack(photos, tmp_path / "out", bad_images="skip")
    assert packed.images["train"] == 30
    assert sorted(line.partition(": ")[0].rpartition("/")[2] for line in packed.skipped) == [
        "broken.jpg",
        "cut.jpg",
        "empty.png",
    ]
    pack(photos, tmp_path / "again", bad_images="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    (photos / "train" / "c" / "empty.png").unlink()
    assert pack(photos, tmp_path / "kept", bad_images="keep").images["train"] == 32


def test_broken_images_behind_a_full_shard_belong_to_it(photos, tmp_path):
    (photos / "val" / "c" / "zzz.jpg").write_text("no image")
    packed = pack(photos, tmp_path / "out", bad_images="skip", shard_images=3)
    assert packed.images["validation"] == 9
    assert len(list((tmp_path / "out").glob("validation-*"))) == 3


def test_a_part_of_broken_images_only_is_refused(photos, tmp_path):
    for path in (photos / "val").rglob("*.*"):
        path.write_text("no image")
    with pytest.raises(UserError, match="images of 'validation' are all broken"):
        pack(photos, tmp_path / "out", bad_images="skip")


@pytest.mark.parametrize("format", FORMATS)
def test_a_packing_that_is_cut_off_at_any_file_goes_on(photos, tmp_path, monkeypatch, format):
    """Every write of a file fails in turn, before it and after it."""
    from norm_matters.packing import pack as module

    pack(photos, tmp_path / "whole", format)
    expected = contents(tmp_path / "whole")
    for name in ("stream_file", "note_done", "write_file"):
        original = getattr(module, name)
        for number in range(3):
            folder = tmp_path / f"{name}{number}"
            calls = iter(range(100))

            def failing(*args, original=original, number=number, calls=calls):
                if next(calls) == number:
                    raise KeyboardInterrupt
                return original(*args)

            monkeypatch.setattr(module, name, failing)
            try:
                pack(photos, folder, format)
                assert name == "write_file"
            except KeyboardInterrupt:
                with pytest.raises(UserError, match="packing has not finished"):
                    manifest.read_manifest(folder)
            monkeypatch.setattr(module, name, original)
            before = {path: path.stat().st_ino for path in folder.glob("*-0*")}
            noted = (
                (folder / "packing.jsonl").read_text().splitlines()[1:] if (folder / "packing.jsonl").exists() else []
            )
            pack(photos, folder, format)
            assert contents(folder) == expected
            # What was whole has not been written anew.
            for line in noted:
                file = folder / json.loads(line)["name"]
                assert file.stat().st_ino == before[file]


def test_shards_that_were_damaged_meanwhile_are_written_anew(photos, tmp_path, monkeypatch):
    from norm_matters.packing import pack as module

    pack(photos, tmp_path / "whole")
    monkeypatch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = tmp_path / "out" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (tmp_path / "out" / "train-000003.tar").unlink()
    # A line that was cut off counts as none.
    journal = tmp_path / "out" / "packing.jsonl"
    journal.write_text(journal.read_text()[:-5])
    pack(photos, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_with_something_else_is_left_alone(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("text")
    with pytest.raises(UserError, match=r"out is not empty \(it has thesis\.txt\)"):
        pack(photos, tmp_path / "out")
    pack(photos, tmp_path / "packed")
    expected = contents(tmp_path / "packed")
    pack(photos, tmp_path / "packed")  # nothing to do
    with pytest.raises(UserError, match=r"holds another packing: its seed is 0, not 1"):
        pack(photos, tmp_path / "packed", seed=1)
    shutil.copy(photos / "val" / "a" / "photo no.0.jpg", photos / "train" / "a" / "new.jpg")
    with pytest.raises(UserError, match=r"holds another packing: its train images is 30, not 31"):
        pack(photos, tmp_path / "packed")
    assert contents(tmp_path / "packed") == expected


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b"[]\n", b'{"plan": 1, "command": 2}\n', b"\xff\xfe\n", b"[" * 99_999 + b"\n"]
)
def test_a_damaged_journal_is_one_line(photos, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "packing.jsonl").write_bytes(content)
    if content:
        with pytest.raises(UserError, match="out"):
            pack(photos, tmp_path / "out")
    else:
        assert pack(photos, tmp_path / "out").shards == 7


SCRIPT = """
import sys
from norm_matters.cli import main
sys.exit(main(["data", "pack", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_any_moment_and_continued_the_bytes_are_the_same(tmp_path, format):
    write_photos(tmp_path / "photos", 2400, 30)
    options = ["--images-per-shard", "40", "--format", format, "--workers", "2", "--resize", "18"]

    def start(folder: str) -> subprocess.Popen:
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "photos"), folder, *options]
        return subprocess.Popen(arguments, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    expected = contents(tmp_path / "whole")
    delays = np.random.default_rng(0).uniform(0.0, 0.6, 12)
    kills = 0
    while True:
        process = start("cut")
        while not list((tmp_path / "cut").glob("*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(float(delays[kills % 12]))
        if kills == 12 or process.poll() is not None:
            assert process.wait() == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 5
    found = contents(tmp_path / "cut")
    # The record has the command, whose folder differs.
    for each in (found, expected):
        each["dataset.json"] = each["dataset.json"].replace(b'"cut"', b'"whole"')
    assert found == expected
    assert not [name for name in found if name.startswith(".tmp-")]


# The library leaves the files that it has read open.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_work_with_the_webdataset_library(photos, tmp_path):
    wds = pytest.importorskip("webdataset")
    pack(photos, tmp_path / "ours")
    urls = [str(path) for path in sorted((tmp_path / "ours").glob("train-*.tar"))]
    theirs = {}
    for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False):
        (image,) = (value for key, value in sample.items() if key in ("jpg", "png", "webp"))
        theirs[image] = int(sample["cls"])
    assert theirs == by_content(load("webdataset", tmp_path / "ours").train)

    with wds.ShardWriter(str(tmp_path / "theirs-train-%06d.tar"), maxcount=8, verbose=0) as writer:
        for number, (image, label) in enumerate(sorted(theirs.items())):
            writer.write({"__key__": f"sample{number:04}", "jpg": image, "cls": label, "json": {"label": label}})
    data = load("webdataset", tmp_path / "theirs-train-*.tar")
    assert {**by_content(data.train), **by_content(data.val)} == theirs


def test_settings_are_checked():
    with pytest.raises(UserError) as caught:
        PackSettings(format="zip", resize=0, quality=0, shard_bytes=0, shard_images=0, bad_images="eat")  # pyright: ignore
    assert len(caught.value.problems) == 6
    with pytest.raises(UserError, match="keep"):
        PackSettings(resize=8, bad_images="keep")
    assert [parse_bytes(text) for text in ("1", "2B", "256MB", "1.5 GiB", "3kb")] == [
        1,
        2,
        256 * 10**6,
        3 * 2**29,
        3000,
    ]
    for text in ("", "MB", "-1", "1 XB", "1e3"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_bytes(text)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(UserError, match="'digit' is neither a folder nor a dataset; did you mean 'digits'"):
        open_source("digit")


def test_hashes_are_those_of_the_files(photos, tmp_path):
    pack(photos, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    for part in facts["parts"].values():
        for shard in part["shards"]:
            content = (tmp_path / "out" / shard["name"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert facts["command"] == ["pack"]


def in_order_of(images) -> list[tuple[bytes, int]]:
    return [(images.content(n), int(images.labels[n])) for n in range(len(images))]


def test_shards_of_one_name_in_two_folders_have_an_index_each(photos, tmp_path):
    """Each folder's own, or none; never the other's."""
    write_photos(tmp_path / "more", train=24)
    expected = []
    for name, source in (("pa", photos), ("pb", tmp_path / "more")):
        pack(source, tmp_path / name, shard_images=1000)
        expected += in_order_of(load("webdataset", tmp_path / name).train)
    for index in ("pb", "pa", None):
        data = load("webdataset", tmp_path / "{pa,pb}" / "train-*.tar")
        assert in_order_of(data.train) == expected
        assert (len(data.train), len(data.val), data.classes) == (54, 9, ("a", "b", "c"))
        if index:
            (tmp_path / index / "index.safetensors").unlink()


@pytest.mark.parametrize(
    ("classes", "words"), [(("a", "c", "b"), "label 1 is 'b' and 'c'"), (("a",), "label 1 is 'b' and None")]
)
def test_folders_of_other_classes_are_no_one_set(photos, tmp_path, classes, words):
    for name in ("pa", "pb"):
        pack(photos, tmp_path / name)
    (tmp_path / "pb" / "dataset.json").unlink()
    (tmp_path / "pb" / "classes.txt").write_text("\n".join(classes))
    with pytest.raises(UserError, match=rf"the classes of .*pa and .*pb differ: {words}") as caught:
        load("webdataset", tmp_path / "{pa,pb}" / "train-*.tar")
    assert len(caught.value.problems) == 1
    # Where a folder has no names, they are those of the other.
    (tmp_path / "pb" / "classes.txt").unlink()
    for pattern in ("{pa,pb}", "{pb,pa}"):
        assert load("webdataset", tmp_path / pattern / "train-*.tar").classes == ("a", "b", "c")


@pytest.mark.parametrize("cut", [False, True])
def test_what_was_packed_unseen_is_not_called_checked(photos, tmp_path, cut):
    (photos / "train" / "a" / "broken.jpg").write_text("no image")
    pack(photos, tmp_path / "out", bad_images="keep")
    if cut:
        (tmp_path / "out" / "dataset.json").rename(tmp_path / "facts.json")
        plan = json.loads((tmp_path / "facts.json").read_text())["plan"]
        (tmp_path / "out" / "packing.jsonl").write_text(json.dumps({"plan": plan, "command": ["pack"]}) + "\n")
    for bad_images in ("refuse", "skip"):
        with pytest.raises(UserError, match="out holds another packing: its decoded is False, not True"):
            pack(photos, tmp_path / "out", bad_images=bad_images)
    assert pack(photos, tmp_path / "out", bad_images="keep").images["train"] == 31


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "limits", [{"shard_images": None}, {"shard_images": 7}, {"shard_images": 13}, {"shard_bytes": 9000}]
)
def test_what_is_foretold_comes_true(photos, tmp_path, format, limits):
    source = open_source(str(photos))
    options = PackSettings(**{"format": format, "shard_images": None, **limits})
    shards, size = estimate_packing(source, options)
    packed = pack(source, tmp_path / "out", format, **{"shard_images": None, **limits})
    assert abs(packed.shards - shards) <= ("shard_bytes" in limits)
    # A tar ends with two empty records; parquet has tables of its own, which weigh more than images as small as these.
    assert packed.bytes == size + 1024 * packed.shards if format == "webdataset" else packed.bytes > size
