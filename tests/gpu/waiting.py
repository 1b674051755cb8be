"""Whether the host waits for a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    """Whatever makes the host wait for a GPU is an error inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, once in a process, that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
