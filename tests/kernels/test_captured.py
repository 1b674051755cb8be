"""What a CUDA graph reads outlives the caches that it is in."""

import gc
import weakref

import pytest
import torch

from magi_attention.functional import schedules
from magi_attention.functional.schedules import MaskTensors, compile_mask
from magi_attention.kernels import captured, reference
from magi_attention.kernels.captured import keep_if_captured


class Schedule:
    """Something that can be watched."""


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "_kept", {})


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kept_while_a_graph_of_the_device_is_captured(
    capturing: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    schedule = Schedule()
    assert keep_if_captured(keep_if_captured(schedule, torch.device(device)), torch.device(device)) is schedule
    watched = weakref.ref(schedule)
    del schedule
    gc.collect()
    assert (watched() is not None) == (capturing and device == "cuda")
    assert len(captured._kept) == (capturing and device == "cuda")


@pytest.mark.parametrize("capturing", [False, True])
def test_a_captured_mask_outlives_others(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        schedules,
        "keep_if_captured",
        lambda x, device: keep_if_captured(x, torch.device("cuda") if capturing else device),
    )

    def compiled(n: int) -> schedules.CompiledMask:
        ranges = torch.tensor([[0, n]])
        return compile_mask(reference, MaskTensors(ranges, ranges, None, n, n))

    watched = weakref.ref(compiled(100))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for n in range(1, 40):
        compiled(n)
    gc.collect()
    assert (watched() is not None) == capturing
