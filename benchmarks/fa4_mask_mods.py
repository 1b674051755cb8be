"""The two masks of gpu_rivals.py in the language of flash-attn-4's kernels; importing this needs flash-attn-4.

``aux_tensors`` holds start and end of each interval, int32.
"""

import cutlass
from cutlass import cute
from flash_attn.cute.seqlen_info import SeqlenInfoQK
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def rows_intervals(
    batch: cute.TensorSSA,
    head: cute.TensorSSA,
    q: cute.TensorSSA,
    k: cute.TensorSSA,
    seqlen_info: SeqlenInfoQK,
    aux_tensors: list,
) -> cute.TensorSSA:
    """Row ``q`` attends the keys ``start[q] <= k < end[q]``."""
    start = scalar_to_ssa(aux_tensors[0][q[0]], cutlass.Int32)
    end = scalar_to_ssa(aux_tensors[1][q[0]], cutlass.Int32)
    return (k >= start) & (k < end)


@cute.jit
def keys_intervals(
    batch: cute.TensorSSA,
    head: cute.TensorSSA,
    q: cute.TensorSSA,
    k: cute.TensorSSA,
    seqlen_info: SeqlenInfoQK,
    aux_tensors: list,
) -> cute.TensorSSA:
    """Key ``k`` is attended by the rows ``start[k] <= q < end[k]``."""
    start = scalar_to_ssa(aux_tensors[0][k[0]], cutlass.Int32)
    end = scalar_to_ssa(aux_tensors[1][k[0]], cutlass.Int32)
    return (q >= start) & (q < end)
