"""Shift a dispatched sequence along itself, as multi-token prediction does with its targets."""

import torch

from magi_attention.api.outside_graphs import outside_graphs
from magi_attention.kernels.validate import check_tensor
from magi_attention.mask.integers import as_int
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.make_key import ready_runtime
from magi_attention.runtime.roll import Roll


@outside_graphs
def roll(x: torch.Tensor, shift: int, dim: int, key: DistAttnRuntimeKey) -> torch.Tensor:
    """``torch.roll`` of the global sequence, on dispatched local rows, without the global tensor.

    ``roll(dispatch(x, key), shift, 0, key)`` equals ``dispatch(torch.roll(x, shift, 0), key)``. A collective, forward
    and backward: each rank sends only the rows that move to another rank, in one all-to-all. What moves where is
    planned at the first use of a shift and kept with the key's plan.

    Shifting knows no documents: as in ``torch.roll``, what leaves a document enters its neighbour, and what leaves the
    sequence at one end enters it at the other. To find the targets n tokens ahead that are of another document, shift
    each token's position in its document as well::

        labels = roll(tokens, -n, 0, key)
        position = dispatch(position_in_document, key)
        labels = labels.masked_fill(roll(position, -n, 0, key) != position + n, -100)

    Args:
        x: Local rows, as :func:`~magi_attention.api.magi_attn_interface.dispatch` returns them (of queries, in
            cross-attention), of any dtype that the backend sends; dimension
            ``dim`` has ``local_seqlen`` entries, the others are the same on every rank.
        shift: How many places each row moves towards the end of the sequence; negative towards its start. Any integer,
            the same on every rank.
        dim: The dimension of the sequence; negative counts from the end.
        key: The key that ``x`` was dispatched with.

    Returns:
        The rows that stand in this rank's places after the shift, of ``x``'s shape and dtype. Padding takes no part:
        the real rows are shifted among themselves, and padding rows of the result are zero. The gradient is shifted
        back by as many places.

    Raises:
        TypeError: If ``key`` is no key, ``x`` no tensor, or ``shift`` or ``dim`` no integer.
        ValueError: If ``x`` has no dimension ``dim`` or another length there, the key's plan was evicted, or the ranks
            made the key from different masks.
    """
    runtime = ready_runtime(key)
    shift, dim = as_int(shift, "shift"), as_int(dim, "dim")
    check_tensor("x", x)
    local_seqlen = runtime.dispatch.local_seqlens[runtime.rank]
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != local_seqlen:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the key is for {local_seqlen} local rows in dimension dim = {dim}"
        )
    return Roll.apply(x.movedim(dim, 0), shift, runtime).movedim(0, dim)
