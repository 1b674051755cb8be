"""What the tensors must be, for every engine."""

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, x: torch.Tensor) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: If ``x``, the argument of that name, is something else.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse queries, keys and values that do not fit together.

    Args:
        q: ``(tokens, heads_q, head_dim)``.
        k: ``(keys, heads_kv, head_dim)``; ``heads_kv`` divides ``heads_q``.
        v: ``(keys, heads_kv, head_dim_v)``.

    Raises:
        TypeError: If one is not a tensor, not floating point, or their dtypes differ.
        ValueError: If their shapes or devices do not fit together.
    """
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        check_tensor(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    for name, x in named.items():
        if x.ndim != 3:
            raise ValueError(f"{name} must have shape (tokens, heads, head_dim), got {tuple(x.shape)}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k and v must have as many keys and heads, got shapes {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ValueError(f"q and k must have one head_dim, at least 1, got {q.shape[2]} and {k.shape[2]}")
    if v.shape[2] == 0:
        raise ValueError(f"v must have a head_dim of at least 1, got shape {tuple(v.shape)}")
    heads_q, heads_kv = q.shape[1], k.shape[1]
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        raise ValueError(f"the heads of q must be a multiple of the heads of k and v, got {heads_q} and {heads_kv}")


def check_sink(sink: torch.Tensor | None, q: torch.Tensor) -> None:
    """Refuse a sink that does not fit the queries.

    Args:
        sink: ``(heads_q,)``, float32 or of the type of ``q``; None for none.
        q: ``(tokens, heads_q, head_dim)``.

    Raises:
        TypeError: If it is not a tensor, or of another dtype.
        ValueError: If its shape or device is another.
    """
    if sink is None:
        return
    if not isinstance(sink, torch.Tensor):
        raise TypeError(f"sink must be a torch.Tensor or None, not {type(sink).__name__}")
    if sink.dtype not in (torch.float32, q.dtype):
        raise TypeError(f"sink must be float32 or of the dtype of q, {q.dtype}, got {sink.dtype}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on the device of q, {q.device}, but is on {sink.device}")
    if sink.shape != q.shape[1:2]:
        raise ValueError(f"sink must have shape ({q.shape[1]},), one score for each head of q, got {tuple(sink.shape)}")
