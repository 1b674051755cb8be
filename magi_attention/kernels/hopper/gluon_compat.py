"""What differs between the Triton releases that the kernels run under, 3.6 to 3.9: names of the bulk copies."""

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):
    add_tile = tma.async_atomic_add
else:

    @builtin
    def add_tile(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Add a tile to memory; up to 3.8 the compiler has it and the language does not."""
        from triton._C.libtriton import ir

        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


__all__ = ["add_tile", "gl", "load_tile", "store_tile"]
