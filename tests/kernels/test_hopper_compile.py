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
    ("128", "forward_kernel"): (4, 24, 24, 0),
    ("128", "backward_kernel"): (272, 288, 260, 592),
    ("64", "backward_kernel"): (468, 480, 544, 736),
    ("128, layered", "forward_kernel LAYERED"): (4, 24, 24, 36),
    ("128, layered", "backward_kernel LAYERED"): (308, 308, 280, 600),
    ("128, fp16, odd group, softcap", "forward_kernel SOFTCAP"): (4, 24, 20, 0),
    ("128, fp16, odd group, softcap", "backward_kernel SOFTCAP"): (516, 540, 568, 876),
    ("128, parts", "backward_kernel"): (260, 280, 248, 576),
    ("64, fp16, softcap, layered, parts", "backward_kernel SOFTCAP LAYERED"): (1396, 1412, 1392, 1568),
    ("96, odd group, softcap, layered, parts", "backward_kernel SOFTCAP LAYERED"): (532, 520, 528, 800),
}

# How often a thread may access them in a loop over tiles that are whole.
IN_HOT_LOOPS: Numbers = {
    ("128", "forward_kernel"): (0, 0, 0, 0),
    ("128", "backward_kernel"): (0, 0, 0, 18),
}
PRODUCTS = {"forward_kernel": 16, "backward_kernel": 32}  # instructions a tile: each sums over 16


@each_release
def test_kernels_compile_and_keep_to_the_registers(release: str, tmp_path: Path) -> None:
    compiled = compile_under(release, "hopper", tmp_path)
    check(compiled, release, "hopper", SPILLS)

    of_name = {(x.case, x.kernel): x for x in compiled}
    for (case, kernel), noted in IN_HOT_LOOPS.items():
        loops = sorted(loop for loop in of_name[case, kernel].loops if loop[1] == PRODUCTS[kernel])
        # One of each consumer; those that mask are longer.
        accesses = [accesses for _, _, accesses in loops[:2]]
        assert len(loops) >= 4 and max(accesses) <= noted[RELEASES.index(release)], (case, kernel, loops)

    values = defaultdict(set)
    for x in compiled:
        for name, on in x.switches.items():
            values[x.kernel.split()[0], name].add(on)
    assert values and all(on == {False, True} for on in values.values()), f"not compiled with all values: {values}"
