"""The published names, where they stand, and what they take: a change here breaks somebody's training script."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from magi_attention.api import DistAttnConfig

REQUIRED = inspect.Parameter.empty


def spelled(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """Name, kind and default of every parameter, in order."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.description, p.default) for p in parameters]


class Interface:
    """The published signatures of `magi_attention.api.magi_attn_interface`."""

    @staticmethod
    def magi_attn_varlen_key(
        cu_seqlens_q, cu_seqlens_k, pad_size, chunk_size, cp_group=None, cp_mesh=None, causal=False,
        dist_attn_config=DistAttnConfig(),
        *, is_same_source=True, is_q_permutable=True, is_k_permutable=True, plan=None,
    ): ...  # fmt: skip

    @staticmethod
    def magi_attn_varlen_dispatch(
        x, cu_seqlens_q, cu_seqlens_k, pad_size, chunk_size, cp_group=None, cp_mesh=None, causal=False,
        dist_attn_config=DistAttnConfig(),
        *, is_same_source=True, is_q_permutable=True, is_k_permutable=True, plan=None,
    ): ...  # fmt: skip

    @staticmethod
    def magi_attn_flex_key(
        q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k, pad_size, chunk_size,
        cp_group=None, cp_mesh=None, dist_attn_config=DistAttnConfig(),
        is_same_source=True, is_q_permutable=True, is_k_permutable=True, *, plan=None,
    ): ...  # fmt: skip

    @staticmethod
    def magi_attn_flex_dispatch(
        x, q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k, pad_size, chunk_size,
        cp_group=None, cp_mesh=None, dist_attn_config=DistAttnConfig(),
        is_same_source=True, is_q_permutable=True, is_k_permutable=True, *, plan=None,
    ): ...  # fmt: skip

    @staticmethod
    def dispatch(x, key, *, side="q", grad="replicated"): ...

    @staticmethod
    def undispatch(x, key, *, side="q", grad="replicated"): ...

    @staticmethod
    def calc_attn(
        q, k, v, key, *, softmax_scale=None, softcap=0.0, deterministic=False, sm_margin=0, engine=None,
        sink=None, return_max_logits=False,
    ): ...  # fmt: skip

    @staticmethod
    def get_position_ids(key, *, side="q"): ...

    @staticmethod
    def get_most_recent_key(): ...


class Functools:
    """The published signatures of `magi_attention.api.functools`."""

    @staticmethod
    def compute_pad_size(total_seqlen_q, cp_size, chunk_size): ...


class Roll:
    """The signature in `magi_attention.api.roll`."""

    @staticmethod
    def roll(x, shift, dim, key): ...


class FlexFlashAttn:
    """The published signatures of `magi_attention.functional.flex_flash_attn`."""

    @staticmethod
    def flex_flash_attn_func(
        q, k, v, q_ranges, k_ranges, max_seqlen_q=None, max_seqlen_k=None, attn_type_map=None, softmax_scale=None,
        softcap=0.0, deterministic=False, sm_margin=0, disable_fwd_atomic_reduction=False, auto_range_merge=False,
        *, engine=None, sink=None, return_max_logits=False,
    ): ...  # fmt: skip


class NewMask:
    """Those of `magi_attention.api.new_mask`."""

    @staticmethod
    def make_varlen_key_for_new_mask_after_dispatch(
        cu_seqlens_q, cu_seqlens_k, key_for_dispatch, causal=False, window_size=(-1, -1), dist_attn_config=None,
        *, is_same_source=True, is_k_permutable=True, plan=None,
    ): ...  # fmt: skip

    @staticmethod
    def make_flex_key_for_new_mask_after_dispatch(
        q_ranges, k_ranges, attn_mask_type, key_for_dispatch, dist_attn_config=None,
        *, total_seqlen_k=None, is_same_source=True, is_k_permutable=True, plan=None,
    ): ...  # fmt: skip


PUBLISHED = [
    (module, name, getattr(signatures, name))
    for module, signatures in [
        ("magi_attention.api.magi_attn_interface", Interface),
        ("magi_attention.api.functools", Functools),
        ("magi_attention.api.new_mask", NewMask),
        ("magi_attention.api.roll", Roll),
        ("magi_attention.functional.flex_flash_attn", FlexFlashAttn),
    ]
    for name in vars(signatures)
    if not name.startswith("__")
]

