"""The configuration of stages and of what things cost: checked when it is built, and part of what ranks compare."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from magi_attention.config import AttnOverlapMode, CostModel, DistAttnConfig, LocalityDispatchAlg, OverlapConfig


def test_defaults_change_nothing() -> None:
    config = DistAttnConfig()
    assert config.overlap_config.mode is AttnOverlapMode.STATIC
    assert config.overlap_config.degree == 1
    assert config.grad_wire_dtype == "float32"


def test_default_rates_are_the_measured_ones() -> None:
    """GB/s of an all-to-all by bytes a peer."""
    model = CostModel()
    for mebibytes, measured in ((16, 198e9), (64, 255e9), (256, 295e9)):
        size = mebibytes << 20
        assert size / (model.latency + size / model.bandwidth) == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(heads_q=0), ValueError, "heads_q must be at least 1, not 0"),
        (dict(heads_q=10, heads_kv=4), ValueError, "heads_q must be a multiple of heads_kv, not 10 with 4"),
        (dict(head_dim=64.0), TypeError, "head_dim must be an integer, not 64.0"),
        (dict(head_dim_v=0), ValueError, "head_dim_v must be at least 1, not 0"),
        (dict(head_dim_v=64.0), TypeError, "head_dim_v must be an integer, not 64.0"),
        (dict(element_bytes=True), TypeError, "element_bytes must be an integer"),
        (dict(bandwidth=0), ValueError, "bandwidth must be above 0, not 0.0"),
        (dict(hbm_bandwidth=-1), ValueError, "hbm_bandwidth must be above 0"),
        (dict(forward_tflops=float("inf")), ValueError, "forward_tflops must be finite, not inf"),
        (dict(backward_tflops="520"), TypeError, "backward_tflops must be a number, not '520'"),
        (dict(latency=-1e-6), ValueError, "latency must be at least 0"),
        (dict(stage_overhead=float("nan")), ValueError, "stage_overhead must be finite"),
        (dict(backward_weight=False), TypeError, "backward_weight must be a number, not False"),
        (dict(forward_weight=0, backward_weight=0), ValueError, "must not both be 0"),
    ],
)
def test_bad_cost_models(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CostModel(**options)


def test_equal_configurations_are_spelled_alike() -> None:
    """Ranks compare how they are spelled."""
    for a, b in (
        (LocalityDispatchAlg(0), LocalityDispatchAlg(0.0)),
        (OverlapConfig(degree=np.int64(2)), OverlapConfig(degree=2)),
        (CostModel(heads_q=np.int32(8), bandwidth=np.float32(2**35)), CostModel(heads_q=8, bandwidth=2**35)),
        (CostModel(head_dim_v=np.int64(64)), CostModel(head_dim_v=64)),
    ):
        assert a == b and repr(a) == repr(b)
    with pytest.raises(TypeError, match="tolerance must be a number, not 'x'"):
        LocalityDispatchAlg("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(mode="dynamic"), TypeError, "mode must be of type AttnOverlapMode, not 'dynamic'"),
        (dict(mode=AttnOverlapMode.DYNAMIC, degree=3), ValueError, "degree must be left out with mode DYNAMIC.*not 3"),
        (dict(max_degree=0), ValueError, "max_degree must be at least 1, not 0"),
        (dict(max_degree=9), ValueError, "max_degree must be at most 8, not 9"),
        (dict(cost_model=None), TypeError, "cost_model must be of type CostModel, not None"),
    ],
)
def test_bad_overlap(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OverlapConfig(**options)


@pytest.mark.parametrize("dtype", ["bfloat16", None, ["input"]])
def test_bad_grad_wire_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"grad_wire_dtype must be one of 'float32', 'input', not"):
        DistAttnConfig(grad_wire_dtype=dtype)


def test_everything_is_part_of_the_key() -> None:
    """Keys are equal when configurations are, and ranks compare how those are spelled."""
    default = OverlapConfig()
    costs = default.cost_model
    models = [replace(costs, **{cost.name: 2 * (getattr(costs, cost.name) or 8)}) for cost in fields(CostModel)]
    others = [
        DistAttnConfig(grad_wire_dtype="input"),
        DistAttnConfig(overlap_config=OverlapConfig(AttnOverlapMode.DYNAMIC)),
        DistAttnConfig(overlap_config=replace(default, max_degree=3)),
        *(DistAttnConfig(overlap_config=replace(default, cost_model=model)) for model in models),
    ]
    for config in others:
        assert config != DistAttnConfig() and repr(config) != repr(DistAttnConfig())
        assert hash(config) != hash(DistAttnConfig())


def test_equal_numbers_are_spelled_alike() -> None:
    assert repr(CostModel(latency=0)) == repr(CostModel(latency=0.0)) == repr(CostModel(latency=np.float64(0)))
