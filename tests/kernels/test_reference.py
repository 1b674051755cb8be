"""The reference engine against the dense oracle."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels import reference
from magi_attention.kernels.engine import ENGINES, choose_engine, explain
from magi_attention.kernels.merge import compute_delta, merge_states
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import relocate
from magi_attention.testing.error_bound import assert_close_to_oracle
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .attention import NAMES, Problem, run_dense, run_engine

ENGINE = ENGINES[-1]


def check_fp64(problem: Problem) -> None:
    for name, actual, expected in zip(NAMES, run_engine(ENGINE, problem), run_dense(problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks(name: str, softcap: float) -> None:
    check_fp64(Problem.random(named_masks(301)[name], softcap=softcap))


@settings(max_examples=150, deadline=None)
@given(masks(max_seqlen=70), st.sampled_from([(1, 1), (3, 3), (4, 1), (6, 2)]), st.sampled_from([0.0, 0.7]))
def test_generated_masks(mask: AttnMask, heads: tuple[int, int], softcap: float) -> None:
    check_fp64(Problem.random(mask, heads=heads, head_dim=4, softcap=softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "varlen full", "global sliding window causal", "several intervals a row"])
def test_low_precision_keeps_the_derived_bound(name: str, dtype: torch.dtype) -> None:
    problem = Problem.random(named_masks(411)[name], dtype=dtype, head_dim=32)
    ours, exact, plain = run_engine(ENGINE, problem), run_dense(problem), run_dense(problem, dtype)
    for actual, oracle, low in zip(ours, exact, plain, strict=True):
        assert_close_to_oracle(actual, oracle, low)


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_heads_in_chunks(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.random(builders.causal(60), heads=(6, 3))
    monkeypatch.setattr(reference, "MAX_SCORES", heads_at_once * 2 * 60 * 60)
    check_fp64(problem)


def test_autocast_changes_nothing() -> None:
    problem = Problem.random(named_masks(100)["prefix lm"], dtype=torch.float32)
    expected = run_engine(ENGINE, problem)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_engine(ENGINE, problem)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_scores_far_below_the_highest() -> None:
    """Probabilities that are subnormal or 0."""
    problem = Problem.random(builders.causal(64), head_dim=1)
    problem.q.fill_(1.0)
    problem.k.copy_(torch.linspace(0, -1000, 64)[:, None, None])
    check_fp64(problem)


@pytest.mark.parametrize("name", ["varlen causal", "holes", "prefix tree"])
def test_parts_of_the_keys_merge(name: str) -> None:
    """Two halves of the keys, computed apart, merged, and differentiated with the global lse and delta."""
    problem = Problem.random(named_masks(230)[name])
    rows, half = len(problem.q), len(problem.k) // 2
    whole_rows = torch.tensor([[0, rows]]).numpy()
    parts = []
    for run in ((0, half), (half, len(problem.k))):
        bands = relocate(problem.mask.bands, whole_rows, torch.tensor([run]).numpy())
        keys = slice(*run)
        schedule = ENGINE.schedule(bands, rows, run[1] - run[0])
        parts.append((problem.k[keys], problem.v[keys], schedule))
    out, lse = ENGINE.forward(problem.q, *parts[0], problem.params)
    merge_states(out, lse, *ENGINE.forward(problem.q, *parts[1], problem.params))
    delta = compute_delta(out, problem.dout, problem.dlse)
    grads = [ENGINE.backward(problem.dout, problem.q, k, v, lse, delta, s, problem.params) for k, v, s in parts]
    dq = grads[0][0] + grads[1][0]
    dk, dv = (torch.cat((grads[0][n], grads[1][n])) for n in (1, 2))
    for actual, expected in zip((out, lse, dq, dk, dv), run_dense(problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_merging_with_nothing_is_exact() -> None:
    out, lse = torch.randn(3, 1, 2), torch.tensor([[0.5, -torch.inf, 2.0]])
    out[1] = 0
    merged, merged_lse = out.clone(), lse.clone()
    merge_states(merged, merged_lse, torch.zeros(3, 1, 2), torch.full((1, 3), -torch.inf))
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = torch.zeros(3, 1, 2), torch.full((1, 3), -torch.inf)
    merge_states(merged, merged_lse, out, lse)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_rows_that_attend_nothing_ignore_their_gradient() -> None:
    mask = AttnMask.from_slices([(2, 4)], [(0, 3)], "full", 6, 5)
    problem = Problem.random(mask)
    problem.dout[0], problem.dlse[:, 5] = torch.nan, torch.inf
    out, lse, dq, dk, dv = run_engine(ENGINE, problem)
    assert (out[[0, 1, 4, 5]] == 0).all() and torch.isneginf(lse[:, [0, 1, 4, 5]]).all()
    assert all(torch.isfinite(grad).all() for grad in (dq, dk, dv))
    assert (dq[[0, 1, 4, 5]] == 0).all() and (dk[3:] == 0).all() and (dv[3:] == 0).all()


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_tiny_shapes(rows: int, keys: int) -> None:
    check_fp64(Problem.random(AttnMask.from_slices([(0, rows)], [(0, keys)], "full", rows, keys)))


@pytest.mark.parametrize("edge", [reference.BLOCK_Q, reference.BLOCK_K])
def test_lengths_around_tile_edges(edge: int) -> None:
    for length in (edge - 1, edge, edge + 1):
        check_fp64(Problem.random(builders.causal(length), heads=(2, 1), head_dim=4))


def test_large_scores_do_not_overflow() -> None:
    problem = Problem.random(builders.causal(64))
    problem.q *= 1e4
    assert all(torch.isfinite(x).all() for x in run_engine(ENGINE, problem))


MEMORY_PROGRAM = """
import resource, torch
from magi_attention.kernels import reference
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import builders
torch.set_num_threads(1)
q = torch.randn(32768, 1, 16)
schedule = reference.schedule(builders.sliding_window(32768, (255, 0)).bands, 32768, 32768)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, lse = reference.forward(q, q, q, schedule, AttnParams(0.25))
reference.backward(out, q, q, q, lse, torch.zeros_like(lse), schedule, AttnParams(0.25))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear() -> None:
    """32,768 tokens in a narrow window: one byte a cell of the whole matrix would be a GiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 * 1024, "KiB"


def test_engine_choice() -> None:
    assert choose_engine(torch.zeros(1, 1, 8)).name == "reference"
    assert "reference: chosen" in explain("cpu", torch.float32, 64)
    with pytest.raises((TypeError, ValueError), match=r"float8"):
        choose_engine(torch.zeros(1, 1, 8).to(torch.float8_e5m2))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(softmax_scale=0.0), ValueError),
        (dict(softmax_scale=float("nan")), ValueError),
        (dict(softmax_scale="1"), TypeError),
        (dict(softmax_scale=1.0, softcap=-1.0), ValueError),
    ],
)
def test_bad_parameters(options: dict[str, float], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"softmax_scale|softcap"):
        AttnParams(**options)
