"""From tensors and a schedule to the arguments of the kernels."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from magi_attention.kernels.hopper.backward_kernel import backward_kernel
from magi_attention.kernels.hopper.batches import FORWARD_BATCH
from magi_attention.kernels.hopper.device_walk import make_key_walk, make_query_walk
from magi_attention.kernels.hopper.forward_kernel import FIRST_PART, LATER_PART, WHOLE, Out, forward_kernel
from magi_attention.kernels.hopper.launcher import Launcher, Tiles, rows, tiles
from magi_attention.kernels.hopper.pipeline import WalkArgs
from magi_attention.kernels.hopper.row_kernels import launch_finish
from magi_attention.kernels.hopper.wide_backward_kernel import wide_backward_kernel
from magi_attention.kernels.hopper.work import backward_work, batch_args, heads_at_a_time, turn_args
from magi_attention.kernels.lazy_schedule import LazySchedule
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import State
from magi_attention.kernels.query_grads import QueryGrads
from magi_attention.kernels.scales import Scales

CONSUMER_ROWS = 64  # of scores

# Registers on entry, before the roles take their own share.
_forward = Launcher(forward_kernel, num_warps=4, maxnreg=168)
_backward = Launcher(backward_kernel, num_warps=4, maxnreg=168)
_wide_backward = Launcher(wide_backward_kernel, num_warps=4, maxnreg=168)


class ForwardShape(NamedTuple):
    """How the forward kernel divides its work and the 227 KiB of shared memory.

    Attributes:
        columns: Dimensions of a tile in shared memory, a power of two; copies fill those behind a head's with zeros.
        block_k: Keys of a tile.
        stages: How many tiles of k, and of v, there is room for.
        q_stages: The same of queries of an item.
        out_columns: Columns of results that are stored at a time.
    """

    columns: int
    block_k: int
    stages: int
    q_stages: int
    out_columns: int


# By the dimensions that are multiplied. Of 256, a consumer's sums take 128 registers a thread: of scores 64 x 64 fit
# beside them.
FORWARD_SHAPES = {
    64: ForwardShape(columns=64, block_k=128, stages=4, q_stages=2, out_columns=64),
    128: ForwardShape(columns=128, block_k=128, stages=2, q_stages=2, out_columns=128),
    192: ForwardShape(columns=256, block_k=64, stages=2, q_stages=1, out_columns=128),
    256: ForwardShape(columns=256, block_k=64, stages=2, q_stages=1, out_columns=128),
}


class BackwardShape(NamedTuple):
    """How a backward kernel divides its work.

    Attributes:
        block_k: Keys of an item.
        block_q: Queries of a tile.
        columns: Dimensions of a tile in shared memory; there are two side by side for more than 128.
    """

    block_k: int
    block_q: int
    columns: int


# By the dimensions that are multiplied. Of 256, sums of 64 keys, dk and dv, fill the registers of two consumers.
BACKWARD_SHAPES = {
    64: BackwardShape(block_k=128, block_q=128, columns=64),
    128: BackwardShape(block_k=128, block_q=64, columns=128),
    192: BackwardShape(block_k=64, block_q=64, columns=128),
    256: BackwardShape(block_k=64, block_q=64, columns=128),
}


class Sizes(NamedTuple):
    """The sizes of a problem.

    Attributes:
        heads_kv: Heads of the keys.
        group: Heads of the queries that share one.
        head_dim: Dimensions of a head.
        dim: Dimensions that are multiplied; those that a head does not have are zeros.
    """

    heads_kv: int
    group: int
    head_dim: int
    dim: int

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> "Sizes":
        """The sizes of ``q`` ``(num_rows, heads_q, head_dim)`` and ``k`` ``(num_keys, heads_kv, head_dim)``."""
        return cls(k.shape[1], q.shape[1] // k.shape[1], q.shape[2], tile_dim(q.shape[2]))


def tile_dim(head_dim: int) -> int:
    """Dimensions that are multiplied."""
    return next(dim for dim in FORWARD_SHAPES if head_dim <= dim)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LazySchedule,
    params: AttnParams,
    state: State,
    is_later: bool,
    sink: torch.Tensor | None,
) -> None:
    """Write the state of all rows, or, with ``is_later``, take these keys into it."""
    out, lse, sums, row_max = state
    num_rows, num_keys = q.shape[0], k.shape[0]
    if num_rows == 0 or num_keys == 0:
        if not is_later:
            fill_without_keys(state, sink)
        return
    sizes = Sizes.of(q, k)
    shape = FORWARD_SHAPES[sizes.dim]
    pack = 2 if sizes.group % 2 == 0 else 1
    walk = schedule.by_queries(make_query_walk, 2 * CONSUMER_ROWS // pack, shape.block_k, q.device)
    heads = heads_at_a_time(sizes.heads_kv, 4 * num_keys * sizes.dim) * (sizes.group // pack)
    num_windows = walk.num_busy if is_later else len(walk.windows)
    if num_windows == 0:
        return
    programs = num_programs(q.device, params)
    all_heads = q.shape[1] // pack
    if params.yields:  # programs that go on and on let nobody else in until they end
        args = batch_args(walk, num_windows, (heads,) * (all_heads // heads), FORWARD_BATCH, programs)
    else:
        args = turn_args(walk, num_windows, heads, all_heads)
    k_tile = shape.block_k, 1, shape.columns
    _forward(
        grid(args, programs),
        tiles(copyable(q), (CONSUMER_ROWS, 1, shape.columns)),
        tiles(copyable(k), k_tile),
        tiles(copyable(v), k_tile),
        tiles(out, (CONSUMER_ROWS, 1, shape.out_columns)),
        Out(
            rows(out),
            rows(out if sums is None else sums),
            lse,
            num_rows,
            row_max,
            None if sink is None or is_later else sink.float().contiguous(),
        ),
        args,
        Scales.of(params),
        GROUP=sizes.group,
        PACK=pack,
        HEAD_DIM=sizes.head_dim,
        STAGES=shape.stages,
        Q_STAGES=shape.q_stages,
        SOFTCAP=params.softcap != 0,
        LAYERED=len(walk.starts) > 1,
        PART=(LATER_PART if is_later else WHOLE if sums is None else FIRST_PART).value,
    )


def fill_without_keys(state: State, sink: torch.Tensor | None) -> None:
    """Write what queries have that attend no key."""
    out, lse, sums, row_max = state
    out.zero_()
    if sink is None:
        lse.fill_(-torch.inf)
    else:
        lse.copy_(sink[:, None])
    if sums is not None:
        sums.zero_()
    if row_max is not None:
        row_max.fill_(-torch.inf)


def launch_backward(
    grads: QueryGrads,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: LazySchedule,
    params: AttnParams,
    results: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Write ``(dk, dv)`` to ``results``, and add to ``grads.dq``."""
    dk, dv = results
    num_rows, num_keys = q.shape[0], k.shape[0]
    if num_rows == 0 or num_keys == 0:
        dk.zero_()
        dv.zero_()
        return
    sizes = Sizes.of(q, k)
    shape = BACKWARD_SHAPES[sizes.dim]
    walk = schedule.by_keys(make_key_walk, shape.block_k, shape.block_q, q.device)
    programs = num_programs(q.device, params)
    work = backward_work(walk, sizes.heads_kv, sizes.group, sizes.dim, programs, takes_turns=params.sm_margin > 0)
    q_tile, k_tile = (shape.block_q, 1, shape.columns), (CONSUMER_ROWS, 1, shape.columns)
    sums: Sequence[torch.Tensor] | None = None
    if work.adds_up:
        if dk.dtype == torch.float32 and sizes.head_dim == sizes.dim:
            sums = dk.zero_(), dv.zero_()
        else:
            sums = torch.zeros(2, *dk.shape[:2], sizes.dim, dtype=torch.float32, device=k.device).unbind()
        k_descs: list[Tiles | None] = [tiles(x.view(num_keys, -1), (64, 64)) for x in sums]
    else:
        k_descs = [tiles(x, k_tile) if x.dtype == k.dtype else None for x in results]
    launcher = _wide_backward if sizes.dim > 128 else _backward
    launcher(
        grid(work.args, programs),
        tiles(copyable(q), q_tile),
        tiles(copyable(k), k_tile),
        tiles(copyable(v), k_tile),
        tiles(copyable(grads.dout), q_tile),
        tiles(grads.lse.view(-1), (shape.block_q,)),
        tiles(grads.delta.view(-1), (shape.block_q,)),
        tiles(grads.dq.view(num_rows, -1), (64, 64)),
        *k_descs,
        grads.lse.shape[1],
        rows(dk),
        rows(dv),
        work.args,
        Scales.of(params),
        GROUP=sizes.group,
        MEMBERS=work.members,
        ADDS_UP=work.adds_up,
        HEAD_DIM=sizes.head_dim,
        SOFTCAP=params.softcap != 0,
        LAYERED=len(walk.starts) > 1,
    )
    if sums is not None and sums[0] is not dk:
        launch_finish(sums[0], dk, 1.0, shuffled=False)
        launch_finish(sums[1], dv, 1.0, shuffled=False)


def copyable(x: torch.Tensor) -> torch.Tensor:
    """The tensor as bulk copies take it: dimensions side by side, 16 bytes or a multiple between rows; or a copy."""
    token_stride, head_stride, dim_stride = x.stride()
    step = 16 // x.element_size()
    aligned = token_stride % step == head_stride % step == x.data_ptr() % 16 == 0
    if aligned and token_stride > 0 and head_stride > 0 and dim_stride == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def grid(args: WalkArgs, programs: int) -> tuple[int, int, int]:
    """A program for each batch; where there are none, ``programs`` or fewer."""
    return args.num_batches or min(args.num_items, programs), 1, 1


def num_programs(device: torch.device, params: AttnParams) -> int:
    """How many multiprocessors a kernel may take."""
    return max(1, _num_multiprocessors(device) - params.sm_margin)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
