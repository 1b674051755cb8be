"""Compile the kernels that pack and add rows for a GPU that is not there, as the library launches them.

``python -m tests.comm.compile_row_kernels RELEASE CAPABILITY`` prints a line of JSON for each: how many instructions
access 16 bytes, and how many stores less.
"""

import json
import re
import sys

import torch
import triton

from magi_attention.comm import row_kernels
from magi_attention.comm.row_sums import RowSums
from tests.kernels.compile_kernels import compile_launches

BF16, FP32 = torch.bfloat16, torch.float32


def launch_all() -> None:
    """The way out, the order of the buffer, the way home, and what is added up there, from bf16 and from fp32."""
    rows = torch.zeros(64, dtype=torch.int32)
    qkv = torch.zeros(64, 3, 8, 128, dtype=BF16)
    by_head = torch.zeros(64, 8, 3 * 128, dtype=BF16)
    grads = torch.zeros(2, 64, 8, 128, dtype=FP32)
    wide, wide32 = torch.zeros(64, 2048, dtype=BF16), torch.zeros(64, 2048, dtype=FP32)
    row_kernels.pack_rows((qkv[:, 1], qkv[:, 2]), rows, wide)
    row_kernels.pack_rows((by_head[..., 128:256], by_head[..., 256:]), rows, wide)
    row_kernels.pack_rows((wide,), rows, wide)
    row_kernels.pack_rows(tuple(grads), None, wide)
    for matrix in (wide, wide32):
        row_kernels.add_rows(tuple(grads), matrix, RowSums(rows, rows, rows))


def main(release: str, capability: str) -> None:
    assert triton.__version__ == release, f"found Triton {triton.__version__}, and not {release}"
    with compile_launches("", int(capability)) as compiled:
        launch_all()
    kernels = row_kernels.pack_kernel, row_kernels.add_kernel
    binaries = [binary for kernel in kernels for binary in kernel.device_caches[0][0].values()]
    for binary, x in zip(binaries, compiled, strict=True):
        assert x.kernel == binary.metadata.name
        accesses = re.findall(r"\b(ld|st)\.global(\S*)", binary.asm["ptx"])
        wide = [kind for kind, size in accesses if size in (".v4.b32", ".v2.b64")]
        numbers = {
            "kernel": x.kernel,
            "wide_loads": wide.count("ld"),
            "wide_stores": wide.count("st"),
            "narrow_stores": [kind for kind, _ in accesses].count("st") - wide.count("st"),
            "spilled": x.spilled,
            "shared": x.shared,
            "complaints": x.complaints,
        }
        print(json.dumps(numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
