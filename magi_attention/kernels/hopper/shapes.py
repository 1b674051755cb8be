"""Shapes: which dimensions the kernels multiply, and how these and the others are divided into tiles."""

from typing import NamedTuple


class ForwardShape(NamedTuple):
    """How the forward kernel divides its work and the 227 KiB of shared memory.

    Attributes:
        block_k: Keys of a tile.
        stages: How many tiles of k, and of v, there is room for.
        q_stages: The same of queries of an item.
        out_columns: Columns of results that are stored at a time, at most.
    """

    block_k: int
    stages: int
    q_stages: int
    out_columns: int


# By the dimensions of keys or values that are multiplied, whichever are more. Of 256, a consumer's sums take 128
# registers a thread: of scores 64 x 64 fit beside them.
FORWARD_SHAPES = {
    64: ForwardShape(block_k=128, stages=4, q_stages=2, out_columns=64),
    128: ForwardShape(block_k=128, stages=2, q_stages=2, out_columns=128),
    192: ForwardShape(block_k=64, stages=2, q_stages=2, out_columns=64),
    256: ForwardShape(block_k=64, stages=2, q_stages=1, out_columns=128),
}


class BackwardShape(NamedTuple):
    """How a backward kernel divides its work.

    Attributes:
        block_k: Keys of an item.
        block_q: Queries of a tile.
    """

    block_k: int
    block_q: int


# By the dimensions of keys that are multiplied. Of 256, sums of 64 keys, dk and dv, fill the registers of two
# consumers.
BACKWARD_SHAPES = {
    64: BackwardShape(block_k=128, block_q=128),
    128: BackwardShape(block_k=128, block_q=64),
    192: BackwardShape(block_k=64, block_q=64),
    256: BackwardShape(block_k=64, block_q=64),
}


class Dims(NamedTuple):
    """Dimensions that are multiplied; those that a head does not have are zeros.

    Attributes:
        k: Of queries and keys.
        v: Of values and the output.
    """

    k: int
    v: int


def forward_dims(head_dim: int, head_dim_v: int) -> Dims:
    """Those of the forward kernel."""
    return Dims(rounded(head_dim), rounded(head_dim_v))


def forward_shape(dims: Dims) -> ForwardShape:
    """How the forward kernel divides its work."""
    if dims.k == 192 and dims.v <= 128:
        # As in latent attention: sums of 128 dimensions leave registers for 128 keys, and a second buffer of queries
        # and wide stores give up their shared memory for them.
        return ForwardShape(block_k=128, stages=2, q_stages=1, out_columns=64)
    return FORWARD_SHAPES[max(dims)]


def backward_dims(head_dim: int, head_dim_v: int) -> Dims:
    """Those of the backward kernels: values have no more of them than keys, and the same up to 128."""
    dim = rounded(max(head_dim, head_dim_v))
    return Dims(dim, max(rounded(head_dim_v), min(dim, 128)))


def rounded(head_dim: int) -> int:
    """The next number of dimensions that kernels know."""
    return next(dim for dim in FORWARD_SHAPES if head_dim <= dim)


def tile_columns(dim: int) -> int:
    """How wide tiles are in the forward kernel's shared memory: sizes are powers of two, so of 192 there are three."""
    return dim & -dim


def backward_columns(dims: Dims) -> Dims:
    """How wide tiles are in a backward kernel's shared memory: the wide one has two side by side."""
    return Dims(*(128 if dim > 128 else 64 for dim in dims)) if is_wide(dims) else dims


def is_wide(dims: Dims) -> bool:
    """Whether the backward pass takes the kernel that shares dimensions out among consumers."""
    return dims.k > 128
