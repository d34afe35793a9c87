"""What is packed or counted: any dataset by its name, or a folder or file."""

from dataclasses import dataclass
from pathlib import Path

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError, nearest
from norm_matters.datasets import DATASETS, check_dataset
from norm_matters.datasets.entry import check_labels, files_of
from norm_matters.datasets.images import Images


@dataclass(frozen=True)
class PackSource:
    """Images as they are stored.

    Attributes:
        name: of the dataset.
        parts: "train", and what it is evaluated on ("validation" or "test") where the set has that.
        classes: name of each, by label.
    """

    name: str
    parts: dict[str, Images]
    classes: tuple[str, ...]


def open_source(text: str, *, data_dir: str | None = None, download: bool = False) -> PackSource:
    """Find images.

    Args:
        text: the name of a dataset, or a folder: of images, of tar or parquet shards.
        data_dir: where datasets lie.
        download: fetch the dataset if it is missing.

    Raises:
        UserError: there is neither; or its files are damaged, or contradict each other.
    """
    with files_of(text):
        name = _dataset_name(text)
        check_dataset(name)
        kind, _, argument = name.partition(":")
        entry = DATASETS.get(kind)
        source = (entry.read_encoded or entry.read)(DataConfig(name=name, dir=data_dir, download=download), argument)
    parts = {"train": source.train}
    if source.val is not None:
        parts[source.val_name] = source.val
    check_labels(name, source.classes, *parts.values())
    return PackSource(name, parts, source.classes)


def _dataset_name(text: str) -> str:
    if text.partition(":")[0] in DATASETS:
        return text
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return f"parquet:{path.absolute()}"
    if path.is_file() and path.suffix == ".tar":
        return f"webdataset:{path.absolute()}"
    if not path.is_dir():
        raise UserError(f"'{text}' is neither a folder nor a dataset{nearest(text, DATASETS.names())}")
    for kind, pattern in (("webdataset", "*.tar"), ("parquet", "*.parquet"), ("parquet", "data/*.parquet")):
        if any(path.glob(pattern)):
            return f"{kind}:{path.absolute()}"
    return f"imagefolder:{path.absolute()}"
