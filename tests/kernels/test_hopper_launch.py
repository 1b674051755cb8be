"""The hopper engine up to the driver's launches: which kernels with which arguments, compiled how often.

Kernels are compiled for an H100, nothing runs.
"""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels import hopper
from magi_attention.kernels.hopper.batches import cut_batches
from magi_attention.kernels.hopper.launcher import Tiles, _kind
from magi_attention.kernels.hopper.records import WINDOW_ROW, WINDOW_ROWS, WINDOW_TILES
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import State, make_parts
from magi_attention.kernels.query_grads import QueryGrads
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.mask_zoo import named_masks

from .fake_cuda_driver import NUM_MULTIPROCESSORS, FakeCudaDriver, Launch, fake_h100

BF16 = torch.bfloat16
TRITON_TYPES = {BF16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


@pytest.fixture(scope="module")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCudaDriver]:
    with pytest.MonkeyPatch.context() as patch, fake_h100() as driver:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("kernels")))
        yield driver


@pytest.fixture
def driver(h100: FakeCudaDriver) -> Iterator[FakeCudaDriver]:
    """The driver, whose launches must each be of a kernel that was compiled for such arguments."""
    h100.launches.clear()
    yield h100
    for launch in h100.launches:
        check_fit(launch)


def check_fit(launch: Launch) -> None:
    """Whether all that the kernel was compiled for is true of the arguments, and Triton takes the descriptors."""
    arguments = list(launch.arguments.values())
    assert list(launch.source.signature.values()) == [
        "constexpr" if type_ == "constexpr" else type_of(x, type_)
        for x, type_ in zip(arguments, launch.source.signature.values(), strict=True)
    ]
    for path, value in launch.source.constants.items():
        assert at(arguments, path) == value
    for path, promises in launch.source.attrs.items():
        x = at(arguments, path)
        for promise in promises:
            number = x.data_ptr() if isinstance(x, torch.Tensor) else x
            assert promise == ["tt.divisibility", 16] and number % 16 == 0
    for x in arguments:
        if isinstance(x, Tiles):
            TensorDescriptor.__post_init__(x)


def at(arguments: Any, path: tuple[int, ...]) -> Any:
    for n in path:
        arguments = arguments[n]
    return arguments


def type_of(x: Any, as_compiled: Any) -> Any:
    """Triton's name of the type of an argument."""
    if isinstance(x, tuple):
        return type(x)(*map(type_of, x, as_compiled))
    if as_compiled == "constexpr":
        return "constexpr"
    if isinstance(x, torch.Tensor):
        return "*" + TRITON_TYPES[x.dtype]
    if isinstance(x, Tiles):
        return f"tensordesc<{TRITON_TYPES[x.base.dtype]}{x.block_shape},{x.layout!r}>"
    return "fp32" if isinstance(x, float) else "i32" if -(2**31) <= x < 2**31 else "i64"


def make_inputs(
    tokens: int, heads: tuple[int, int] = (4, 2), head_dim: int = 64, head_dim_v: int | None = None
) -> list[torch.Tensor]:
    sizes = (heads[0], head_dim), (heads[1], head_dim), (heads[1], head_dim_v or head_dim)
    return [torch.zeros(tokens, *size, dtype=BF16) for size in sizes]


def run(mask: AttnMask, inputs: list[torch.Tensor], params: AttnParams = AttnParams(1.0)) -> None:  # noqa: B008
    """Forward and backward, as one part of the keys and merged into the result over others."""
    q, k, v = inputs
    schedule = hopper.schedule(mask.bands, mask.total_seqlen_q, mask.total_seqlen_k)
    out, lse, *_ = hopper.forward(q, k, v, schedule, params)
    hopper.forward(q, k, v, schedule, params, State(out, lse, out.float()))
    grads = hopper.start_backward(out, out, lse, None, params, q.shape[2])
    hopper.backward(grads, q, k, v, schedule, params, BF16)
    hopper.finish_backward(grads, params, BF16)


def last(driver: FakeCudaDriver, kernel: str) -> Launch:
    return next(launch for launch in reversed(driver.launches) if launch.kernel == kernel)


