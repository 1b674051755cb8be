"""Slices found in a dense matrix reproduce it, and few suffice where there is structure."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.mask import AttnMask, builders, from_dense
from magi_attention.mask.bands import IntArray, tighten
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks, raw_bands

quick = settings(deadline=None, max_examples=60)


@given(st.integers(0, 9), st.integers(0, 9), st.randoms(use_true_random=False), st.sampled_from([0.2, 0.5, 0.8]))
@quick
def test_any_matrix_is_reproduced(rows: int, cols: int, random: object, share: float) -> None:
    cells = [[random.random() < share for _ in range(cols)] for _ in range(rows)]  # type: ignore[attr-defined]
    dense = np.array(cells, np.bool_).reshape(rows, cols)
    mask = from_dense(dense)
    assert np.array_equal(mask.to_dense(), dense) and mask.area == dense.sum()


@given(masks(max_seqlen=32))
@quick
def test_masks_are_reproduced(mask: AttnMask) -> None:
    again = from_dense(mask.to_dense())
    assert np.array_equal(again.to_dense(), mask.to_dense()) and again.area == mask.area


@given(raw_bands(max_seqlen=16, max_bands=1))
@quick
def test_one_band_is_found_as_one_band(bands: IntArray) -> None:
    mask = AttnMask.from_bands(tighten(bands)[0], 16, 16)
    assert from_dense(mask.to_dense()) == mask


@pytest.mark.parametrize("name", ["full", "causal", "varlen full", "varlen causal", "sliding window", "block causal"])
def test_masks_of_models_need_no_more_bands_than_they_were_built_of(name: str) -> None:
    mask = named_masks(61)[name]
    assert len(from_dense(mask.to_dense()).bands) == len(mask.bands)


@pytest.mark.parametrize("make", [torch.from_numpy, np.ndarray.tolist, np.asfortranarray])
def test_any_boolean_matrix_will_do(make: object) -> None:
    mask = builders.causal(5, 7)
    assert from_dense(make(mask.to_dense())) == mask  # type: ignore[operator]


def test_too_many_slices_are_refused() -> None:
    stripes = np.zeros((6, 12), np.bool_)
    stripes[::2, ::4] = True  # 3 rows of 3 lone cells
    assert len(from_dense(stripes, max_slices=9).slices) == 9
    with pytest.raises(ValueError, match="the 6 x 12 matrix needs more than max_slices = 8 slices"):
        from_dense(stripes, max_slices=8)
    window = builders.sliding_window(20, (3, 3)).to_dense()  # one band, three slices
    assert len(from_dense(window, max_slices=3).slices) == 3
    with pytest.raises(ValueError, match="max_slices = 2"):
        from_dense(window, max_slices=2)


@pytest.mark.parametrize("max_slices", ["9", 9.0])
def test_a_limit_that_is_no_integer_is_refused(max_slices: object) -> None:
    with pytest.raises(TypeError, match="max_slices must be an integer"):
        from_dense(np.eye(3, dtype=np.bool_), max_slices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "matrix, error, message",
    [
        (np.ones((3, 3)), TypeError, "matrix must be boolean.* got float64"),
        ([[1, 0], [1, 1]], TypeError, "matrix must be boolean"),
        (torch.ones(2, 2), TypeError, "matrix must be boolean"),
        ([[True], [True, False]], ValueError, "matrix must be rectangular, but its rows differ in length"),
        (np.ones(3, np.bool_), ValueError, r"must have shape .* got shape \(3,\)"),
        (np.ones((1, 2, 2), np.bool_), ValueError, r"got shape \(1, 2, 2\)"),
    ],
)
def test_what_is_no_boolean_matrix_is_refused(matrix: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_dense(matrix)  # type: ignore[arg-type]
