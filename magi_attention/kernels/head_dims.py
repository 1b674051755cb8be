"""How messages tell of the dimensions of heads."""


def spell(head_dim: int, head_dim_v: int) -> str:
    """``128``, or ``192 and 128`` where values have another head_dim than queries and keys."""
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim} and {head_dim_v}"
