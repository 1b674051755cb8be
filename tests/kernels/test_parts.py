"""Which queries go on to a later part of the keys."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels import parts as parts_module
from magi_attention.kernels import reference
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import make_parts
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import relocate
from magi_attention.testing.strategies import masks


@settings(max_examples=200, deadline=None)
@given(masks(max_seqlen=40), st.lists(st.integers(0, 40), max_size=4))
def test_rows_that_attend_a_later_part(mask: AttnMask, cuts: list[int]) -> None:
    dense = mask.to_dense()
    num_rows, num_keys = dense.shape
    bounds = sorted({0, num_keys, *(c for c in cuts if c < num_keys)})
    whole = np.array([[0, num_rows]])
    spans = list(pairwise(bounds))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "SELDOM", 0)
        parts = make_parts([relocate(mask.bands, whole, np.array([span])) for span in spans], num_rows)
    for part, (start, end) in zip(parts, spans, strict=True):
        assert (part.goes_on == dense[:, end:].any(1)).all()
        assert (part.waits == (dense.any(1) & ~dense[:, :end].any(1))).all()
        assert part.is_last == (not dense[:, end:].any())
        attends, before = (dense[:, a:end].any(1) for a in (start, 0))
        assert part.keeps_sums == (part.goes_on & before).any()
        assert part.own is None or (part.own == (attends if start else ~part.goes_on)).all()
    attending = np.array([dense[:, a:b].any(1) for a, b in spans])
    apart = len(spans) > 1 and attending[0].any() and attending.sum(0).max() < 2
    assert {part.apart for part in parts} == {apart}


def test_parts_that_alternate_all_the_time_are_not_apart() -> None:
    """Since each part has windows of its own rows alone."""
    for each, apart in ((32, False), (1024, True)):
        documents = builders.varlen([0, *(each * n for n in range(1, 9))])
        whole, keys = np.array([[0, 8 * each]]), np.arange(8 * each).reshape(8, each)
        halves = [np.stack((keys[n::2, 0], keys[n::2, -1] + 1), axis=1) for n in range(2)]
        parts = make_parts([relocate(documents.bands, whole, half) for half in halves], 8 * each)
        assert [part.apart for part in parts] == [apart, apart]


def test_sums_are_kept_only_where_a_query_goes_on() -> None:
    q = torch.randn(8, 1, 4)
    bands = [builders.causal(8).bands, np.zeros((0, 6), np.int64)]
    only, nothing = (
        reference.schedule(part_bands, 8, 8, part) for part_bands, part in zip(bands, make_parts(bands, 8), strict=True)
    )
    state = reference.forward(q, q, q, only, AttnParams(1.0))
    assert state.sums is None
    before = [state.out.clone(), state.lse.clone()]
    after = reference.forward(q, q, q, nothing, AttnParams(1.0), state)
    assert after is state and torch.equal(state.out, before[0]) and torch.equal(state.lse, before[1])
