"""A CUDA stream beside the one that computes, whose kernels are first to get the multiprocessors that become free."""

from functools import cache

import torch


@cache
def side_stream(computing: torch.cuda.Stream) -> torch.cuda.Stream:
    """The same one whenever it is asked for, so that all work beside ``computing`` shares the memory of one stream.

    The caching allocator knows a tensor on the stream that it was allocated on only. So what is read beside
    ``computing`` must be held until that has waited for it. What is allocated here may be read there after that: its
    memory goes to this stream again, whose work must begin behind ``computing`` next time.
    """
    return torch.cuda.Stream(computing.device, priority=computing.priority - 1)
