"""Where the Triton kernels are tested: in the interpreter when it was asked for, else on the GPU."""

import os

import pytest
import torch
from triton import language
from triton.language import core
from triton.runtime import interpreter

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
assert DEVICE == "cpu" or torch.cuda.is_available(), "no GPU: run through test_triton.py"

_patch = getattr(interpreter, "_patch_lang", None)


def patch_once(fn):
    """The interpreter puts itself in Triton's place at every call of a function inside a kernel, a third of the time.

    Once for a launch and each module is enough: what it puts there is the same whatever function it is.
    """
    modules = [module for module in (language, core) if any(one is module for one in fn.__globals__.values())]
    already = not any(core.is_builtin(one) for one in (core.tensor.__add__, *(m.load for m in modules)))
    return interpreter._LangPatchScope() if already else _patch(fn)


if _patch is not None and hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def on_the_device():
    """Every tensor of a test is made there."""
    with torch.device(DEVICE):
        yield
