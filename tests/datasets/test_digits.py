"""The digits are read from scikit-learn's file; they must be what scikit-learn gives."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from norm_matters.core.config import DataConfig
from norm_matters.datasets import digits


@pytest.mark.parametrize("where", ["found", "another version's place"])
def test_they_are_those_of_scikit_learn(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where != "found":
        monkeypatch.setattr(digits, "find_spec", lambda name: None)
    pixels, labels = load_digits(return_X_y=True)
    table = digits._table()
    np.testing.assert_array_equal(table[:, :64], pixels)
    np.testing.assert_array_equal(table[:, 64], labels)


def test_ink_becomes_bytes() -> None:
    source = digits.read_digits(DataConfig(), "")
    assert (len(source.train), len(source.val)) == (1438, 359)
    values = np.unique(np.concatenate([np.asarray(source.val.image(i)).ravel() for i in range(359)]))
    assert values[0] == 0
    assert values[-1] == 255
    np.testing.assert_array_equal(values, np.rint(np.arange(17) * 255 / 16))
