"""Where the Triton kernels are tested: in the interpreter when it was asked for, else on the GPU."""

import os

import pytest
import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
assert DEVICE == "cpu" or torch.cuda.is_available(), "no GPU: run through test_triton.py"


@pytest.fixture(autouse=True)
def on_the_device():
    """Every tensor of a test is made there."""
    with torch.device(DEVICE):
        yield
