"""Shared settings of the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that downloads is a broken test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one per core; more threads only fight each other
