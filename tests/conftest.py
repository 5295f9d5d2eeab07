"""Shared settings of the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that downloads is a broken test
