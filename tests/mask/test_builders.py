"""Each builder against what it promises about a single (query, key) cell."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.mask import AttnMask, builders

quick = settings(deadline=None, max_examples=60)

lengths = st.lists(st.integers(0, 9), max_size=5)
windows = st.tuples(st.integers(-1, 11), st.integers(-1, 11))


def dense(total_q: int, total_k: int, attends: Callable[[int, int], bool]) -> np.ndarray:
    rows = [[attends(i, j) for j in range(total_k)] for i in range(total_q)]
    return np.array(rows, np.bool_).reshape(total_q, total_k)


def borders(lens: list[int]) -> list[int]:
    return [sum(lens[:n]) for n in range(len(lens) + 1)]


def positions(lens: list[int]) -> list[tuple[int, int]]:
    """(document, position in it) of each token."""
    return [(doc, pos) for doc, length in enumerate(lens) for pos in range(length)]


def assert_cells(mask: AttnMask, wanted: np.ndarray) -> None:
    assert (mask.total_seqlen_q, mask.total_seqlen_k) == wanted.shape
    assert np.array_equal(mask.to_dense(), wanted)
    assert mask.area == wanted.sum()  # so no cell belongs to two bands


def in_window(distance: int, window: tuple[int, int]) -> bool:
    left, right = window
    return (left == -1 or distance >= -left) and (right == -1 or distance <= right)


@pytest.mark.parametrize("q, k", [(1, 1), (7, 7), (7, 13), (13, 7), (0, 5), (5, 0)])
def test_full_and_causal(q: int, k: int) -> None:
    assert_cells(builders.full(q, k), np.ones((q, k), np.bool_))
    assert_cells(builders.causal(q, k), dense(q, k, lambda i, j: k - 1 - j >= q - 1 - i))
    if q == k:
        assert builders.full(q) == builders.full(q, k) and builders.causal(q) == builders.causal(q, k)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=4), st.booleans(), windows)
@quick
def test_varlen_and_sliding_window(both: list[tuple[int, int]], causal: bool, window: tuple[int, int]) -> None:
    q_lens, k_lens = [q for q, _ in both], [k for _, k in both]
    q_at, k_at = positions(q_lens), positions(k_lens)

    def attends(i: int, j: int, window: tuple[int, int]) -> bool:
        (doc, q), (k_doc, k) = q_at[i], k_at[j]
        return doc == k_doc and in_window((k - k_lens[doc]) - (q - q_lens[doc]), window)

    cu_q, cu_k, size = borders(q_lens), borders(k_lens), (len(q_at), len(k_at))
    plain = (-1, 0) if causal else (-1, -1)
    assert_cells(builders.varlen(cu_q, cu_k, causal), dense(*size, lambda i, j: attends(i, j, plain)))
    assert_cells(builders.sliding_window(cu_q, window, cu_k), dense(*size, lambda i, j: attends(i, j, window)))
    assert builders.varlen(cu_q, causal=causal) == builders.varlen(cu_q, cu_q, causal)
    assert builders.sliding_window(cu_q, window) == builders.sliding_window(cu_q, window, cu_q)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), windows, st.integers(0, 5), st.booleans())
@quick
def test_global_sliding_window(
    both: list[tuple[int, int]], window: tuple[int, int], global_size: int, causal: bool
) -> None:
    q_lens, k_lens = [q for q, _ in both], [k for _, k in both]
    q_at, k_at = positions(q_lens), positions(k_lens)

    def attends(i: int, j: int) -> bool:
        (doc, q), (k_doc, k) = q_at[i], k_at[j]
        distance = (k - k_lens[doc]) - (q - q_lens[doc])
        return doc == k_doc and (k < global_size or in_window(distance, window)) and not (causal and distance > 0)

    mask = builders.global_sliding_window(borders(q_lens), window, global_size, causal, borders(k_lens))
    assert_cells(mask, dense(len(q_at), len(k_at), attends))


@given(lengths, st.data())
@quick
def test_prefix_lm(lens: list[int], data: st.DataObject) -> None:
    prefix = [data.draw(st.integers(0, n)) for n in lens]
    at = positions(lens)

    def attends(i: int, j: int) -> bool:
        (doc, q), (k_doc, k) = at[i], at[j]
        return doc == k_doc and (k < prefix[doc] or k <= q)

    assert_cells(builders.prefix_lm(borders(lens), prefix), dense(len(at), len(at), attends))
    same = data.draw(st.integers(0, min(lens, default=0)))
    assert builders.prefix_lm(borders(lens), same) == builders.prefix_lm(borders(lens), [same] * len(lens))


@given(lengths, st.integers(1, 6), st.integers(-1, 3), st.booleans())
@quick
def test_block_causal(lens: list[int], block_size: int, window: int, causal: bool) -> None:
    at = positions(lens)

    def attends(i: int, j: int) -> bool:
        (doc, q), (k_doc, k) = at[i], at[j]
        back = q // block_size - k // block_size
        return doc == k_doc and back >= 0 and (window == -1 or back <= window) and not (causal and k > q)

    assert_cells(builders.block_causal(borders(lens), block_size, window, causal), dense(len(at), len(at), attends))


@given(st.integers(0, 9), lengths)
@quick
def test_shared_prefix(prefix_len: int, answer_lens: list[int]) -> None:
    at = positions([prefix_len, *answer_lens])
    wanted = dense(len(at), len(at), lambda i, j: j <= i and at[j][0] in (0, at[i][0]))
    assert_cells(builders.shared_prefix(prefix_len, answer_lens), wanted)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[int, int]]:
    return [(draw(st.integers(-1, n - 1)), draw(st.integers(0, 5))) for n in range(draw(st.integers(0, 7)))]


@given(trees())
@quick
def test_prefix_tree(nodes: list[tuple[int, int]]) -> None:
    at = positions([length for _, length in nodes])

    def line(node: int) -> list[int]:
        return [] if node < 0 else [node, *line(nodes[node][0])]

    assert_cells(
        builders.prefix_tree(nodes), dense(len(at), len(at), lambda i, j: j <= i and at[j][0] in line(at[i][0]))
    )


def test_a_tree_in_depth_first_order_needs_one_band_a_node() -> None:
    nodes = [(-1, 5), (0, 4), (1, 3), (1, 2), (0, 6), (4, 1), (-1, 3)]
    assert len(builders.prefix_tree(nodes).bands) == len(nodes)


@given(lengths)
@quick
def test_cu_seqlens_from_lengths(lens: list[int]) -> None:
    found = builders.cu_seqlens_from_lengths(lens)
    assert found.dtype == np.int64 and found.tolist() == borders(lens)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_lengths_in_any_form(make: Callable) -> None:
    cu, some = make([0, 4, 4, 9]), make([2, 0, 1])
    assert builders.varlen(cu, cu, causal=True) == builders.varlen([0, 4, 4, 9], causal=True)
    assert builders.prefix_lm(cu, some) == builders.prefix_lm([0, 4, 4, 9], [2, 0, 1])
    assert builders.block_causal(cu, 3) == builders.block_causal([0, 4, 4, 9], 3)
    assert builders.shared_prefix(3, some) == builders.shared_prefix(3, [2, 0, 1])
    assert builders.cu_seqlens_from_lengths(some).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("form", [np.uint8, np.array, torch.tensor])
def test_a_length_of_any_form_is_one_document(form: Callable) -> None:
    assert builders.varlen(form(6)) == builders.varlen([0, 6])
    assert builders.prefix_lm(form(6), form(2)) == builders.prefix_lm([0, 6], [2])


def test_a_length_is_one_document() -> None:
    for length in (9, np.int32(9)):
        assert builders.varlen(length, causal=True) == builders.varlen([0, 9], causal=True)
        assert builders.sliding_window(length, (2, 1)) == builders.sliding_window([0, 9], (2, 1))
        assert builders.prefix_lm(length, 4) == builders.prefix_lm([0, 9], [4])
        assert builders.block_causal(length, 4) == builders.block_causal([0, 9], 4)


def test_limits_far_beyond_the_sequence_are_no_limit() -> None:
    assert builders.sliding_window(9, (1 << 50, 1 << 50)) == builders.full(9)
    assert builders.block_causal(9, np.int32(1 << 20)) == builders.full(9)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: builders.full(-1), ValueError, "seqlen_q must not be negative, got -1"),
        (lambda: builders.causal(4, 2.0), TypeError, r"seqlen_k must be an integer, got 2\.0"),
        (lambda: builders.varlen(True), TypeError, "cu_seqlens_q must be an integer, got True"),
        (lambda: builders.varlen([1, 4]), ValueError, r"cu_seqlens_q must begin at 0, got cu_seqlens_q\[0\] = 1"),
        (lambda: builders.varlen([0, 4, 3]), ValueError, r"cu_seqlens_q must not decrease.*\[1\] = 4.*\[2\] = 3"),
        (lambda: builders.varlen([0, 4], [0, 3, 2]), ValueError, "cu_seqlens_k must not decrease"),
        (lambda: builders.varlen([0, 4.5]), TypeError, "cu_seqlens_q must hold integers, got float64"),
        (lambda: builders.varlen(torch.tensor([0.0, 4.0])), TypeError, "cu_seqlens_q must hold integers"),
        (lambda: builders.varlen([]), ValueError, "cu_seqlens_q must have shape"),
        (lambda: builders.varlen([[0, 4]]), ValueError, r"cu_seqlens_q must have shape .* got shape \(1, 2\)"),
        (
            lambda: builders.varlen([0, 4, 8], [0, 4]),
            ValueError,
            "cu_seqlens_q has 2 documents but cu_seqlens_k has 1",
        ),
        (lambda: builders.varlen(8, causal=(2, 0)), TypeError, r"causal must be True or False, got \(2, 0\)"),
        (lambda: builders.global_sliding_window(8, (2, 0), 1, 2), TypeError, "causal must be True or False, got 2"),
        (lambda: builders.block_causal(8, 4, causal="yes"), TypeError, "causal must be True or False, got 'yes'"),
        (lambda: builders.sliding_window(8, (-2, 0)), ValueError, r"window_size\[0\] must be at least 0, or -1"),
        (lambda: builders.sliding_window(8, (2, 0.5)), TypeError, r"window_size\[1\] must be an integer"),
        (lambda: builders.sliding_window(8, 3), ValueError, r"window_size must be a pair \(left, right\), got 3"),
        (lambda: builders.sliding_window(8, (1, 2, 3)), ValueError, "window_size must be a pair"),
        (lambda: builders.sliding_window(8, {2, 0}), ValueError, "window_size must be a pair"),
        (lambda: builders.sliding_window(8, np.array(2)), ValueError, "window_size must be a pair"),
        (lambda: builders.sliding_window(8, torch.tensor([2.0, 0.0])), TypeError, r"window_size\[0\] must be an int"),
        (lambda: builders.global_sliding_window(8, (2, 0), -1), ValueError, "global_size must not be negative, got -1"),
        (lambda: builders.prefix_lm([0, 4, 8], [2]), ValueError, "prefix_lens has 1 entries but cu_seqlens has 2"),
        (lambda: builders.prefix_lm([0, 4, 8], [2, 5]), ValueError, r"prefix_lens\[1\] = 5 is longer .* 4 tokens"),
        (lambda: builders.prefix_lm([0, 4, 8], [2, -1]), ValueError, r"prefix_lens\[1\] must not be negative, got -1"),
        (lambda: builders.prefix_lm(8, -1), ValueError, "prefix_lens must not be negative"),
        (lambda: builders.block_causal(8, 0), ValueError, "block_size must be at least 1, not 0"),
        (lambda: builders.block_causal(8, -4), ValueError, "block_size must be at least 1, not -4"),
        (lambda: builders.block_causal(8, 4, window=-2), ValueError, "window must be at least 0, or -1"),
        (lambda: builders.shared_prefix(-1, [2]), ValueError, "prefix_len must not be negative"),
        (lambda: builders.shared_prefix(4, [2, -2]), ValueError, r"answer_lens\[1\] must not be negative, got -2"),
        (lambda: builders.shared_prefix(4, 2), ValueError, "answer_lens must be one row of lengths"),
        (lambda: builders.prefix_tree([(-1, 4), (1, 2)]), ValueError, r"nodes\[1\] has parent 1"),
        (lambda: builders.prefix_tree([(-2, 4)]), ValueError, r"nodes\[0\] has parent -2"),
        (lambda: builders.prefix_tree([(-1, -4)]), ValueError, r"nodes\[0\]\[1\] must not be negative"),
        (lambda: builders.prefix_tree([(-1, 4), 3]), TypeError, r"nodes\[1\] must be a pair \(parent, length\), got 3"),
        (lambda: builders.prefix_tree([(0, 1, 2)]), TypeError, r"nodes\[0\] must be a pair .* got \(0, 1, 2\)"),
        (lambda: builders.prefix_tree(4), TypeError, r"nodes must be pairs \(parent, length\), got 4"),
        (lambda: builders.cu_seqlens_from_lengths([3, -1]), ValueError, r"lengths\[1\] must not be negative, got -1"),
    ],
)
def test_a_mistake_is_named(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
