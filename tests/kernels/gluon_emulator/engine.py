"""The hopper engine's modules, loaded again with others in the place of Triton's."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from magi_attention import kernels
from magi_attention.kernels import hopper

from .device import Device
from .multiprocessor import require
from .tensors import Constant, Layout, SliceLayout, Tensor, TensorDescriptor, elementwise, load, raw, reduction, store

PACKAGE = hopper.__name__


def _arange(start: int, end: int, layout: Any = None) -> Tensor:
    return Tensor(torch.arange(start, end, dtype=torch.int32), layout)


def _zeros(shape: Sequence[int], dtype: torch.dtype, layout: Any = None) -> Tensor:
    return Tensor(torch.zeros(list(shape), dtype=dtype), layout)


def _pairwise(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return elementwise(lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b)))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) else x


ASSEMBLY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ex2.approx.ftz.f32 $0, $1;": torch.exp2,
    "tanh.approx.f32 $0, $1;": lambda x: torch.tanh(x).half().float(),  # its relative error is up to 2^-11
}


def _assembly(code: str, constraints: str, args: list[Tensor], dtype: torch.dtype, is_pure: bool, pack: int) -> Tensor:
    require(dtype == torch.float32 and is_pure and pack == 1, "only one result of float32")
    return elementwise(ASSEMBLY[code])(*args)


class Kernel:
    """What ``jit`` makes of a function: called in a kernel, it is itself; compiled and launched, it is a kernel."""

    def __init__(self, function: Callable[..., Any], device: Device) -> None:
        self._function, self._device = function, device
        parameters = inspect.signature(function).parameters.values()
        self.__name__ = function.__name__
        self.arg_names = [p.name for p in parameters]
        self.params = [SimpleNamespace(is_constexpr=p.annotation is Constant) for p in parameters]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def run(self, *args: Any, **constants_and_options: Any) -> "Kernel":
        """Compile."""
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self._device.launch(self._function, grid, args)


def _modules(device: Device) -> dict[str, Any]:
    """What stands for Triton's modules."""

    def jit(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, device)

    language = SimpleNamespace(
        **{x: getattr(torch, x) for x in ("bfloat16", "float16", "float32", "int32", "int64")},
        constexpr=Constant,
        static_range=range,
        arange=_arange,
        zeros=_zeros,
        where=elementwise(lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b)),
        maximum=_pairwise(torch.maximum),
        minimum=_pairwise(torch.minimum),
        log2=elementwise(torch.log2),
        max=reduction(torch.amax),
        sum=reduction(torch.sum),
        cast=_cast,
        convert_layout=lambda x, layout, assert_trivial=False: Tensor(raw(x), layout),
        load=load,
        store=store,
        inline_asm_elementwise=_assembly,
        program_id=device.program_id,
        num_programs=device.num_programs,
        allocate_shared_memory=device.allocate_shared_memory,
        warp_specialize=device.warp_specialize,
        NVMMADistributedLayout=Layout,
        NVMMASharedLayout=Layout,
        DotOperandLayout=Layout,
        SliceLayout=SliceLayout,
        _core=SimpleNamespace(builtin=lambda function: function),
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=Layout, init=device.init_barrier, arrive=device.arrive, expect=device.expect, wait=device.wait
    )
    tma = SimpleNamespace(
        async_load=device.load_tile,
        async_store=device.store_tile,
        async_atomic_add=device.add_tile,
        store_wait=device.store_wait,
    )
    hopper_language = SimpleNamespace(
        mbarrier=mbarrier,
        tma=tma,
        fence_async_shared=device.fence_async_shared,
        warpgroup_mma=device.warpgroup_mma,
        warpgroup_mma_wait=device.warpgroup_mma_wait,
    )
    gluon = SimpleNamespace(jit=jit, constexpr_function=lambda function: function, language=language)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    return {
        "triton": SimpleNamespace(
            jit=jit, next_power_of_2=lambda n: 1 << (n - 1).bit_length(), language=language, runtime=runtime
        ),
        "triton.language": language,
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language._core": language._core,
        "triton.experimental.gluon.language.nvidia.hopper": hopper_language,
        "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=TensorDescriptor),
    }


@contextmanager
def _in_place(modules: dict[str, Any]) -> Iterator[None]:
    """Have ``import`` find these."""
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def _loaded() -> dict[str, ModuleType]:
    """The engine's modules."""
    return {name: module for name, module in sys.modules.items() if f"{name}.".startswith(f"{PACKAGE}.")}


def _load(device: Device) -> dict[str, ModuleType]:
    """Load the engine's modules again, for a device."""
    real = _loaded()
    with _in_place(_modules(device)):
        for name in real:
            del sys.modules[name]
        try:
            package = importlib.import_module(PACKAGE)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{PACKAGE}.{module.name}")
            return _loaded()
        finally:
            for name in _loaded():
                del sys.modules[name]
            sys.modules.update(real)
            kernels.hopper = hopper


class EmulatedEngine:
    """An :class:`~magi_attention.kernels.engine.Engine`: the functions of the hopper engine, on tensors of the CPU.

    Args:
        seed: Of the choice of who goes on.
        num_multiprocessors: How many the kernels believe to have.

    Attributes:
        launch: The module that launches its kernels.
        work: The module that says which items programs take.
    """

    def __init__(self, seed: int, num_multiprocessors: int = 5) -> None:
        self._modules = _load(Device(seed))
        self.launch: Any = self._modules[f"{PACKAGE}.launch"]
        self.work: Any = self._modules[f"{PACKAGE}.work"]
        self.launch._num_multiprocessors = lambda device: num_multiprocessors

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._modules[PACKAGE], name)
        if not callable(function):
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            with _in_place(self._modules):
                return function(*args, **kwargs)

        return call
