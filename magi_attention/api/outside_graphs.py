"""Plans and collectives are no part of a graph: what ``torch.compile`` makes ends before them and goes on behind."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which ``torch.compile`` calls as it is: a break in the graph, and nothing inside is traced.

    ``torch.compiler.disable`` does it, but loads the compiler, which takes longer than all else that is imported here,
    and costs each call some microseconds. So it is asked where something is being compiled.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return wrapper
