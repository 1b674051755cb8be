"""The hopper engine's kernels, compiled by each release of Triton for a GPU that is not there: they compile, they keep
to the registers, and nothing makes products of matrices wait.

``python -m tests.kernels.triton_releases hopper`` prints ``SPILLS``.
"""

from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.triton_releases import RELEASES, Numbers, check, compile_under, each_release

# Bytes that a thread may store to memory for want of registers.
SPILLS: Numbers = {
    ("128", "forward_kernel PART=0"): (0, 20, 32, 36),
    ("128", "backward_kernel ADDS_UP MEMBERS=3"): (0, 0, 0, 56),
    ("128", "backward_kernel MEMBERS=6"): (0, 0, 0, 144),
    ("64", "backward_kernel ADDS_UP MEMBERS=3"): (148, 152, 204, 396),
    ("64", "backward_kernel MEMBERS=6"): (160, 156, 216, 416),
    ("128, layered", "forward_kernel LAYERED PART=0"): (0, 20, 32, 36),
    ("128, layered", "backward_kernel ADDS_UP LAYERED MEMBERS=3"): (0, 0, 0, 68),
    ("128, fp16, group of 5, softcap", "forward_kernel SOFTCAP PART=0"): (20, 20, 28, 36),
    ("128, fp16, group of 5, softcap", "backward_kernel ADDS_UP SOFTCAP MEMBERS=1"): (124, 156, 140, 328),
    ("128, fp16, group of 5, softcap", "backward_kernel SOFTCAP MEMBERS=5"): (152, 176, 160, 456),
    ("128, sink", "forward_kernel PART=0"): (0, 20, 32, 36),
    ("128, parts, sink", "forward_kernel PART=1"): (28, 28, 40, 36),
    ("128, parts, sink", "forward_kernel PART=2"): (4, 24, 36, 40),
    ("64, fp16, softcap, layered, parts", "backward_kernel SOFTCAP LAYERED MEMBERS=6"): (1012, 1064, 1112, 1244),
    ("96, odd group, softcap, layered, parts", "forward_kernel SOFTCAP LAYERED PART=1"): (28, 28, 40, 36),
    ("96, odd group, softcap, layered, parts", "forward_kernel SOFTCAP LAYERED PART=2"): (0, 24, 36, 36),
    ("96, odd group, softcap, layered, parts", "backward_kernel SOFTCAP LAYERED MEMBERS=3"): (168, 180, 132, 356),
    ("256", "forward_kernel PART=0"): (16, 16, 80, 132),
    ("256", "wide_backward_kernel ADDS_UP MEMBERS=3"): (20, 32, 24, 28),
    ("256", "wide_backward_kernel MEMBERS=6"): (88, 80, 72, 80),
    ("192, fp16, odd group, softcap, layered", "forward_kernel SOFTCAP LAYERED PART=0"): (20, 20, 32, 68),
    ("192, fp16, odd group, softcap, layered", "wide_backward_kernel SOFTCAP LAYERED MEMBERS=3"): (96, 72, 44, 56),
    ("256, parts, sink", "forward_kernel PART=1"): (120, 152, 108, 160),
    ("256, parts, sink", "forward_kernel PART=2"): (88, 64, 68, 208),
    ("136, layered, parts", "forward_kernel LAYERED PART=1"): (28, 28, 40, 84),
    ("136, layered, parts", "forward_kernel LAYERED PART=2"): (28, 0, 40, 52),
    ("136, layered, parts", "wide_backward_kernel ADDS_UP LAYERED MEMBERS=3"): (16, 16, 12, 32),
    ("192 and 128", "forward_kernel PART=0"): (0, 20, 32, 88),
    ("192 and 128, parts, group of 6", "forward_kernel PART=1"): (12, 28, 40, 92),
    ("192 and 128, parts, group of 6", "forward_kernel PART=2"): (8, 28, 40, 92),
    ("256 and 128, fp16, softcap, layered", "forward_kernel SOFTCAP LAYERED PART=0"): (8, 8, 52, 120),
    ("256 and 128, fp16, softcap, layered", "wide_backward_kernel ADDS_UP SOFTCAP LAYERED MEMBERS=3"): (24, 24, 20, 0),
}

# How often a thread may access them in a loop over tiles that are whole.
IN_HOT_LOOPS: Numbers = {
    ("128", "forward_kernel PART=0"): (0, 0, 0, 0),
    ("128", "backward_kernel ADDS_UP MEMBERS=3"): (0, 0, 0, 18),
    ("128", "backward_kernel MEMBERS=6"): (0, 0, 0, 18),
    ("256", "forward_kernel PART=0"): (0, 0, 0, 0),
    ("256", "wide_backward_kernel ADDS_UP MEMBERS=3"): (0, 0, 0, 0),
    ("256", "wide_backward_kernel MEMBERS=6"): (0, 0, 0, 0),
    ("192, fp16, odd group, softcap, layered", "forward_kernel SOFTCAP LAYERED PART=0"): (0, 0, 0, 0),
    ("192, fp16, odd group, softcap, layered", "wide_backward_kernel SOFTCAP LAYERED MEMBERS=3"): (0, 0, 0, 1),
    ("256, parts, sink", "forward_kernel PART=2"): (0, 0, 0, 0),
    ("192 and 128", "forward_kernel PART=0"): (0, 0, 0, 0),
    ("192 and 128", "wide_backward_kernel MEMBERS=1"): (0, 0, 0, 0),
}


def products(case: str, kernel: str) -> tuple[int, int]:
    """Instructions of each consumer for a tile: each sums over 16."""
    if kernel.startswith("wide_backward_kernel"):
        return {"256": (48, 48), "192 and 128": (36, 32)}.get(case, (40, 36))
    if kernel.startswith("backward_kernel"):
        return 32, 32
    number = {"128": 16, "192, fp16, odd group, softcap, layered": 24}.get(case, 20)
    return number, number


@each_release
def test_kernels_compile_and_keep_to_the_registers(release: str, tmp_path: Path) -> None:
    compiled = compile_under(release, "hopper", tmp_path)
    check(compiled, release, "hopper", SPILLS)

    of_name = {(x.case, x.kernel): x for x in compiled}
    for (case, kernel), noted in IN_HOT_LOOPS.items():
        consumers = products(case, kernel)
        for number in set(consumers):
            loops = sorted(loop for loop in of_name[case, kernel].loops if loop[1] == number)
            # Of a consumer there are two, and the one that masks is longer.
            hot = loops[: consumers.count(number)]
            assert len(loops) >= 2 * len(hot) > 0, (case, kernel, loops)
            assert max(accesses for _, _, accesses in hot) <= noted[RELEASES.index(release)], (case, kernel, loops)

    values = defaultdict(set)
    for x in compiled:
        for name, on in x.switches.items():
            values[x.kernel.split()[0], name].add(on)
    assert values and all(len(seen) > 1 for seen in values.values()), f"not compiled with all values: {values}"
    assert values["forward_kernel", "PART"] == {0, 1, 2}
