"""Integers in any form are checked by converting them, so that none counts on in its own way."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from magi_attention.mask import AttnMask, AttnMaskType, AttnRange, builders
from magi_attention.mask.integers import as_int, as_length, as_size

FORMS = [int, np.int8, np.uint8, np.uint32, np.uint64, np.array, torch.tensor]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("check", [as_int, as_length, as_size])
def test_an_integer_of_any_form_becomes_one_of_python(check: Callable[..., int], form: Callable) -> None:
    number = check(form(5), "x")
    assert number == 5 and type(number) is int


@pytest.mark.parametrize(
    "value",
    [
        1.5, 2.0, np.float32(2), torch.tensor(1.5), torch.tensor([1, 2]), np.array([1, 2]), "1", None, True,
        np.True_, np.array(True), torch.tensor(True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("check", [as_int, as_length, as_size])
def test_what_is_no_integer_is_refused_by_name(check: Callable[..., int], value: object) -> None:
    with pytest.raises(TypeError, match=r"^x must be an integer, got "):
        check(value, "x")


def test_bounds() -> None:
    assert (as_length(0, "x"), as_size(1, "x")) == (0, 1)
    with pytest.raises(ValueError, match="x must not be negative, got -1"):
        as_length(torch.tensor(-1), "x")
    with pytest.raises(ValueError, match="x must be at least 1, not 0"):
        as_size(np.uint8(0), "x")


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_integers_of_any_form(form: Callable) -> None:
    assert AttnRange(3, 250).offset(form(20)) == AttnRange(23, 270)
    assert AttnRange(3, 250).truncate(form(4), form(9)) == AttnRange(4, 9)
    assert AttnMaskType.from_int_type(form(1)) is AttnMaskType.CAUSAL
    assert builders.block_causal(9, form(4), form(1)) == builders.block_causal(9, 4, 1)
    assert builders.prefix_tree([(-1, form(4)), (form(0), form(2))]) == builders.prefix_tree([(-1, 4), (0, 2)])
    mask = AttnMask.from_slices([(0, 4)], [(0, 4)], form(1), form(4), form(4))
    assert mask == builders.causal(4) and mask.row_intervals(form(2)) == [(0, 3)] and mask.draw(form(4)) == mask.draw()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: AttnRange(0, 4).offset(0.5), "offset"),
        (lambda: AttnRange(0, 4).truncate(end=2.5), "end"),
        (lambda: AttnMaskType.from_int_type(1.5), "code"),
        (lambda: builders.causal(4).row_intervals(2.5), "row"),
        (lambda: builders.causal(4).draw(2.5), "max_size"),
    ],
)
def test_a_fraction_is_refused_by_name(call: Callable[[], object], name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, got "):
        call()


@pytest.mark.parametrize("value", [torch.tensor(1.5), torch.tensor([0, 1]), 1.0, True])
def test_no_code_of_a_mask_type(value: object) -> None:
    with pytest.raises(ValueError, match="unknown attn_mask_type"):
        AttnMaskType.parse(value)
