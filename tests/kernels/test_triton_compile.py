"""The triton engine's kernels, compiled for GPUs that are not there: they compile, and they keep to the registers.

``python -m tests.kernels.triton_releases triton`` prints ``SPILLS``.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.triton_releases import Numbers, check, compile_under, each_release

# Bytes that a thread may store to memory for want of registers. Where there are some, all smaller tiles are slower on
# paper: more loads for each product. What later releases do not compile is 0.
SPILLS: Numbers = {
    ("sm_80, 64", "forward_kernel MERGE"): (28, 0, 0, 0),
    ("sm_80, 96, fp16, softcap, layered", "forward_kernel SOFTCAP LAYERED"): (4, 0, 0, 0),
    ("sm_80, 96, fp16, softcap, layered", "forward_kernel MERGE SOFTCAP LAYERED"): (24, 0, 0, 0),
    ("sm_80, 96, fp16, softcap, layered", "dq_kernel SOFTCAP LAYERED"): (544, 0, 0, 0),
    ("sm_80, 96, fp16, softcap, layered", "dkdv_kernel SOFTCAP LAYERED"): (100, 0, 0, 0),
    ("sm_90, 128", "dkdv_kernel"): (16, 4, 4, 36),
    ("sm_90, 256", "forward_kernel MERGE"): (12, 0, 0, 0),
    ("sm_90, 96, fp16, softcap, layered", "forward_kernel SOFTCAP LAYERED"): (8, 0, 0, 164),
    ("sm_90, 96, fp16, softcap, layered", "forward_kernel MERGE SOFTCAP LAYERED"): (16, 24, 0, 188),
    ("sm_90, 96, fp16, softcap, layered", "dq_kernel SOFTCAP LAYERED"): (48, 48, 0, 280),
    ("sm_90, 96, fp16, softcap, layered", "dkdv_kernel SOFTCAP LAYERED"): (2200, 2192, 2204, 1948),
}


@each_release
def test_kernels_compile_and_keep_to_the_registers(release: str, tmp_path: Path) -> None:
    check(compile_under(release, "triton", tmp_path), release, "triton", SPILLS)
