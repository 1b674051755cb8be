"""The hopper engine on a CPU: its own source, with something else in the place of Triton.

Triton's interpreter does not know Gluon. What stands for it here has what the engine uses and no more::

    engine            the engine's modules, loaded again with others in the place of Triton's
    device            what kernels do with the multiprocessor that they are on
    tensors           tensors, pointers, descriptors and shared memory, made of torch's tensors
    multiprocessor    barriers, asynchronous operations, and partitions that take turns as chance has it
"""

from .engine import EmulatedEngine

__all__ = ["EmulatedEngine"]
