"""From tensors and a schedule to the arguments of the kernels."""

import functools

import torch

from magi_attention.kernels.hopper.backward_kernel import backward_kernel
from magi_attention.kernels.hopper.batches import FORWARD_BATCH
from magi_attention.kernels.hopper.device_walk import DeviceWalk, make_key_walk, make_query_walk
from magi_attention.kernels.hopper.forward_kernel import forward_kernel
from magi_attention.kernels.hopper.forward_results import FIRST_PART, LATER_PART, WHOLE, Out
from magi_attention.kernels.hopper.launcher import Launcher, Tiles, rows, tiles
from magi_attention.kernels.hopper.pipeline import WalkArgs
from magi_attention.kernels.hopper.row_kernels import all_dims, launch_finish
from magi_attention.kernels.hopper.shapes import (
    BACKWARD_SHAPES,
    Dims,
    backward_columns,
    backward_dims,
    forward_dims,
    forward_shape,
    is_wide,
    tile_columns,
)
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
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    dims = forward_dims(q.shape[2], v.shape[2])
    shape = forward_shape(dims)
    columns = Dims(*map(tile_columns, dims))
    pack = 2 if group % 2 == 0 else 1
    walk = schedule.by_queries(make_query_walk, 2 * CONSUMER_ROWS // pack, shape.block_k, q.device)
    heads = heads_at_a_time(heads_kv, 2 * num_keys * sum(dims)) * (group // pack)
    apart = schedule.part is not None and schedule.part.apart
    num_windows = windows_to_compute(walk, is_later, all_at_once=sink is not None and not apart)
    if num_windows < len(walk.windows) and not (is_later or apart):
        fill_lse(state, None)
    if num_windows == 0:
        return
    is_later = is_later and not apart  # what is apart is written as if there were nothing else
    programs = num_programs(q.device, params)
    all_heads = q.shape[1] // pack
    if params.yields:  # programs that go on and on let nobody else in until they end
        args = batch_args(walk, num_windows, (heads,) * (all_heads // heads), FORWARD_BATCH, programs)
    else:
        heads = walk.heads_side_by_side(num_windows, heads, all_heads, programs)
        args = turn_args(walk, num_windows, heads, all_heads)
    _forward(
        grid(args, programs),
        tiles(copyable(q), (CONSUMER_ROWS, 1, columns.k)),
        tiles(copyable(k), (shape.block_k, 1, columns.k)),
        tiles(copyable(v), (shape.block_k, 1, columns.v)),
        tiles(out, (CONSUMER_ROWS, 1, min(columns.v, shape.out_columns))),
        Out(
            rows(out),
            rows(out)._replace(ptr=lse) if sums is None else rows(sums),  # without sums neither read nor written
            lse,
            num_rows,
            row_max,
            None if sink is None or is_later else sink.float().contiguous(),
        ),
        args,
        Scales.of(params),
        GROUP=group,
        PACK=pack,
        HEAD_DIM_V=v.shape[2],
        STAGES=shape.stages,
        Q_STAGES=shape.q_stages,
        K_PARTS=dims.k // columns.k,
        V_PARTS=dims.v // columns.v,
        SOFTCAP=params.softcap != 0,
        LAYERED=len(walk.starts) > 1,
        PART=(LATER_PART if is_later else WHOLE if sums is None else FIRST_PART).value,
    )


def windows_to_compute(walk: DeviceWalk, is_later: bool, all_at_once: bool) -> int:
    """How many windows: of a later part those with tiles, of the first also rows that have none in any part."""
    if is_later:
        return walk.num_busy
    return len(walk.windows) if all_at_once else walk.num_begun


def fill_lse(state: State, sink: torch.Tensor | None) -> None:
    """Write that queries have attended no key, for those that no window is computed of."""
    if sink is None:
        state.lse.fill_(-torch.inf)
    else:
        state.lse.copy_(sink[:, None])
    if state.row_max is not None:
        state.row_max.fill_(-torch.inf)


def fill_without_keys(state: State, sink: torch.Tensor | None) -> None:
    """Write what queries have that attend no key."""
    state.out.zero_()
    if state.sums is not None:
        state.sums.zero_()
    fill_lse(state, sink)


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
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    dims = backward_dims(q.shape[2], v.shape[2])
    shape, columns = BACKWARD_SHAPES[dims.k], backward_columns(dims)
    walk = schedule.by_keys(make_key_walk, shape.block_k, shape.block_q, q.device)
    programs = num_programs(q.device, params)
    row_bytes = 6 * dims.k + 2 * dims.v  # q and dout in 16 bits, dq in 32
    work = backward_work(walk, heads_kv, group, row_bytes, programs, takes_turns=params.sm_margin > 0)
    sums: list[torch.Tensor] = []
    if work.adds_up:
        sums = [sums_of(x, dim) for x, dim in zip(results, dims, strict=True)]
        k_descs: list[Tiles | None] = [tiles(x.view(num_keys, -1), (64, 64)) for x in sums]
    else:
        stored = CONSUMER_ROWS, 1, columns.v  # which a tile of v has room for when it has been read
        k_descs = [tiles(x, stored) if x.dtype == k.dtype else None for x in results]
    (_wide_backward if is_wide(dims) else _backward)(
        grid(work.args, programs),
        tiles(copyable(q), (shape.block_q, 1, columns.k)),
        tiles(copyable(k), (CONSUMER_ROWS, 1, columns.k)),
        tiles(copyable(v), (CONSUMER_ROWS, 1, columns.v)),
        tiles(copyable(grads.dout), (shape.block_q, 1, columns.v)),
        tiles(grads.lse.view(-1), (shape.block_q,)),
        tiles(grads.delta.view(-1), (shape.block_q,)),
        tiles(all_dims(grads.dq).view(num_rows, -1), (64, 64)),
        *k_descs,
        grads.lse.shape[1],
        rows(dk),
        rows(dv),
        work.args,
        Scales.of(params),
        GROUP=group,
        MEMBERS=work.members,
        ADDS_UP=work.adds_up,
        HEAD_DIM=k.shape[2],
        HEAD_DIM_V=v.shape[2],
        DIM=dims.k,
        DIM_V=dims.v,
        SOFTCAP=params.softcap != 0,
        LAYERED=len(walk.starts) > 1,
    )
    if work.adds_up:
        for total, result in zip(sums, results, strict=True):
            if total is not result:
                launch_finish(total, result, 1.0, shuffled=False)


def sums_of(result: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros to add a result up in, with ``dim`` dimensions: itself if it is as they are."""
    if result.dtype == torch.float32 and result.shape[2] == dim:
        return result.zero_()
    return torch.zeros(*result.shape[:2], dim, dtype=torch.float32, device=result.device)


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
