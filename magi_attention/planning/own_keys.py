"""A rank's own keys in the backward pass: some at first, while the first rows come, the rest while the last go home.

Nothing else is there to compute when the pass begins, and when the gradients of the last stage are on their way. So the
work is shared out as the bytes are: keys and values travel in the type of the inputs, their gradients often in a wider
one.
"""

import numpy as np

from magi_attention.config import CostModel
from magi_attention.mask.bands import K0, IntArray, area, crop

WINDOW = 128
"""Many keys are cut where a kernel begins another window."""

KERNEL_END = 0.04
"""The share of a kernel's time that its end costs, when ever fewer multiprocessors have work. An estimate."""


def keeps_own_keys(rows: int, mean_area: float, model: CostModel, grad_bytes: int) -> bool:
    """Whether gradients take long enough to go home that a kernel more is worth while, of what all know alike.

    Args:
        rows: Rows that a rank receives or sends in all stages, on the rank with most.
        mean_area: Unmasked cells of a rank, on average: those with its own keys are fewer.
        model: What things cost.
        grad_bytes: Bytes of an element of a gradient on its way.
    """
    going_home = model.latency + 2 * rows * model.heads_kv * model.head_dim * grad_bytes / model.bandwidth
    computing = 10 * mean_area * model.heads_q * model.head_dim / (model.backward_tflops * 1e12)
    return rows > 0 and going_home > model.stage_overhead + KERNEL_END * computing


def share_before(model: CostModel, grad_bytes: int) -> float:
    """The share of the work of own keys that is done first; an element of a gradient travels in ``grad_bytes``."""
    return model.element_bytes / (model.element_bytes + grad_bytes)


def cut_own_keys(bands: IntArray, num_keys: int, share: float) -> int:
    """How many keys come first, so that about ``share`` of the unmasked cells are theirs.

    Args:
        bands: What a rank's queries attend among its own keys, ``(n, 6)``, see :mod:`magi_attention.mask.bands`.
        num_keys: Number of its keys.
        share: From 0 to 1.
    """
    step = WINDOW if num_keys > 8 * WINDOW else 1
    cuts = np.append(np.arange(0, num_keys, step), num_keys)
    pieces, between, _ = crop(bands, cuts[:-1], cuts[1:], K0)
    cells = np.bincount(between, area(pieces), len(cuts) - 1).cumsum()
    if not len(cells) or cells[-1] == 0:
        return 0
    return int(cuts[np.abs(np.append(0, cells) - share * cells[-1]).argmin()])
