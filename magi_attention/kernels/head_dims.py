"""What messages say of the dimensions of heads."""


def spell(head_dim: int, head_dim_v: int) -> str:
    """``128``, or ``192 and 128`` where values have another head_dim than queries and keys."""
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim} and {head_dim_v}"


def refuse_head_dims(head_dim: int, head_dim_v: int, most: int) -> str | None:
    """Why an engine does not take them that needs multiples of 8 up to ``most``; None if it does."""
    if all(dim <= most and dim % 8 == 0 for dim in (head_dim, head_dim_v)):
        return None
    return f"takes a head_dim up to {most} that is a multiple of 8, not {spell(head_dim, head_dim_v)}"
