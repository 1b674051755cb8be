"""Range tensors are read once, and again when they must be."""

import gc
import threading
import weakref

import pytest
import torch

from magi_attention.functional import flex_flash_attn_func, schedules


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The sizes of the tensors that are read from now on."""
    sizes: list[torch.Tensor] = []
    read = schedules._read

    def note(x: torch.Tensor):
        sizes.append(x.numel())
        return read(x)

    monkeypatch.setattr(schedules, "_read", note)
    return sizes


def slices() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[0, 5], [5, 9]], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)


def attend(ranges: torch.Tensor, types: torch.Tensor | None, rows: int = 9) -> torch.Tensor:
    q = torch.linspace(-1, 1, rows * 8).view(rows, 1, 8).requires_grad_()
    out, _ = flex_flash_attn_func(q, q, q, ranges, ranges, attn_type_map=types)
    out.sum().backward()
    return out.detach()


def test_a_training_loop_reads_its_ranges_once(reads: list[int]) -> None:
    ranges, types = slices()
    first = attend(ranges, types)
    assert sorted(reads) == [2, 4, 4]
    for _ in range(3):
        assert torch.equal(attend(ranges, types), first)
    assert len(reads) == 3


def test_equal_slices_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attend(*slices())
    before = schedules._compile.cache_info()
    attend(*slices())
    after = schedules._compile.cache_info()
    assert after.misses == before.misses and after.hits > before.hits


@pytest.mark.parametrize("which", ["ranges", "types"])
def test_what_is_written_in_place_is_seen(which: str) -> None:
    ranges, types = slices()
    before = attend(ranges, types)
    if which == "ranges":
        ranges[0, 1], ranges[1, 0] = 2, 2
    else:
        types[1] = 1
    assert not torch.equal(attend(ranges, types), before)


def test_a_tensor_that_moves_is_read_again(reads: list[int]) -> None:
    ranges, types = slices()
    attend(ranges, types)
    ranges.set_(torch.tensor([[0, 9]], dtype=torch.int32))
    attend(ranges, types[:1])
    assert reads == [4, 4, 2, 2, 2, 1]


def test_the_same_tensors_for_another_length(reads: list[int]) -> None:
    ranges, types = slices()
    assert len(attend(ranges, types)) == 9 and len(attend(ranges, types, rows=10)) == 10


def test_other_tensors_at_the_same_address(reads: list[int]) -> None:
    """As when a data loader frees its ranges and makes others."""
    for step in range(5):
        ranges = torch.tensor([[0, step + 1], [step + 1, 9]], dtype=torch.int32)
        out = attend(ranges, None)
        assert torch.allclose(out[: step + 1], attend(ranges.clone(), None)[: step + 1])
        del ranges
    assert len(reads) == 2 * 2 * 5


def test_inference_tensors_are_read_every_time(reads: list[int]) -> None:
    with torch.inference_mode():
        ranges, types = slices()
        q = torch.randn(9, 1, 8)
        before, _ = flex_flash_attn_func(q, q, q, ranges, ranges, attn_type_map=types)
        ranges[0, 1], ranges[1, 0] = 2, 2
        after, _ = flex_flash_attn_func(q, q, q, ranges, ranges, attn_type_map=types)
    assert len(reads) == 6 and not torch.equal(before, after)


def test_no_tensor_is_kept_and_no_more_masks_than_said() -> None:
    kept = []
    for n in range(2 * schedules.CAPACITY):
        ranges = torch.tensor([[0, n + 1]], dtype=torch.int32)
        attend(ranges, None, rows=n + 1)
        kept.append(weakref.ref(ranges))
    del ranges
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert len(schedules._snapshots._entries) == schedules.CAPACITY == schedules._compile.cache_info().maxsize


def test_threads() -> None:
    masks = [torch.tensor([[0, n], [n, 9]], dtype=torch.int32) for n in range(1, 8)]
    expected = [attend(ranges, None) for ranges in masks]
    wrong: list[int] = []

    def loop(seed: int) -> None:
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed)).tolist()
        wrong.extend(n for n in order * 5 if not torch.equal(attend(masks[n], None), expected[n]))

    threads = [threading.Thread(target=loop, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
