"""The GPU benchmark's parts that need no GPU: its masks and what rivals are told about them, checks, tables, plot."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
from magi_attention.mask import AttnMask, builders

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import attention_cases as cases  # noqa: E402
import bench_flex_attn as bench  # noqa: E402
import flex_attn_results as results  # noqa: E402
import gpu_rivals as rivals  # noqa: E402
import plot_flex_attn  # noqa: E402

SEQLEN = 1000  # neither blocks nor documents end at a multiple of anything


@pytest.fixture(autouse=True)
def small_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, windows and frames of a size that a short sequence has many of."""
    for name, size in {"BLOCK": 16, "WINDOW": 75, "CAUSAL_BLOCK": 50}.items():
        monkeypatch.setattr(cases, name, size)
    monkeypatch.setattr(rivals, "BLOCK", 16)


@pytest.mark.parametrize("name", cases.MASKS)
def test_intervals_are_the_mask(name: str) -> None:
    mask = cases.make_case(name, SEQLEN).mask
    spans = cases.intervals(mask)
    other = np.arange(SEQLEN)
    dense = (spans.start[:, None] <= other) & (other < spans.end[:, None])
    np.testing.assert_array_equal(dense if spans.of_rows else dense.T, mask.to_dense())


def test_prefix_tree_has_one_interval_a_key_only() -> None:
    assert not cases.intervals(cases.make_case("prefix tree", SEQLEN).mask).of_rows


def test_intervals_refuse_what_has_several_both_ways() -> None:
    cross = AttnMask.from_slices([[0, 4], [4, 6], [6, 9]], [[0, 9], [3, 5], [0, 9]], "full", 9, 9)
    several_keys = AttnMask.from_slices(
        [[0, 4], [4, 6], [4, 6], [6, 9]], [[0, 9], [0, 2], [7, 9], [0, 9]], "full", 9, 9
    )
    assert cases.intervals(cross).of_rows
    with pytest.raises(ValueError, match="several intervals"):
        cases.intervals(several_keys)


