"""A lazy schedule makes each walk once, from the side that is asked for."""

import pickle

import numpy as np
import torch

from magi_attention.kernels.lazy_schedule import LazySchedule, MaskView
from magi_attention.kernels.parts import Part
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import transpose

CPU = torch.device("cpu")
MASK = AttnMask.from_slices([(0, 20)], [(10, 30)], "causal", 20, 40)


def see(mask: MaskView, block_rows: int, block_cols: int, device: torch.device) -> list[object]:
    return [mask, block_rows, block_cols, device]


def see_otherwise(mask: MaskView, block_rows: int, block_cols: int, device: torch.device) -> list[object]:
    return [mask]


def make_schedule() -> LazySchedule:
    return LazySchedule(MASK.bands, 20, 40, Part(np.arange(20) < 5, np.arange(20) < 2))


def test_walks_see_the_mask_from_queries_or_from_keys() -> None:
    schedule = make_schedule()
    (bands, *sizes, part), *rest = schedule.by_queries(see, 16, 8, CPU)
    np.testing.assert_array_equal(bands, MASK.bands)
    assert part is schedule.part is not None
    assert (sizes, rest) == ([20, 40], [16, 8, CPU])

    (bands, *sizes, part), *rest = schedule.by_keys(see, 16, 8, CPU)
    np.testing.assert_array_equal(bands, transpose(MASK.bands))
    assert part is None, "of keys, all queries are there"
    assert (sizes, rest) == ([40, 20], [16, 8, CPU])


def test_walks_are_kept() -> None:
    schedule = make_schedule()
    ask = [
        lambda: schedule.by_queries(see, 16, 8, CPU),
        lambda: schedule.by_queries(see, 8, 16, CPU),
        lambda: schedule.by_queries(see, 16, 8, torch.device("meta")),
        lambda: schedule.by_queries(see_otherwise, 16, 8, CPU),
        lambda: schedule.by_keys(see, 16, 8, CPU),
    ]
    walks = [each() for each in ask]
    assert len({id(walk) for walk in walks}) == len(ask)
    assert all(each() is walk for each, walk in zip(ask, walks, strict=True))


def test_walks_are_not_pickled() -> None:
    schedule = make_schedule()
    size = len(pickle.dumps(schedule))
    schedule.by_queries(see, 16, 8, CPU)
    assert len(pickle.dumps(schedule)) == size
    again = pickle.loads(pickle.dumps(schedule))
    (bands, *sizes, part), *_ = again.by_queries(see, 16, 8, CPU)
    np.testing.assert_array_equal(bands, MASK.bands)
    np.testing.assert_array_equal(part.goes_on, np.arange(20) < 5)
    np.testing.assert_array_equal(part.waits, np.arange(20) < 2)
    assert sizes == [20, 40]
