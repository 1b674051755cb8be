"""The triton engine under Triton's interpreter, in a process of its own.

Triton decides between compiling and interpreting when it is imported, so a process does either; that of the tests
compiles. Three mistakes of the interpreter of Triton 3.6 are mended here.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from magi_attention.kernels.engine import Engine

from .attention import Problem, run_engine

FAR = 1 << 26  # elements from one token to the next: 33 tokens are more than 2^31 elements


class Interpreter:
    """A process in which Triton interprets."""

    def __init__(self, process: ProcessPoolExecutor) -> None:
        self._process = process

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(engine, *args)`` with the triton engine."""
        return self._process.submit(_run, function, args).result()


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    with ProcessPoolExecutor(1, get_context("spawn"), _start) as process:
        yield Interpreter(process)


def run_far_apart(engine: Engine, problem: Problem) -> list[torch.Tensor]:
    """``run_engine``, the tokens so far apart that offsets need 64 bits."""
    far = {name: _far_apart(getattr(problem, name)) for name in ("q", "k", "v", "dout")}
    return run_engine(engine, replace(problem, **far))


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    np.seterr(all="raise", under="ignore")  # a NaN made on the way is an error even if it goes nowhere
    _mend_interpreter()


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from magi_attention.kernels import triton as engine

    return function(engine, *args)


def _far_apart(x: torch.Tensor) -> torch.Tensor:
    """A copy with ``FAR`` elements from token to token; only the pages that hold some are ever given out."""
    size = (len(x) - 1) * FAR + x[0].numel()
    far = torch.from_numpy(np.zeros(size * x.element_size(), np.uint8)).view(x.dtype)
    return far.as_strided(x.shape, (FAR, x.shape[2], 1)).copy_(x)


def _mend_interpreter() -> None:
    """Scalars are arrays of one element, and no index in NumPy 2.4; products of bfloat16 are made from the bits as if
    they were integers; rounding to bfloat16 loses carries.
    """
    from triton.runtime import interpreter

    patch_tensor, convert_float = interpreter._patch_lang_tensor, interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot
    bfloat16, float32 = interpreter.tl.bfloat16, interpreter.tl.float32

    def mended_patch_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def mended_convert_float(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (bfloat16, float32):
            return (x.astype(np.uint32) << 16).view(np.float32)
        if (source, target) == (float32, bfloat16):
            return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
        return convert_float(x, source, target, rounding_mode)

    def mended_create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if a.dtype == bfloat16:
            a, b = (
                interpreter.TensorHandle(mended_convert_float(x.data, bfloat16, float32, None), float32) for x in (a, b)
            )
        return create_dot(self, a, b, *args)

    interpreter._patch_lang_tensor = mended_patch_tensor
    interpreter._convert_float = mended_convert_float
    interpreter.InterpreterBuilder.create_dot = mended_create_dot
