"""A small set of calls for NVIDIA's checkers of memory accesses and of races:

PYTHONPATH=. compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
PYTHONPATH=. compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

from dataclasses import replace

import numpy as np
import torch

from magi_attention.kernels.engine import ENGINES
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import Part
from magi_attention.testing.mask_zoo import named_masks

MASKS = ("causal", "varlen causal", "several intervals a row", "nothing")
SEQLEN = 203  # a multiple of nothing
HEAD_DIMS = (64, 64), (128, 128), (192, 192), (256, 256), (192, 128)


def main() -> None:
    """Every engine for this GPU, forward and backward, whole and in two parts of the keys."""
    for engine in ENGINES:
        for head_dim, head_dim_v in HEAD_DIMS:
            if engine.refusal(torch.device("cuda", 0), torch.bfloat16, head_dim, head_dim_v) is not None:
                continue
            for name in MASKS:
                bands = named_masks(SEQLEN)[name].bands
                sizes = (12, head_dim), (12, head_dim_v), (2, head_dim), (2, head_dim_v)
                q, dout, k, v = (torch.randn(SEQLEN, *x, dtype=torch.bfloat16, device="cuda") for x in sizes)
                params = AttnParams(head_dim**-0.5)
                schedule = engine.schedule(bands, SEQLEN, SEQLEN)
                part = Part(np.arange(SEQLEN) % 2 == 0, waits=np.zeros(SEQLEN, np.bool_))
                first = engine.schedule(bands, SEQLEN, SEQLEN, part)
                engine.forward(q, k, v, first, params, engine.forward(q, k, v, first, params))
                # Few programs, so that each takes several windows.
                engine.forward(q, k, v, schedule, replace(params, yields=True, sm_margin=130))
                out, lse, *_ = engine.forward(q, k, v, schedule, params)
                grads = engine.start_backward(out, dout, lse, torch.randn_like(lse), params, head_dim)
                engine.backward(grads, q, k, v, schedule, params, k.dtype)
                engine.finish_backward(grads, params, q.dtype)
                torch.cuda.synchronize()
                print(engine.name, head_dim, head_dim_v, name, flush=True)


if __name__ == "__main__":
    main()