def test_one_call(driver: FakeCudaDriver) -> None:
    q, k, v = (x.requires_grad_() for x in make_inputs(300))
    ranges = torch.tensor([[0, 300]], dtype=torch.int32)
    out, lse = flex_flash_attn_func(q, k, v, ranges, ranges, softmax_scale=0.5, engine="hopper")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    forward, start, backward, finish = driver.launches
    assert [x.kernel for x in driver.launches] == [
        "forward_kernel",
        "start_kernel",
        "backward_kernel",
        "finish_kernel",
    ]

    # Of 2 heads together 64 tokens are a window: 5 windows, each for 2 pairs of heads; of 128 keys, 3 for 2 heads.
    assert forward.grid == (10, 1, 1) and backward.grid == (6, 1, 1)
    assert start.grid == finish.grid == (4, -(-300 // 32), 1)
    arguments = forward.arguments
    assert [arguments[name].base is x for name, x in (("q_desc", q), ("k_desc", k), ("v_desc", v))] == [True] * 3
    assert arguments["out_desc"].base is arguments["out"].rows.ptr
    assert arguments["out"].rows.ptr.data_ptr() == out.data_ptr() and arguments["out"].lse.data_ptr() == lse.data_ptr()
    walk = arguments["walk"]
    assert (walk.num_windows, walk.heads, walk.num_items) == (5, 2, 10) and len(walk.windows) == 5
    assert arguments["scales"].product == 0.5
    assert (arguments["GROUP"], arguments["PACK"], arguments["HEAD_DIM_V"]) == (2, 2, 64)
    assert not (arguments["PART"] or arguments["SOFTCAP"] or arguments["LAYERED"])

    arguments = backward.arguments
    assert arguments["q_desc"].base.data_ptr() == q.data_ptr() and tuple(arguments["q_desc"].shape) == q.shape
    for name, grad in (("dk", dk), ("dv", dv)):
        assert arguments[f"{name}_desc"].base.data_ptr() == arguments[f"{name}_rows"].ptr.data_ptr() == grad.data_ptr()
    assert arguments["lse_desc"].base.data_ptr() == start.arguments["neg_lse"].data_ptr()
    assert arguments["delta_desc"].base.data_ptr() == start.arguments["neg_delta"].data_ptr()
    assert arguments["dq_desc"].base.data_ptr() == finish.arguments["sums"].data_ptr()
    assert finish.arguments["result"].data_ptr() == dq.data_ptr()


@pytest.mark.parametrize(
    ("head_dims", "block_k", "k_tile", "v_tile"),
    [
        ((64, 64), 128, (1, 64), (1, 64)),
        ((72, 72), 128, (1, 128), (1, 128)),
        ((136, 136), 64, (3, 64), (3, 64)),
        ((256, 256), 64, (1, 256), (1, 256)),
        ((192, 128), 128, (3, 64), (1, 128)),
        ((128, 192), 64, (1, 128), (3, 64)),
    ],
)
def test_tiles_of_head_dims(
    driver: FakeCudaDriver,
    head_dims: tuple[int, int],
    block_k: int,
    k_tile: tuple[int, int],
    v_tile: tuple[int, int],
) -> None:
    """How many lie side by side, and how wide they are."""
    q, k, v = make_inputs(300, (2, 1), *head_dims)
    hopper.forward(q, k, v, hopper.schedule(builders.full(300).bands, 300, 300), AttnParams(1.0))
    arguments = last(driver, "forward_kernel").arguments
    assert (arguments["K_PARTS"], arguments["V_PARTS"], arguments["HEAD_DIM_V"]) == (k_tile[0], v_tile[0], head_dims[1])
    assert arguments["q_desc"].block_shape == [64, 1, k_tile[1]]
    assert arguments["k_desc"].block_shape == [block_k, 1, k_tile[1]]
    assert arguments["v_desc"].block_shape == [block_k, 1, v_tile[1]]
    assert v_tile[1] % arguments["out_desc"].block_shape[2] == 0
    assert arguments["walk"].windows[:, WINDOW_TILES].tolist() == [-(-300 // block_k)] * 5


@pytest.mark.parametrize(
    ("head_dims", "dims", "block_k", "block_q", "columns"),
    [
        ((72, 72), (128, 128), 128, 64, (128, 128)),
        ((136, 136), (192, 192), 64, 64, (128, 128)),
        ((192, 128), (192, 128), 64, 64, (128, 64)),
    ],
)
def test_backward_tiles_of_head_dims(
    driver: FakeCudaDriver,
    head_dims: tuple[int, int],
    dims: tuple[int, int],
    block_k: int,
    block_q: int,
    columns: tuple[int, int],
) -> None:
    run(builders.full(300), make_inputs(300, (2, 1), *head_dims))
    arguments = last(driver, "wide_backward_kernel" if dims[0] > 128 else "backward_kernel").arguments
    assert (arguments["HEAD_DIM"], arguments["HEAD_DIM_V"]) == head_dims
    assert (arguments["DIM"], arguments["DIM_V"]) == dims
    assert arguments["q_desc"].block_shape == [block_q, 1, columns[0]]
    assert arguments["dout_desc"].block_shape == [block_q, 1, columns[1]]
    assert arguments["k_desc"].block_shape == [64, 1, columns[0]]
    for name in ("v_desc", "dk_desc", "dv_desc"):
        assert arguments[name].block_shape == [64, 1, columns[1]]
    assert arguments["lse_desc"].block_shape == arguments["delta_desc"].block_shape == [block_q]
    assert arguments["walk"].windows[:, WINDOW_TILES].tolist() == [-(-300 // block_q)] * -(-300 // block_k)


def test_items_of_few_query_heads_where_windows_are_uneven(driver: FakeCudaDriver) -> None:
    tokens = 128 * 16
    q, k, v = make_inputs(tokens, (48, 8))
    schedule, params = hopper.schedule(builders.causal(tokens).bands, tokens, tokens), AttnParams(1.0)
    grads = hopper.start_backward(q.detach(), q, torch.zeros(48, tokens), None, params, q.shape[2])
    dk, dv = hopper.backward(grads, q, k, v, schedule, params, BF16)
    backward, finish_dk, finish_dv = list(driver.launches)[1:]
    assert backward.arguments["MEMBERS"] == 3 and backward.arguments["ADDS_UP"]
    assert backward.arguments["walk"].num_items == 16 * 48 // 3
    for finish, name, grad in ((finish_dk, "dk", dk), (finish_dv, "dv", dv)):
        assert finish.arguments["sums"].data_ptr() == backward.arguments[f"{name}_desc"].base.data_ptr()
        assert not finish.arguments["sums"].any() and finish.arguments["sums"].dtype == torch.float32
        assert finish.arguments["result"] is grad and finish.arguments["scale"] == 1.0


def test_many_queries_of_few_keys_are_shared_out(driver: FakeCudaDriver) -> None:
    """One window of keys and 64 tiles of 128 queries, for each of 4 heads: pieces of 16 tiles."""
    k, v = make_inputs(100)[1:]
    run(builders.full(8192, 100), [make_inputs(8192)[0], k, v])
    backward = last(driver, "backward_kernel")
    assert (backward.grid, backward.arguments["MEMBERS"]) == ((16, 1, 1), 1) and backward.arguments["ADDS_UP"]
    assert backward.arguments["walk"].windows[:, [WINDOW_ROW, WINDOW_ROWS, WINDOW_TILES]].tolist() == [[0, 100, 16]] * 4


def test_a_sink_and_highest_scores(driver: FakeCudaDriver) -> None:
    q, k, v = make_inputs(300)
    sink = torch.arange(4.0).bfloat16().requires_grad_()
    ranges = torch.tensor([[0, 300]], dtype=torch.int32)
    out, lse, max_logits = flex_flash_attn_func(
        q, k, v, ranges, ranges, sink=sink, return_max_logits=True, engine="hopper"
    )
    results = last(driver, "forward_kernel").arguments["out"]
    assert results.sink.dtype == torch.float32 and torch.equal(results.sink, sink.detach().float())
    assert results.row_max.shape == lse.shape == (4, results.lse_stride) and max_logits.shape == (4,)
    (dsink,) = torch.autograd.grad(out, sink, torch.ones_like(out))
    assert dsink.dtype == sink.dtype and dsink.shape == sink.shape

    flex_flash_attn_func(q, k, v, ranges, ranges, engine="hopper")
    without = last(driver, "forward_kernel").arguments["out"]
    assert without.sink is without.row_max is None


def test_a_sink_counts_once(driver: FakeCudaDriver) -> None:
    q, k, v = make_inputs(75)
    bands = [builders.causal(75).bands] * 2
    parts = [hopper.schedule(bands[0], 75, 75, part) for part in make_parts(bands, 75)]
    state, sink, params = None, torch.zeros(4), AttnParams(1.0, return_max_logits=True)
    for schedule in parts:
        state = hopper.forward(q, k, v, schedule, params, state, sink)
    first, later = (launch.arguments["out"] for launch in driver.launches)
    assert first.sink is sink and later.sink is None
    assert first.row_max is later.row_max is state.row_max


@pytest.mark.parametrize(("deterministic", "sign"), [(False, -1), (True, 1)])
def test_gradient_of_a_sink_from_the_terms_of_either_backward_pass(deterministic: bool, sign: int) -> None:
    """Those of the triton engine, or, of the kernel here, their negatives."""
    lse, delta, sink = torch.randn(4, 75), torch.rand(4, 75), torch.linspace(-1, 2, 4)  # of one sign: nothing cancels
    dq = torch.zeros(75, 4, 64)
    grads = QueryGrads(dq, sign * lse / math.log(2), sign * delta, dq)
    dsink = hopper.sink_grad(grads, sink, AttnParams(1.0, deterministic=deterministic))
    torch.testing.assert_close(dsink, -(torch.exp(sink[:, None] - lse) * delta).sum(1), rtol=1e-5, atol=0)


def test_other_masks_and_lengths_compile_nothing(h100: FakeCudaDriver) -> None:
    """Numbers of windows, items and tokens that are 1, multiples of 16, and neither; compiled for the first."""
    for first in (1, 2048, 1000):
        with fake_h100() as driver:
            run(builders.causal(first), make_inputs(first))
            for mask, tokens in ((builders.causal(1500), 1500), (builders.full(500), 500)):  # two backward kernels
                run(mask, make_inputs(tokens))
            assert driver.num_compiled == 7
            for tokens in (1, 7, 16, 64, 65, 512, 1000, 2048):
                window = builders.sliding_window(tokens, (5, 0))
                for mask in (builders.causal(tokens), builders.full(tokens), window):
                    run(mask, make_inputs(tokens))
            assert driver.num_compiled == 7
            for each in driver.launches:
                check_fit(each)


def test_masks_of_several_intervals_have_their_own_kernels(driver: FakeCudaDriver) -> None:
    run(builders.causal(75), make_inputs(75))
    compiled = driver.num_compiled
    driver.launches.clear()
    run(named_masks(75)["several intervals a row"], make_inputs(75))
    layered = [launch for launch in driver.launches if launch.arguments.get("LAYERED")]
    assert layered and driver.num_compiled == compiled + len(layered)


def test_strides_that_are_no_multiples_of_16(driver: FakeCudaDriver) -> None:
    """Kernels are compiled for strides, and both kinds can take turns."""
    schedule, params = hopper.schedule(builders.causal(75).bands, 75, 75), AttnParams(1.0)
    for heads in (2, 1, 2):
        q, k, v = make_inputs(75, (heads, heads), 8)
        out, lse, *_ = hopper.forward(q, k, v, schedule, params)
        assert last(driver, "forward_kernel").arguments["out"].rows.token_stride == heads * 8
        hopper.start_backward(out, q, lse, None, params, q.shape[2])
        assert last(driver, "start_kernel").arguments["dout"].token_stride == heads * 8


def test_tensors_that_bulk_copies_cannot_read_are_copied(driver: FakeCudaDriver) -> None:
    mask = builders.causal(40)
    q, k, v = make_inputs(40)
    awkward = {
        "16 bytes between rows, one more at the start": torch.zeros(q.numel() + 1, dtype=BF16)[1:].view(q.shape),
        "rows at odd places": torch.zeros(40, 4, 65, dtype=BF16)[:, :, :64],
        "dimensions apart": torch.zeros(40, 64, 4, dtype=BF16).transpose(1, 2),
        "one row for all": torch.zeros(1, 4, 64, dtype=BF16).expand(40, 4, 64),
    }
    for x in awkward.values():
        run(mask, [x, k, v])
    fitting = torch.zeros(40, 6, 72, dtype=BF16)[:, 1:5, 8:]
    run(mask, [fitting, k, v])
    assert last(driver, "forward_kernel").arguments["q_desc"].base is fitting


def test_kernels_stay_on_the_multiprocessors_that_are_theirs(driver: FakeCudaDriver) -> None:
    run(builders.causal(4096), make_inputs(4096), AttnParams(1.0, sm_margin=32))
    for launch in driver.launches:
        if launch.kernel in ("forward_kernel", "backward_kernel"):
            assert launch.grid == (min(launch.arguments["walk"].num_items, NUM_MULTIPROCESSORS - 32), 1, 1)


def test_batches_where_other_kernels_wait(driver: FakeCudaDriver) -> None:
    """They are made once for a mask, and are taken by the kernel that is there."""
    tokens = 8192
    mask, (q, k, v) = builders.sliding_window(tokens, (1023, 0)), make_inputs(tokens, (16, 2))
    schedule = hopper.schedule(mask.bands, tokens, tokens)
    hopper.forward(q, k, v, schedule, AttnParams(1.0))
    alone, compiled = last(driver, "forward_kernel"), driver.num_compiled
    walk = alone.arguments["walk"]
    assert (alone.grid, walk.num_items, walk.num_batches) == ((NUM_MULTIPROCESSORS, 1, 1), 1024, 0)

    for _ in range(2):
        hopper.forward(q, k, v, schedule, AttnParams(1.0, yields=True))
    first, second = list(driver.launches)[-2:]
    walk = first.arguments["walk"]
    assert driver.num_compiled == compiled and second.arguments["walk"].batches is walk.batches
    assert first.grid == (walk.num_batches, 1, 1) and 2 * NUM_MULTIPROCESSORS <= first.grid[0] < 700
    assert (
        walk.batches.tolist()
        == cut_batches(walk.windows[:, WINDOW_TILES].numpy(), [8], 128, NUM_MULTIPROCESSORS).tolist()
    )


def test_batches_of_the_backward_kernel(driver: FakeCudaDriver) -> None:
    """Documents of 100 tokens: two or three tiles for each of 2 query heads, of 16 that a batch may have."""
    tokens = 100 * 500
    run(builders.varlen(range(0, tokens + 1, 100)), make_inputs(tokens, (4, 2), 128))
    backward = last(driver, "backward_kernel")
    walk = backward.arguments["walk"]
    assert backward.grid == (walk.num_batches, 1, 1) and (walk.heads, backward.arguments["MEMBERS"]) == (1, 2)
    assert walk.num_items == 1000 and 2 * NUM_MULTIPROCESSORS <= walk.num_batches < 700
    tiles = np.tile(walk.windows[:, WINDOW_TILES].numpy(), 2)  # one head after the other
    sizes = np.array([tiles[slice(*batch)].sum() for batch in walk.batches.tolist()])
    assert tiles.max() < sizes.max() <= 16


def test_what_no_kernel_takes() -> None:
    with pytest.raises(TypeError, match="no list"):
        _kind([1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_of_the_host_time(h100: FakeCudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    bench = importlib.import_module("bench_host_time")
    monkeypatch.setattr(bench, "CALLS", 2)
    with bench.gpu_or_none() as device:
        times = {name: bench.host_time(call, 1) for name, call in bench.make_calls(device, 16, (4, 2), 64).items()}
    assert len(times) == 6 and all(us > 0 for us in times.values())
