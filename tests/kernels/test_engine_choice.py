"""Which engine computes, and what is said about it."""

import importlib.util
import logging

import pytest
import torch

from magi_attention.kernels import engine as engine_module
from magi_attention.kernels import explain, reference, triton
from magi_attention.kernels.engine import ENGINES, choose_engine
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.triton import tuning

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were an A100 and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    engine_module._default_engine.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_cpu_gets_the_reference_engine(dtype: torch.dtype) -> None:
    assert choose_engine(CPU, dtype, (300, 300)) is reference
    assert "reference: chosen" in explain("cpu", dtype, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gets_a_gpu_engine(gpu: None, dtype: torch.dtype) -> None:
    assert choose_engine(CUDA, dtype, (256, 256)) is triton
    assert "triton: chosen" in explain(CUDA, dtype, 256)


@pytest.mark.parametrize(
    ("dtype", "head_dims", "reason"),
    [
        (torch.float64, (64, 64), "takes bfloat16, float16 and float32, not torch.float64"),
        (torch.bfloat16, (257, 257), "takes a head_dim up to 256 that is a multiple of 8, not 257"),
        (torch.bfloat16, (192, 100), "takes a head_dim up to 256 that is a multiple of 8, not 192 and 100"),
        (torch.bfloat16, (264, 128), "takes a head_dim up to 256 that is a multiple of 8, not 264 and 128"),
    ],
)
def test_the_reference_engine_is_not_chosen_silently_on_a_gpu(
    gpu: None, dtype: torch.dtype, head_dims: tuple[int, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf'(?s)triton: {reason}.*reference: only when asked for with engine="ref'):
        choose_engine(CUDA, dtype, head_dims)
    assert choose_engine(CUDA, dtype, head_dims, "reference") is reference


@pytest.mark.parametrize("head_dims", [(192, 128), (64, 256)])
def test_values_of_another_head_dim(gpu: None, head_dims: tuple[int, int]) -> None:
    assert choose_engine(CPU, torch.float32, head_dims) is reference
    assert choose_engine(CUDA, torch.bfloat16, head_dims) is triton
    assert "triton: chosen" in explain(CUDA, torch.bfloat16, *head_dims)


def test_messages_tell_of_both_head_dims_where_they_differ(gpu: None) -> None:
    with pytest.raises(ValueError, match=r"attention of torch.float64, head_dim 192 and 128, on cuda"):
        choose_engine(CUDA, torch.float64, (192, 128))
    with pytest.raises(ValueError, match=r"attention of torch.float64, head_dim 192, on cuda"):
        choose_engine(CUDA, torch.float64, (192, 192))
    assert explain(CUDA, torch.bfloat16, 128) == explain(CUDA, torch.bfloat16, 128, 128)
    with pytest.raises(TypeError, match="head_dim_v must be an integer"):
        explain(CUDA, torch.bfloat16, 128, 64.5)  # type: ignore[arg-type]


def test_without_triton(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'triton>=3\.6'"):
        choose_engine(CUDA, torch.bfloat16, (64, 64))


def test_an_old_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "compute_capability", lambda device: 7)
    assert "triton: needs compute capability 8.0 or higher, which some GPU has not" in explain(
        "cuda", torch.float16, 64
    )


def test_a_device_that_no_gpu_engine_knows() -> None:
    with pytest.raises(ValueError, match=r"triton: runs on CUDA GPUs, not on mps"):
        choose_engine(torch.device("mps"), torch.float32, (64, 64))


def test_by_name() -> None:
    assert choose_engine(CPU, torch.float32, (64, 64), "reference") is reference
    with pytest.raises(ValueError, match="engine='triton' was asked for, but triton runs on CUDA GPUs"):
        choose_engine(CPU, torch.float32, (64, 64), "triton")
    with pytest.raises(ValueError, match=r"engine must be one of \[.*'reference'\], or None to choose, got 'fast'"):
        choose_engine(CPU, torch.float32, (64, 64), "fast")


def test_what_no_engine_takes() -> None:
    with pytest.raises(ValueError, match=r"reference: takes .*, not torch.float8_e5m2"):
        choose_engine(CPU, torch.float8_e5m2, (8, 8))


def test_every_engine_has_a_line() -> None:
    lines = explain("cuda", torch.float64, 64).splitlines()
    assert [line.partition(":")[0] for line in lines] == [engine.name for engine in ENGINES]


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    engine_module._default_engine.cache_clear()
    with caplog.at_level(logging.DEBUG, "magi_attention"):
        for _ in range(2):
            choose_engine(CPU, torch.float32, (48, 48))
    assert len(caplog.messages) == 1 and "reference: chosen" in caplog.text


def test_which_engines_may_have_several_backward_kernels_at_a_time() -> None:
    """Those that add to dq in any order, unless gradients must repeat."""
    cases = AttnParams(1.0), AttnParams(1.0, deterministic=True)
    may = {engine.name: [engine.adds_in_any_order(case) for case in cases] for engine in ENGINES}
    assert may == {"hopper": [True, False], "triton": [False] * 2, "reference": [False] * 2}
