"""Shared settings of the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that downloads is a broken test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one per core; more threads only fight each other

import pytest


@pytest.fixture(autouse=True, scope="session")
def attention_is_compiled():
    """The C++ attention is there before the first test: what a test sees must not depend on how far a compiler is."""
    from backbones.ops.neighborhood import cpp_backend

    cpp_backend.unavailable()
