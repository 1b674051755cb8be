"""Engines, the implementations of attention on one device, and the rule that chooses one."""

import functools
import logging
from typing import Any, Protocol

import torch

from magi_attention.kernels import hopper, reference, triton
from magi_attention.kernels.backward_pass import BackwardPass
from magi_attention.kernels.head_dims import spell
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import Part, State
from magi_attention.mask.bands import IntArray
from magi_attention.mask.integers import as_int

logger = logging.getLogger("magi_attention")


class Engine(BackwardPass, Protocol):
    """One implementation of attention: a module with these names, and those of its backward pass.

    The accumulation type is float32, or float64 for float64 inputs. Tensors that an engine makes are contiguous. A
    query that attends nothing has ``out`` 0, ``lse`` -inf, and no part in any gradient, whatever finite ``dout`` and
    whatever ``dlse`` there is for it. With a sink its ``lse`` is the sink, and ``dlse`` goes to that.
    """

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def parts_side_by_side(self) -> bool:
        """Whether :meth:`forward` may run over several parts of the keys at a time that are apart."""

    def __hash__(self) -> int:
        """An engine is itself and no other."""

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """Why the engine cannot compute such attention, and what it could; None when it can.

        Args:
            device: Where q, k and v are.
            dtype: Their type.
            head_dim: The last dimension of q and k.
            head_dim_v: The last dimension of v.
        """

    def schedule(self, bands: IntArray, num_rows: int, num_keys: int, part: Part | None = None) -> Any:
        """Compile a mask, once for many calls.

        Args:
            bands: Bands inside ``num_rows`` x ``num_keys`` that share no cell, ``(n, 6)``.
            num_rows: Number of queries.
            num_keys: Number of keys.
            part: Which part of the keys these are, if they come in parts.

        Returns:
            What :meth:`forward` and :meth:`backward` take; only the engine knows what it is.
        """

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        schedule: Any,
        params: AttnParams,
        state: State | None = None,
        sink: torch.Tensor | None = None,
    ) -> State:
        """Attention of ``q`` over ``k`` and ``v``.

        Args:
            q: ``(num_rows, heads_q, head_dim)``, any strides, as for all tensors.
            k: ``(num_keys, heads_kv, head_dim)``; ``heads_kv`` divides ``heads_q``.
            v: ``(num_keys, heads_kv, head_dim_v)``.
            schedule: The mask of ``num_rows`` x ``num_keys`` scores.
            params: How scores are made.
            state: What the calls over the parts before have made of the same queries; None at the first part, and when
                the keys don't come in parts. It is changed in place. What a query has that attends none of these keys
                is kept bit by bit.
            sink: A score of each query head that joins the softmax of its queries with no value, ``(heads_q,)``, of
                any floating-point type. It counts once: with the first part, or where parts are apart with the part
                that writes a query.

        Returns:
            The state. After the last part, ``out`` and ``lse`` are those over all keys, and ``row_max``, which is there
            if ``params`` ask for it, is over all keys, too, without the sink.
        """


ENGINES: tuple[Engine, ...] = (hopper, triton, reference)
"""All engines, the one to prefer first."""


def choose_engine(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], name: str | None = None
) -> Engine:
    """The engine called ``name``; for None, the first of :data:`ENGINES` that :func:`explain` finds nothing against.

    Args:
        device: Where q, k and v are.
        dtype: Their type.
        head_dims: The last dimension of q and k, and that of v.
        name: What users call the engine.

    Raises:
        ValueError: If no engine has the name, or it cannot compute such attention, or, for None, none is chosen; the
            message has the reasons.
    """
    if name is None:
        return _default_engine(device, dtype, head_dims)
    for engine in ENGINES:
        if engine.name == name:
            reason = engine.refusal(device, dtype, *head_dims)
            if reason is not None:
                raise ValueError(f"engine={name!r} was asked for, but {engine.name} {reason}")
            return engine
    raise ValueError(f"engine must be one of {[engine.name for engine in ENGINES]}, or None to choose, got {name!r}")


def explain(device: torch.device | str, dtype: torch.dtype, head_dim: int, head_dim_v: int | None = None) -> str:
    """Which engine is chosen for such attention, and why: one line for each engine, in the order of preference.

    Args:
        device: Where q, k and v are.
        dtype: Their type.
        head_dim: The last dimension of q and k.
        head_dim_v: The last dimension of v; None for the same.

    Raises:
        TypeError: If ``dtype`` is no ``torch.dtype`` or a head_dim not an integer.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, not {dtype!r}")
    head_dim = as_int(head_dim, "head_dim")
    head_dims = head_dim, head_dim if head_dim_v is None else as_int(head_dim_v, "head_dim_v")
    lines, chosen = [], False
    for engine in ENGINES:
        reason = _objection(engine, torch.device(device), dtype, head_dims)
        if reason is None:
            reason = "would do, but comes later" if chosen else "chosen"
            chosen = True
        lines.append(f"{engine.name}: {reason}")
    return "\n".join(lines)


@functools.cache
def _default_engine(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> Engine:
    why = explain(device, dtype, *head_dims)
    for engine in ENGINES:
        if _objection(engine, device, dtype, head_dims) is None:
            logger.debug("attention of %s, head_dim %s, on %s:\n%s", dtype, spell(*head_dims), device, why)
            return engine
    raise ValueError(f"no engine is chosen for attention of {dtype}, head_dim {spell(*head_dims)}, on {device}:\n{why}")


def _objection(engine: Engine, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> str | None:
    """Why the engine is not chosen unasked."""
    reason = engine.refusal(device, dtype, *head_dims)
    if reason is None and engine is reference and device.type != "cpu":
        return 'only when asked for with engine="reference": it is made to be right, and slow on a GPU'
    return reason
