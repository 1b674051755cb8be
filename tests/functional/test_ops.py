"""The operators under torch.compile and the checks that torch has for operators."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from magi_attention.api import calc_attn, magi_attn_varlen_key
from magi_attention.functional import flex_flash_attn_func
from magi_attention.functional.ops import backward_op, forward_op

RANGES = torch.tensor([[0, 5], [5, 9]], dtype=torch.int32)
TYPES = torch.tensor([1, 0], dtype=torch.int32)
OPTIONS = (None, 9, 0.3, 2.0, False, 0, False, None)
WITH_MAX = (*OPTIONS[:-2], True, None)


def a_sink(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-1, 2, 4, dtype=dtype).requires_grad_()


def inputs(rows: int = 9, dtype: torch.dtype = torch.float64, head_dim_v: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (2, 8), (2, head_dim_v))
    return [torch.randn(rows, *shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def loss_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor,
    types: torch.Tensor | None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    out, lse = flex_flash_attn_func(q * 2, k, v, ranges, ranges, attn_type_map=types, softcap=3.0, sink=sink)
    return out.square().sum() + (lse.masked_fill(torch.isinf(lse), 0) * 0.5).sum()


def loss_with_sink(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor,
    ranges: torch.Tensor,
    types: torch.Tensor | None,
) -> torch.Tensor:
    """Also asks for the highest scores, which change nothing of the gradients."""
    out, lse, max_logits = flex_flash_attn_func(
        q * 2, k, v, ranges, ranges, attn_type_map=types, sink=sink * 2, return_max_logits=True
    )
    return out.square().sum() + lse.square().sum() * max_logits.sum()


def gradients(
    function: Callable[..., torch.Tensor],
    rows: int,
    ranges: torch.Tensor,
    types: torch.Tensor | None,
    *sink: torch.Tensor,
    head_dim_v: int = 8,
) -> list[torch.Tensor]:
    leaves = [*inputs(rows, head_dim_v=head_dim_v), *sink]
    loss = function(*leaves, ranges, types)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(backend: str) -> None:
    """Other lengths and other masks, too."""
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    for rows, ranges, types in ((9, RANGES, TYPES), (9, RANGES - 0, None), (12, RANGES + 2, TYPES)):
        ours, eager = gradients(compiled, rows, ranges, types), gradients(loss_of, rows, ranges, types)
        for actual, expected in zip(ours, eager, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_a_sink_and_highest_scores(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss_with_sink, fullgraph=True, backend=backend)
    for rows, ranges in ((9, RANGES), (12, RANGES + 2)):
        ours, eager = (gradients(f, rows, ranges, TYPES, a_sink()) for f in (compiled, loss_with_sink))
        assert len(ours) == 5
        for actual, expected in zip(ours, eager, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim_v", [3, 11])
def test_compiled_with_values_of_another_head_dim(head_dim_v: int) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss_with_sink, fullgraph=True, backend="aot_eager")
    functions = compiled, loss_with_sink
    ours, eager = (gradients(f, 9, RANGES, TYPES, a_sink(), head_dim_v=head_dim_v) for f in functions)
    for actual, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def loss_with_softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float, scale: float) -> torch.Tensor:
    return flex_flash_attn_func(q * 2, k, v, RANGES, RANGES, softcap=softcap, softmax_scale=scale)[0].square().sum()


def test_compiled_with_other_numbers() -> None:
    """Which torch.compile takes for variables from the second call on; also the head_dim, and with it the scale."""
    torch.compiler.reset()
    compiled = torch.compile(loss_with_softcap, fullgraph=True, backend="aot_eager")
    for softcap, scale in ((3.0, 0.5), (4.0, 0.5), (4.0, 0.25)):
        qkv = inputs(9)
        torch.testing.assert_close(compiled(*qkv, softcap, scale), loss_with_softcap(*qkv, softcap, scale))
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for head_dim in (8, 16):
        qkv = [x.detach().repeat(1, 1, head_dim // 8) for x in inputs(9)]
        torch.testing.assert_close(compiled(*qkv, RANGES, TYPES), loss_of(*qkv, RANGES, TYPES))


def test_a_mistake_in_a_compiled_call_is_the_same_error() -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"q_ranges\[1\].*out of bounds"):
        compiled(*inputs(8), RANGES, TYPES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("types", [TYPES, None], ids=["types", "all full"])
def test_forward_operator(dtype: torch.dtype, types: torch.Tensor | None) -> None:
    opcheck(forward_op, (*inputs(dtype=dtype), None, RANGES, RANGES, types, *OPTIONS))


@pytest.mark.parametrize("sink", [None, a_sink(torch.float32), a_sink(torch.bfloat16).detach()])
def test_forward_operator_with_a_sink_and_highest_scores(sink: torch.Tensor | None) -> None:
    opcheck(forward_op, (*inputs(dtype=torch.bfloat16), sink, RANGES, RANGES, TYPES, *WITH_MAX))


@pytest.mark.parametrize("sink", [None, a_sink().detach()], ids=["no sink", "sink"])
@pytest.mark.parametrize("missing", [None, 0, 1])
def test_backward_operator(missing: int | None, sink: torch.Tensor | None) -> None:
    q, k, v = (x.detach() for x in inputs())
    mask = RANGES, RANGES, TYPES
    out, lse, _ = forward_op(q, k, v, sink, *mask, *OPTIONS)
    grads = [None if n == missing else torch.ones_like(x) for n, x in enumerate((out, lse))]
    opcheck(backward_op, (*grads, out, lse, q, k, v, sink, *mask, *OPTIONS))


@pytest.mark.parametrize("head_dim_v", [3, 11])
def test_both_operators_with_values_of_another_head_dim(head_dim_v: int) -> None:
    mask = RANGES, RANGES, TYPES
    opcheck(forward_op, (*inputs(head_dim_v=head_dim_v), None, *mask, *OPTIONS))
    q, k, v = (x.detach() for x in inputs(head_dim_v=head_dim_v))
    out, lse, _ = forward_op(q, k, v, None, *mask, *OPTIONS)
    assert out.shape == (9, 4, head_dim_v)
    opcheck(backward_op, (torch.ones_like(out), None, out, lse, q, k, v, None, *mask, *OPTIONS))


def refuses_a_second_derivative(out: torch.Tensor, q: torch.Tensor) -> None:
    """Also where the gradient that comes in is a constant; but gradients themselves are no mistake."""
    for loss in (out.square().sum(), out.sum()):
        (dq,) = torch.autograd.grad(loss, q, create_graph=True)
        (loss + dq.detach().sum()).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="there is no second derivative of this attention"):
            dq.square().sum().backward()


def test_a_second_derivative_is_refused(local_group: dist.ProcessGroup) -> None:
    q, k, v = inputs()
    refuses_a_second_derivative(forward_op(q, k, v, None, RANGES, RANGES, TYPES, *OPTIONS)[0], q)
    key = magi_attn_varlen_key([0, len(q)], [0, len(q)], 0, 1, local_group)
    refuses_a_second_derivative(calc_attn(q, k, v, key)[0], q)


class Seen(TorchDispatchMode):
    """Which of our operators run, as seen by what decides on recomputation or counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "magi_attention":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_both_operators() -> None:
    with Seen() as seen:
        gradients(loss_of, 9, RANGES, TYPES)
    assert seen.names == ["magi_attention.flex_flash_attn.default", "magi_attention.flex_flash_attn_backward.default"]


def test_without_gradients() -> None:
    q, k, v = inputs()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not loss_of(q, k, v, RANGES, TYPES).requires_grad
    assert not loss_of(q.detach(), k.detach(), v.detach(), RANGES, TYPES).requires_grad
    assert loss_of(q.detach(), k.detach(), v, RANGES, TYPES).requires_grad
    assert loss_of(q.detach(), k.detach(), v.detach(), RANGES, TYPES, a_sink()).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_forward_mode_derivative_is_refused() -> None:
    q, k, v = (x.detach() for x in inputs())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss_of(torch.autograd.forward_ad.make_dual(q, q), k, v, RANGES, TYPES)
