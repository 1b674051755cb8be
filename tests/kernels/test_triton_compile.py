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
    ("sm_80, 64", "forward_kernel MERGE"): (24, 0, 0, 0),
    ("sm_80, 128", "dq_kernel"): (8, 0, 0, 0),
    ("sm_80, 96, fp16, softcap, layered", "forward_kernel MERGE SOFTCAP LAYERED"): (28, 0, 0, 0),
    ("sm_80, 96, fp16, softcap, layered", "dq_kernel SOFTCAP LAYERED"): (548, 0, 0, 0),
    ("sm_80, 96, fp16, softcap, layered", "dkdv_kernel SOFTCAP LAYERED"): (68, 0, 0, 0),
    ("sm_90, 128", "dkdv_kernel"): (36, 24, 24, 56),
    ("sm_90, 256", "dq_kernel"): (12, 0, 0, 0),
    ("sm_90, 256", "dkdv_kernel"): (184, 0, 0, 0),
    ("sm_90, 136, fp16, one head a key head", "dkdv_kernel"): (252, 0, 0, 0),
    ("sm_90, 96, fp16, softcap, layered", "forward_kernel SOFTCAP LAYERED"): (4, 0, 0, 108),
    ("sm_90, 96, fp16, softcap, layered", "forward_kernel MERGE SOFTCAP LAYERED"): (16, 20, 0, 192),
    ("sm_90, 96, fp16, softcap, layered", "dq_kernel SOFTCAP LAYERED"): (48, 48, 0, 288),
    ("sm_90, 96, fp16, softcap, layered", "dkdv_kernel SOFTCAP LAYERED"): (2168, 2156, 2180, 2080),
}


@each_release
def test_kernels_compile_and_keep_to_the_registers(release: str, tmp_path: Path) -> None:
    check(compile_under(release, "triton", tmp_path), release, "triton", SPILLS)
