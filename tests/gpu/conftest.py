"""Tests that need a GPU; skipped where there is none.

Most of the time goes into compiling kernels, in one process after the other unless pytest runs with ``-n 8``.
"""

import os

import pytest
import torch

from magi_attention.kernels.engine import ENGINES, Engine

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses deterministic algorithms


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine that there is for this GPU."""
    return request.param
