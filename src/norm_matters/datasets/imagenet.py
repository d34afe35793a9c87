"""ImageNet (ILSVRC 2012) as its archives unpack, or as Kaggle packs it."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.fetch import data_folder, missing
from norm_matters.datasets.folder import read_parts, scan
from norm_matters.datasets.images import EncodedImages
from norm_matters.datasets.listing import list_images

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

EPOCHS = 90
# Where the images lie below the folder that is named: as people sort them, and as Kaggle's archive unpacks.
FOLDERS = (".", "imagenet", "ILSVRC/Data/CLS-LOC", "imagenet/ILSVRC/Data/CLS-LOC")
# Labels of a flat folder of validation images, and where they come from.
SOLUTION, GROUND_TRUTH, META = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
OWN_LABELS = ("val_labels.txt", "val_labels.csv")
# Lists of names: "n01440764 tench, Tinca tinca" in Kaggle's archive, with a tab between in ImageNet's own.
NAMES = ("LOC_synset_mapping.txt", "words.txt")
WNID = re.compile(r"n\d{8}")


def read_imagenet(data: "DataConfig", argument: str) -> Source:
    """Read train/WNID/* with val/WNID/*, or with val/* and a list of its labels.

    They are looked for in the folder that `data.dir` names, in `imagenet` below it, and where Kaggle's archive puts
    them. Labels of a flat val/ come from `LOC_val_solution.csv` (Kaggle), from the development kit's
    `ILSVRC2012_validation_ground_truth.txt` and `meta.mat`, or from `val_labels.txt` (a file's name and a WNID in each
    line). Classes have the names in `LOC_synset_mapping.txt` or `words.txt` where such a file is near, else their
    WNIDs; a name that several share is followed by its WNID. What was listed is kept, see `listing.list_images`.

    Raises:
        UserError: saying what is missing, and where it is to be had.
    """
    base = data_folder(data)
    root = next((base / name for name in FOLDERS if (base / name / "train").is_dir()), base / "imagenet")
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise missing(root / part, fetched=False)
    home = None if data.links else base
    if any(entry.is_dir() for entry in (root / "val").iterdir()):
        source = read_parts(root, "val", epochs=EPOCHS, keep=True, home=home)
    else:
        train, classes = scan(root / "train", keep=True, home=home)
        val = _flat(root, base, classes, home)
        source = Source(train=train, val=val, classes=classes, val_name="validation", epochs=EPOCHS)
    names = _class_names(root, base)
    return replace(source, classes=tuple(_unique(names, source.classes)))


def _flat(root: Path, base: Path, classes: tuple[str, ...], home: Path | None) -> EncodedImages:
    """The images in val/, with labels from a list."""
    files, sizes = list_images(root / "val", keep=True, home=home)
    if not files:
        raise UserError(f"{root / 'val'} has no images")
    place, wnids = _labels(root, base)
    labels = np.empty(len(files), dtype=np.int64)
    numbers = {name: number for number, name in enumerate(classes)}
    for index, file in enumerate(files):
        wnid = wnids.get(file.partition(".")[0])
        if wnid is None:
            raise UserError(f"{place} has no label for {root / 'val' / file}")
        if wnid not in numbers:
            raise UserError(f"{place}: {file} is of class '{wnid}', which {root / 'train'} has not")
        labels[index] = numbers[wnid]
    if len(files) < len(wnids):
        raise UserError(f"{root / 'val'} has {len(files):,} of the {len(wnids):,} images that {place} names")
    return EncodedImages(files, labels, root=root / "val", sizes=sizes)


def _labels(root: Path, base: Path) -> tuple[Path, Mapping[str, str]]:
    """A list of labels: its file, and WNIDs by the names of files without their ending."""
    if found := _near(root, base, SOLUTION):
        rows = [(row.get("ImageId") or "", row.get("PredictionString") or "") for row in csv.DictReader(_lines(found))]
        return found, _checked(found, [(name, boxes.partition(" ")[0]) for name, boxes in rows])
    if (truth := _near(root, base, GROUND_TRUTH)) and (meta := _near(root, base, META)):
        wnids = _development_kit(meta)
        pairs = []
        for number, line in enumerate(_lines(truth), 1):
            name = f"ILSVRC2012_val_{number:08}"
            if not line.strip().isdecimal() or int(line) not in wnids:
                raise UserError(f"{truth}, line {number}: '{line[:40]}' is no class of {meta}")
            pairs.append((name, wnids[int(line)]))
        return truth, dict(pairs)
    for name in OWN_LABELS:
        if found := _near(root, base, name):
            lines = [line.replace(",", " ").split() for line in _lines(found) if line.strip()]
            return found, _checked(found, [(line[0].partition(".")[0], line[-1]) for line in lines])
    raise UserError(
        f"{root / 'val'} has no class folders, and no list of its labels is near: {SOLUTION} of Kaggle's archive, or "
        f"{GROUND_TRUTH} with {META} of ILSVRC2012_devkit_t12.tar.gz from image-net.org, or {OWN_LABELS[0]}"
    )


def _checked(place: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    for number, (name, wnid) in enumerate(pairs, 1):
        if not name or not WNID.fullmatch(wnid):
            raise UserError(f"{place}, entry {number}: '{wnid[:40]}' is no WNID such as n01440764")
    return dict(pairs)


def _development_kit(meta: Path) -> dict[int, str]:
    """Number of a class in the list of labels -> its WNID."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    except Exception as error:  # scipy raises nearly anything on damaged input
        raise UserError(f"{meta} is damaged, or not of the development kit: {type(error).__name__}: {error}") from None


def _class_names(root: Path, base: Path) -> dict[str, str]:
    """WNID -> name of the class; empty where there is no list."""
    for name in NAMES:
        if found := _near(root, base, name):
            pairs = (re.split(r"[ \t]", line, maxsplit=1) for line in _lines(found))
            return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
    return {}


def _unique(names: Mapping[str, str], wnids: Sequence[str]) -> Iterator[str]:
    """The name of each class; two of ImageNet's are "crane", and those have their WNID behind it."""
    counts = Counter(names.get(wnid) for wnid in wnids)
    for wnid in wnids:
        name = names.get(wnid, wnid)
        yield f"{name} ({wnid})" if counts[name] > 1 else name


def _near(root: Path, base: Path, name: str) -> Path | None:
    """A file beside the images, in the folder that was named, or in the development kit there."""
    folders = [folder / part for folder in (root, base, base / "imagenet") for part in (".", "data")]
    kits = [folder / kit / "data" for folder in (root, base) for kit in ("ILSVRC2012_devkit_t12", "devkit")]
    return next((folder / name for folder in [*folders, *kits] if (folder / name).is_file()), None)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


IMAGENET = DatasetEntry(read_imagenet)
