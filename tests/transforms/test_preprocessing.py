import json
import subprocess
import sys

import pytest

from norm_matters.core.errors import UserError
from norm_matters.transforms import TRANSFORMS, Preprocessing

PLAIN = Preprocessing(
    channels=3, input_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop="pad", pad=4, flip=True, resize=32
)


def test_json_reads_back_equal():
    assert Preprocessing.from_json(json.loads(json.dumps(PLAIN.to_json()))) == PLAIN


def test_json_with_other_keys_is_refused():
    value = PLAIN.to_json()
    with pytest.raises(UserError, match="extra"):
        Preprocessing.from_json({**value, "extra": 1})
    # Written before there were these.
    assert Preprocessing.from_json({key: value[key] for key in value if key not in ("cutout", "draft")}) == PLAIN
    del value["mean"]
    with pytest.raises(UserError, match="mean"):
        Preprocessing.from_json(value)


@pytest.mark.parametrize(
    "change",
    [{"mean": (0.5,)}, {"channels": 1}, {"crop": "random"}, {"resize": 16}, {"cutout": 33}, {"cutout": -1}],
    ids=lambda c: next(iter(c)),
)
def test_contradictions_are_refused(change):
    with pytest.raises(ValueError, match=r"channels|crop|resize|cutout"):
        Preprocessing.from_json({**PLAIN.to_json(), **change})


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_registered_transforms_exist(name):
    assert callable(TRANSFORMS.get(name))
    assert TRANSFORMS.summary(name)


def test_import_is_light():
    code = (
        "import sys, norm_matters.transforms, norm_matters.datasets as d; d.check_dataset('digits');"
        "heavy = {'torch', 'numpy', 'PIL', 'sklearn', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
