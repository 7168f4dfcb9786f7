"""data/digits.npz: that it is what data/README.md says it is."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

DIGITS = Path(__file__).parent.parent / "data" / "digits.npz"


def test_digits_are_those_of_scikit_learn():
    """Image for image and label for label the source's, scaled from 0..16 to 0..255."""
    source = load_digits()
    with np.load(DIGITS) as shipped:
        assert sorted(shipped) == ["images", "labels"]
        images, labels = shipped["images"], shipped["labels"]
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8)
    assert labels.dtype == np.int64 and labels.shape == (1797,)
    np.testing.assert_array_equal(images, np.round(source.images * 255 / 16))
    np.testing.assert_array_equal(labels, source.target)
    assert images.min() == 0 and images.max() == 255


def test_digits_file_is_small():
    """The repository stays light: the shipped data set takes less than 100 kB."""
    assert DIGITS.stat().st_size < 100_000