@pytest.mark.parametrize("name", cases.MASKS)
def test_block_lists_are_exact(name: str) -> None:
    mask = cases.make_case(name, SEQLEN).mask
    count = -(-SEQLEN // cases.BLOCK)
    padded = np.zeros((2, count * cases.BLOCK, count * cases.BLOCK), np.int64)
    padded[0, :SEQLEN, :SEQLEN], padded[1, :SEQLEN, :SEQLEN] = mask.to_dense(), 1
    unmasked, size = padded.reshape(2, count, cases.BLOCK, count, cases.BLOCK).sum(axis=(2, 4))
    np.testing.assert_array_equal(cases.cells_of_blocks(mask), unmasked)
    for cells, cells_of_whole in ((unmasked, size), (unmasked.T, size.T)):
        lists = cases.block_lists(cells, SEQLEN, SEQLEN)
        for counts, index, blocks in (
            (lists.partial_count, lists.partial_index, (cells > 0) & (cells < cells_of_whole)),
            (lists.full_count, lists.full_index, cells == cells_of_whole),
        ):
            for row in range(count):
                assert index[row, : counts[row]].tolist() == np.flatnonzero(blocks[row]).tolist()


@pytest.mark.parametrize("name", cases.MASKS)
def test_documents_are_the_mask(name: str) -> None:
    """What flash-attn-4 is told natively: documents, causal, and how many earlier tokens a window has."""
    case = cases.make_case(name, SEQLEN)
    assert (case.documents is None) == (name in ("block causal", "prefix tree", "published block causal"))
    if case.documents is not None:
        options = rivals._flash_attn_4_options(case.documents)
        left, right = options.get("window_size", (SEQLEN, 0 if case.documents.causal else SEQLEN))
        token = np.arange(SEQLEN)
        document = np.searchsorted(case.documents.cu_seqlens, token, side="right")
        behind = token[:, None] - token
        dense = (document[:, None] == document) & (behind <= left) & (-behind <= right)
        np.testing.assert_array_equal(dense, case.mask.to_dense())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", cases.MASKS)
def test_flex_attention_computes_what_we_do(name: str) -> None:
    case = cases.make_case(name, 256)
    q, k, v = (torch.randn(256, heads, 16) for heads in (4, 2, 2))
    q_ranges, k_ranges, types = case.mask.to_ranges()
    codes = torch.tensor([t.to_int_type() for t in types], dtype=torch.int32)
    ours, _ = flex_flash_attn_func(q, k, v, q_ranges.to_tensor(), k_ranges.to_tensor(), attn_type_map=codes)
    block_mask = rivals.flex_block_mask(case, "cpu")
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = flex_attention(*heads_first, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(out[0].transpose(0, 1), ours)
    assert (block_mask is None) == (name == "full")
    if block_mask is not None:  # torch's transpose of the lists is the one that flash-attn-4 is given
        transposed = cases.block_lists(cases.cells_of_blocks(case.mask).T, 256, 256)
        assert block_mask.q_num_blocks.flatten().tolist() == transposed.partial_count.tolist()
        assert block_mask.full_q_num_blocks.flatten().tolist() == transposed.full_count.tolist()


def test_useful_work() -> None:
    assert cases.make_case("full", 64).forward_flops(8, 32) == 4 * 64 * 64 * 8 * 32
    assert cases.make_case("causal", 64).forward_flops(8, 32) == 4 * (64 * 65 // 2) * 8 * 32
    tree = cases.make_case("prefix tree", SEQLEN).mask
    assert tree.area == tree.to_dense().sum()


@pytest.mark.parametrize("total", [8192, 32768, 131072])
def test_generated_lengths(total: int) -> None:
    lengths = cases.random_documents(total)
    assert len(lengths) == 14 and sum(lengths) == total and min(lengths) > 0
    nodes = cases.branching_texts(total)
    assert [parent for parent, _ in nodes] == [-1, *(p for b in (1, 5, 9, 13) for p in (0, b, b, b))]
    assert nodes[0][1] == total // 4 and sum(n for _, n in nodes) == total
    for name in ("pack magi", "pack pile"):
        documents = cases.make_case(name, total).documents
        assert documents is not None and documents.cu_seqlens[-1] == total and documents.max_seqlen <= total // 4


class WallClock(bench.EventTimer):
    """A timer without a GPU."""

    def __init__(self) -> None:
        pass

    def time(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        start = time.perf_counter()
        result, end = run(), time.perf_counter()
        return result, lambda: 1e3 * (end - start)


def dense_contender(case: cases.Case, device: str, heads_first: bool = False, shift: int = 0) -> rivals.Contender:
    """Plain attention on ``(tokens, heads, head_dim)``, with a mask moved by ``shift`` keys."""
    mask = torch.from_numpy(case.mask.to_dense()).roll(shift, 1).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not heads_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0]
        return out if heads_first else out.transpose(0, 1)

    return rivals.Contender(attend, heads_first)


def test_one_contender_that_fails_stops_no_other() -> None:
    def raises(case: cases.Case, device: str) -> rivals.Contender:
        raise RuntimeError("\nno such kernel\nand a long trace")

    def fails_later(case: cases.Case, device: str) -> rivals.Contender:
        good, calls = dense_contender(case, device), []

        def attend(*qkv: Tensor) -> Tensor:
            calls.append(None)
            if len(calls) > 3:
                raise MemoryError("full")
            return good.attend(*qkv)

        return rivals.Contender(attend)

    makers = {
        "first": raises,
        "tokens first": dense_contender,
        "heads first": lambda case, device: dense_contender(case, device, heads_first=True),
        "off by one": lambda case, device: dense_contender(case, device, shift=1),
        "cuDNN": rivals.cudnn,
        "later": fails_later,
    }
    case = cases.make_case("varlen causal", 256)
    inputs = bench.make_inputs(case, (4, 2), (16, 16), device="cpu")
    outcomes = bench.run_case(case, inputs, makers, bench.Budget(math.inf), WallClock())
    assert list(outcomes) == list(makers)
    assert outcomes["first"].failure == "RuntimeError: no such kernel"
    assert outcomes["off by one"].failure.startswith("ArithmeticError: wrong: error of out")
    assert outcomes["later"].failure == "MemoryError: full" and outcomes["later"].rounds == 0
    assert not outcomes["cuDNN"].supported and outcomes["first"].supported
    for name in ("tokens first", "heads first"):
        outcome = outcomes[name]
        assert outcome.rounds >= 7 and outcome.forward_ms > 0 and outcome.backward_ms > 0 and not outcome.failure
        assert outcome.error <= bench.TOLERANCE


def test_spent_budget_times_nobody() -> None:
    case = cases.make_case("causal", 64)
    inputs = bench.make_inputs(case, (2, 2), (8, 8), device="cpu")
    outcomes = bench.run_case(case, inputs, {"dense": dense_contender}, bench.Budget(0), WallClock())
    assert outcomes["dense"].failure == "TimeoutError: no time left"


def test_a_window_off_by_one_is_told_from_rounding() -> None:
    """The tolerance lies above what two contenders' bf16 costs, and below the smallest mistake in a mask."""
    torch.manual_seed(0)
    tokens, window = 2100, 1024
    inputs = [torch.randn(tokens, 1, 128, dtype=torch.bfloat16) for _ in range(4)]

    def attend(window: int, dtype: torch.dtype) -> list[Tensor]:
        mask = torch.from_numpy(builders.sliding_window(tokens, (window - 1, 0)).to_dense())
        q, k, v, dout = (x.to(dtype)[:, 0] for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        scores = (leaves[0] @ leaves[1].T) * 128**-0.5
        p = scores.float().masked_fill(~mask, -math.inf).softmax(dim=1).to(dtype)
        out = p @ leaves[2]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    exact = attend(window, torch.float32)
    rounding = bench.relative_errors([x.float() for x in attend(window, torch.bfloat16)], exact)
    mistake = bench.relative_errors(attend(window - 1, torch.float32), exact)
    assert 2**0.5 * max(rounding.values()) < bench.TOLERANCE < min(mistake.values()), (rounding, mistake)


@pytest.fixture
def report() -> results.Report:
    fast, slow = results.Outcome(1.0, 2.0, 7, 0.005, 3.0), results.Outcome(2.0, 8.0, 7, 0.004, 12.0)
    missing = results.Outcome(failure="NotSupported: full and causal only", supported=False)
    broken = results.Outcome(failure="RuntimeError: no")
    rows = [
        ("full", {"magi hopper": fast, "cuDNN": slow, "FlexAttention": slow}),
        ("prefix tree", {"magi hopper": slow, "cuDNN": missing, "FlexAttention": broken}),
        ("causal", {"magi hopper": slow, "cuDNN": fast, "FlexAttention": broken}),
    ]
    cases = [results.Result(mask, 8192, 48, 8, 128, 10**12, outcomes) for mask, outcomes in rows]
    return results.Report({"device": "none"}, ["magi hopper"], ["cuDNN", "FlexAttention"], cases)


def test_tables(report: results.Report, tmp_path: Path) -> None:
    report.save(tmp_path / "results.json")
    loaded = results.Report.load(tmp_path / "results.json")
    assert results.as_markdown(loaded) == results.as_markdown(report)
    _, _, full, tree, causal = results.table_lines(loaded)
    assert full == "| full | 8k | 48:8 | 128 | 1000 / 1250 | 500 / 312 | 500 / 312 | 500 / 312 | 2.00 / 4.00 |"
    assert tree == "| prefix tree | 8k | 48:8 | 128 | 500 / 312 |  | failed | - / - | - / - |"
    assert causal == "| causal | 8k | 48:8 | 128 | 500 / 312 | 1000 / 1250 | failed | 1000 / 1250 | 0.50 / 0.25 |"
    assert results.failure_lines(loaded) == ["FlexAttention, prefix tree 8k 48:8 128 and 1 more: RuntimeError: no"]


def test_short_table_keeps_the_end(report: results.Report) -> None:
    whole = results.short_table(report)
    assert whole.count("\n| ") == 4
    short = results.short_table(report, limit=len(whole) - 1)
    assert short.startswith("(1 rows left out)") and "| full" not in short and "| causal" in short
    assert len(short) < len(whole)


def test_plot(report: results.Report, tmp_path: Path) -> None:
    report.save(tmp_path / "results.json")
    command = [sys.executable, str(BENCHMARKS / "plot_flex_attn.py"), str(tmp_path / "results.json")]
    done = subprocess.run([*command, "--output", str(tmp_path / "plot.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| causal | 8k |" in done.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list(plot_flex_attn.by_shape(report.results)) == [("128", 48, 8, 8192)]


def test_options() -> None:
    table = bench.parse_arguments(["--preset", "table", "--seqlens", "8192", "--heads", "64:8", "16:16"])
    assert table.masks == tuple(cases.MASKS) and table.seqlens == [8192] and table.head_dims == [(128, 128)]
    assert table.heads == [(64, 8), (16, 16)]
    assert bench.parse_arguments(["--head-dims", "64", "192:128"]).head_dims == [(64, 64), (192, 128)]
    for wrong in (
        ["--heads", "48:7"],
        ["--head-dims", "192:"],
        ["--head-dims", "192:x"],
        ["--head-dims", "192:128:64"],
    ):
        with pytest.raises(SystemExit):
            bench.parse_arguments(wrong)


def test_useful_work_where_values_have_another_head_dim() -> None:
    case = cases.make_case("full", 64)
    forward = case.forward_flops(2, 192, 128)
    assert forward == 2 * 64 * 64 * 2 * (192 + 128)
    result = results.Result("full", 64, 2, 2, 192, forward, {}, head_dim_v=128)
    assert result.backward_flops == 2 * 64 * 64 * 2 * (3 * 192 + 2 * 128) and result.head_dims == "192:128"
    equal = replace(result, head_dim=128, head_dim_v=None)
    assert equal.backward_flops == 2.5 * forward and equal.head_dims == "128"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "bench_flex_attn.py")], capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA GPU" in done.stderr
