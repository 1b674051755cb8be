"""Attention has no second derivative here, and who asks for it is told.

``torch.autograd.function.once_differentiable`` refuses only where the gradients that come in depend on something. Those
of a sum do not, and a gradient penalty on it would be taken for a constant.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

Grads = tuple[torch.Tensor | None, ...]


def no_second_derivative(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """For the ``backward`` of a ``torch.autograd.Function``: its results raise RuntimeError when differentiated."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> Grads:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # it is with create_graph=True
            return results
        return _Refusal.apply(torch.empty(0, requires_grad=True), *results)

    return wrapper


class _Refusal(torch.autograd.Function):
    """Passes tensors on. They depend on the first one, which requires a gradient, and there is none."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *results: torch.Tensor | None) -> Grads:
        return results

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Grads:
        raise RuntimeError(
            "there is no second derivative of this attention: detach its gradients before they go into a loss"
        )
