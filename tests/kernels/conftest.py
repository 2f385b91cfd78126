"""This folder must stay without ``__init__.py``: as a package it would pose as Hugging Face's ``kernels``."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN, so that an output nobody wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
