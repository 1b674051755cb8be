"""Text character by character, block areas against the dense matrix, and the picture's pixels."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from magi_attention.mask import AttnMask, builders
from magi_attention.mask.drawing import block_areas
from magi_attention.testing.strategies import masks


def lines(text: str) -> str:
    return text.strip("\n")


def test_small_masks_are_drawn_cell_by_cell() -> None:
    mask = AttnMask.from_slices([(0, 3), (3, 7)], [(0, 3), (1, 7)], ["causal", "bi_causal"], 7, 8)
    assert mask.draw() == lines("""
q\\k 0      7
  0 █·······
  1 ██······
  2 ███·····
  3 ·███····
  4 ··███···
  5 ···███··
  6 ····███·
█ attended, · masked
""")


def test_large_masks_are_drawn_in_blocks() -> None:
    mask = builders.varlen([0, 400, 1000], causal=True)
    assert mask.draw(max_size=10) == lines("""
 q\\k 0      999
   0 ▒·········
 100 █▒········
 200 ██▒·······
 300 ███▒······
 400 ····▒·····
 500 ····█▒····
 600 ····██▒···
 700 ····███▒··
 800 ····████▒·
 900 ····█████▒
█ attended, ▒ partly, · masked; one character is 100 x 100 cells
""")


def test_the_last_block_may_be_smaller_and_sides_may_differ() -> None:
    assert builders.full(5, 14).draw(max_size=4) == lines("""
q\\k 0 13
  0 ████
  2 ████
  4 ████
█ attended, ▒ partly, · masked; one character is 2 x 4 cells
""")


def test_one_missing_cell_makes_a_block_partial() -> None:
    mask = AttnMask.from_slices([(0, 6), (6, 7)], [(0, 7), (0, 6)], "full", 7, 7)
    assert [row.split()[-1] for row in mask.draw(max_size=1).splitlines()[1:-1]] == ["▒"]
    assert [row.split()[-1] for row in mask.draw(max_size=2).splitlines()[1:-1]] == ["██", "█▒"]


def test_a_mask_of_nothing_can_be_drawn() -> None:
    assert builders.full(0).draw() == "q\\k 0\n█ attended, · masked"
    assert builders.full(2, 0).draw() == "q\\k 0\n  0 \n  1 \n█ attended, · masked"


def test_text_of_a_million_tokens_has_no_dense_matrix_behind_it() -> None:
    n = 1 << 20
    rows = builders.sliding_window(n, (n // 64 - 1, 0)).draw(max_size=64).splitlines()[1:-1]
    assert [row.split()[-1] for row in rows] == [
        "·" * max(0, r - 1) + "▒" * min(2, r + 1) + "·" * (63 - r) for r in range(64)
    ]


def test_max_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_size must be at least 1, not 0"):
        builders.causal(4).draw(max_size=0)


@given(masks(max_seqlen=24), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_block_areas_count_the_cells(mask: AttnMask, rows: int, cols: int) -> None:
    areas = block_areas(mask.bands, mask.total_seqlen_q, mask.total_seqlen_k, rows, cols)
    height, width = -(-mask.total_seqlen_q // rows), -(-mask.total_seqlen_k // cols)
    padded = np.zeros((height * rows, width * cols), np.int64)
    padded[: mask.total_seqlen_q, : mask.total_seqlen_k] = mask.to_dense()
    assert np.array_equal(areas, padded.reshape(rows, height, cols, width).sum(axis=(1, 3)))
    assert areas.sum() == mask.area


def test_plot_puts_queries_down_and_keys_right(tmp_path: Path) -> None:
    """Rows of the lower half attend keys of the left quarter: the only dark pixels lie there."""
    n = 1 << 20
    mask = AttnMask.from_slices([(n // 2, n)], [(0, n // 4)], "full", n, n)
    mask.plot(tmp_path / "mask.png", title="")
    image = imread(tmp_path / "mask.png")[..., :3]
    dark_blue = np.abs(image - np.array([0x17, 0x3A, 0x75]) / 255).max(axis=2) < 0.02
    rows, cols = np.nonzero(dark_blue[:, : int(image.shape[1] * 0.83)])  # without the colour bar
    height, width = rows.max() - rows.min() + 1, cols.max() - cols.min() + 1
    assert abs(height / width - 2) < 0.05
    assert len(rows) > 0.98 * height * width
    assert rows.min() > image.shape[0] / 2 and cols.max() < image.shape[1] / 2


def test_plot_numbers_the_queries_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    builders.causal(3000, 2000).plot("nowhere.png", title="a title")
    axes = figures[0].axes[0]
    assert axes.get_xlim() == (0, 2000) and axes.get_ylim() == (3000, 0)
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("a title", "key", "query")
    assert axes.images[0].get_array().shape == (250, 250)  # blocks of 12 x 8 cells


def test_plot_writes_the_format_that_the_path_names(tmp_path: Path) -> None:
    builders.causal(100, 7).plot(tmp_path / "mask.svg")
    assert "<svg" in (tmp_path / "mask.svg").read_text()
    builders.full(0).plot(str(tmp_path / "mask.png"))
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        builders.causal(4).plot(tmp_path / "mask.png")
