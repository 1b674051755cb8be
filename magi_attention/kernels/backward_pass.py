"""BackwardPass: the part of an engine that makes gradients."""

from typing import Any, Protocol

import torch

from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.query_grads import QueryGrads


class BackwardPass(Protocol):
    """What makes gradients: a module with these functions. Only they know what is what in the :class:`QueryGrads`."""

    def start_backward(
        self,
        out: torch.Tensor,
        dout: torch.Tensor | None,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
        params: AttnParams,
        head_dim: int,
    ) -> QueryGrads:
        """What the backward pass over any part of the keys needs of the queries.

        Args:
            out: The result over all keys, in the type of ``q`` or in the accumulation type.
            dout: The gradient of ``out``, in the type of ``q``; None where there is none.
            lse: The log-sum-exp over all keys and the sink.
            dlse: The gradient of ``lse``; None where there is none.
            params: As in the forward pass.
            head_dim: The last dimension of the queries, and so of ``dq``; that of ``out`` is the values'.
        """

    def backward(
        self,
        grads: QueryGrads,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        schedule: Any,
        params: AttnParams,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the share of these keys to ``grads.dq``, in place.

        Args:
            grads: From :meth:`start_backward`.
            q: As in the forward pass.
            k: A part of the keys, or all.
            v: Their values.
            schedule: The mask of the queries and these keys.
            params: As in the forward pass.
            dtype: The type of the results; None for the accumulation type.

        Returns:
            ``dk`` and ``dv``, shaped as ``k`` and ``v``.
        """

    def adds_in_any_order(self, params: AttnParams) -> bool:
        """Whether :meth:`backward` may run over several parts of the keys at a time.

        Then it adds to ``grads.dq`` atomically, in whatever order.

        Args:
            params: As in the forward pass.
        """

    def sink_grad(self, grads: QueryGrads, sink: torch.Tensor, params: AttnParams) -> torch.Tensor:
        """The gradient of ``sink``, shaped and typed as it, equal bit by bit from run to run.

        The derivative of a query's ``lse`` by the sink is ``p = exp(sink - lse)``, that of ``out`` is ``-p * out``, so
        it is the sum of ``-p * delta`` over the queries.
        """

    def finish_backward(self, grads: QueryGrads, params: AttnParams, dtype: torch.dtype) -> torch.Tensor:
        """``dq`` in ``dtype``, after all parts of the keys; ``grads`` is not used any more."""