HELPERS = [
    "apply_padding", "from_mask", "full_attention_to_varlen_attention", "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window", "infer_varlen_mask_from_batch", "init_hierarchical_mesh", "pad_at_dim",
    "squash_batch_dim", "unpad_at_dim",
]  # fmt: skip

TYPES = [
    "AttnMaskType", "AttnOverlapMode", "AttnRange", "AttnRanges", "CostModel", "DispatchConfig", "DistAttnConfig",
    "MinHeapDispatchAlg", "OverlapConfig", "UniformOverlapAlg",
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "published"), PUBLISHED, ids=lambda x: x if isinstance(x, str) else "")
def test_signature(module: str, name: str, published: Callable[..., Any]) -> None:
    function = getattr(importlib.import_module(module), name)
    assert spelled(function) == spelled(published)


@pytest.mark.parametrize(("module", "name", "published"), PUBLISHED, ids=lambda x: x if isinstance(x, str) else "")
def test_published_functions_are_documented_and_typed(module: str, name: str, published: Callable[..., Any]) -> None:
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function).parameters
    assert all(p.annotation is not REQUIRED for p in parameters.values())
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    docstring = inspect.getdoc(function)
    assert docstring
    assert all(f"{parameter}" in docstring for parameter in parameters), "a parameter is not described"


@pytest.mark.parametrize("name", [name for _, name, _ in PUBLISHED] + HELPERS + TYPES)
def test_api_re_exports(name: str) -> None:
    api = importlib.import_module("magi_attention.api")
    assert name in api.__all__
    assert hasattr(api, name)


@pytest.mark.parametrize(("module", "name", "published"), PUBLISHED, ids=lambda x: x if isinstance(x, str) else "")
def test_api_re_exports_the_same_function(module: str, name: str, published: Callable[..., Any]) -> None:
    api = importlib.import_module("magi_attention.api")
    assert getattr(api, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("infer_attn_mask_from_sliding_window", ["q_range", "k_range", "window_size"]),
        (
            "infer_attn_mask_from_cu_seqlens",
            ["cu_seqlens_q", "cu_seqlens_k", "causal", "window_size", "global_window_size"],
        ),
    ],
)
def test_helper_parameters(name: str, parameters: list[str]) -> None:
    api = importlib.import_module("magi_attention.api")
    assert list(inspect.signature(getattr(api, name)).parameters) == parameters


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("magi_attention.common", "AttnRange"),
        ("magi_attention.common", "AttnRanges"),
        ("magi_attention.common.enum", "AttnMaskType"),
        ("magi_attention.config", "DispatchConfig"),
        ("magi_attention.config", "DistAttnConfig"),
        ("magi_attention.config", "MinHeapDispatchAlg"),
        ("magi_attention.config", "OverlapConfig"),
        ("magi_attention.config", "UniformOverlapAlg"),
    ],
)
def test_a_type_is_one_object_under_all_its_names(module: str, name: str) -> None:
    api = importlib.import_module("magi_attention.api")
    assert getattr(importlib.import_module(module), name) is getattr(api, name)


def test_range_members() -> None:
    api = importlib.import_module("magi_attention.api")
    of_range = """start end seqlen from_range to_naive_range offset truncate intersect union diff_by is_subrange_of
        is_overlap_with is_empty"""
    of_ranges = """from_ranges from_cu_seqlens append extend sort merge is_sorted is_merged is_non_overlap to_cu_seqlens
        to_naive_ranges to_tensor make_range_local find_hole_ranges find_overlap_ranges intersect_size union_size
        total_seqlen max_seqlen start end size"""
    some_range = api.AttnRange(0, 4)
    some_ranges = api.AttnRanges.from_ranges([(0, 4), (4, 6)])
    assert [name for name in of_range.split() if not hasattr(some_range, name)] == []
    assert [name for name in of_ranges.split() if not hasattr(some_ranges, name)] == []


def test_version_has_one_source() -> None:
    from importlib.metadata import version

    import magi_attention

    assert version("magi-attention") == magi_attention.__version__
