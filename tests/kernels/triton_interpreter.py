"""The triton engine under Triton's interpreter, in a process of its own.

Triton decides between compiling and interpreting when it is imported, so a process does either. Nothing is interpreted
in the process of the tests.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

Tensors = tuple[torch.Tensor, ...]


@contextmanager
def interpreter() -> Iterator[Callable[..., Tensors]]:
    """A function ``run(name, *args)`` that calls the engine's function of that name."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start) as process:
        yield lambda *args: process.submit(_run, *args).result()


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    np.seterr(all="raise", under="ignore")  # a kernel that makes a NaN on its way fails
    _mend_interpreter()


def _run(name: str, *args: Any) -> Tensors:
    from magi_attention.kernels import triton as engine

    # Results are not sent as views of shared memory, which a pipe of tensors would keep open.
    return tuple(x.clone() for x in getattr(engine, name)(*args))


def _mend_interpreter() -> None:
    """Mend what Triton 3.6 interprets wrongly.

    Scalars are arrays of one element, which NumPy 2.4 takes for an index no more; products of bfloat16 are made from
    their bits; and rounding to bfloat16 loses a carry.
    """
    from triton.runtime import interpreter

    patch_tensor, convert_float = interpreter._patch_lang_tensor, interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot
    tl, handle = interpreter.tl, interpreter.TensorHandle

    def mended_patch_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def mended_convert_float(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return (x.astype(np.uint32) << 16).view(np.float32)
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
        return convert_float(x, source, target, rounding_mode)

    def mended_create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (handle(mended_convert_float(x.data, tl.bfloat16, tl.float32, None), tl.float32) for x in (a, b))
        return create_dot(self, a, b, *args)

    interpreter._patch_lang_tensor = mended_patch_tensor
    interpreter._convert_float = mended_convert_float
    interpreter.InterpreterBuilder.create_dot = mended_create_dot
