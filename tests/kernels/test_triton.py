"""The Triton forms: all of them in the interpreter, compiled for a GPU that need not be there, never imported early."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainless.kernels import available
from trainless.kernels.dispatch import triton_reasons

HERE = Path(__file__).parent
FILES = ("triton_kernels.py", "triton_linear.py", "triton_decode.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def python(tmp_path, *arguments, **environment):
    """(exit code, output). Into a file: a pipe would stay open for as long as any grandchild lives."""
    path = tmp_path / "output.txt"
    with path.open("w") as output:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=HERE.parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=1500,
        )
    return done.returncode, path.read_text()


@needs_triton
@pytest.mark.slow
def test_every_kernel_runs_in_the_interpreter(tmp_path):
    """In a process of its own: the interpreter must be chosen before anything imports Triton."""
    code, output = python(
        tmp_path,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *(str(HERE / file) for file in FILES),
        TRITON_INTERPRET="1",
    )
    assert code == 0, output[-6000:]
    assert re.search(r"\b[1-9]\d+ passed", output), output[-300:]


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_runs_on_the_gpu(file, tmp_path):
    code, output = python(
        tmp_path,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE / file),
        TRITON_INTERPRET="0",
    )
    assert code == 0, output[-6000:]
    assert re.search(r"\b[1-9]\d+ passed", output), output[-300:]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from trainless.kernels.block_sparse.triton import _block_sparse
from trainless.kernels.column_mass.triton import _column_mass
from trainless.kernels.group_mass.triton import _group_mass
from trainless.kernels.linear.triton import _apply, _causal, _reduce, _sums_before
from trainless.kernels.lse.triton import _attention
from trainless.kernels.mass_move.triton import _mass_move
from trainless.kernels.window2d.triton import _window2d

pointers = {"q": "bf16", "k": "bf16", "v": "bf16", "old": "bf16", "new": "bf16", "bias": "bf16", "sinks": "bf16",
            "ek": "bf16", "ev": "bf16", "lse": "fp32", "keep": "fp32", "keys": "u8", "mask": "u8", "source": "u8",
            "index": "i64", "filled": "i64", "chosen": "i64", "state": "fp32", "total": "fp32",
            "rows_of": "i64", "cols_of": "i64", "limits": "i64", "spans": "i64",
            "mass": "fp32", "records": "fp32", "tickets": "i32", "given": "fp32", "parts": "fp32", "groups": "i32"}
flags = dict(CAUSAL=True, WINDOW=FULL, CAP=FULL, KEYS=True, MASK=int(FULL), BIAS=FULL, SINKS=FULL, EXACT=False,
             MODE=0, BM=64, BN=64, BD=64, DISC=FULL, TY=8, TX=8, FEATURE=2 * FULL, BV=64, GIVEN=FULL,
             COUNT=2, BG=2, CUT=True, WHOLE=True, CLUSTER=8, BS=32)
for kernel in KERNELS:
    types, constants = {}, {}
    for name in kernel.arg_names:
        if name.isupper():
            types[name], constants[name] = "constexpr", 32 if kernel is _causal and name == "BN" else flags[name]
        elif name == "out":
            types[name] = "*fp32" if kernel is _column_mass else "*bf16"
        elif name in pointers:
            types[name] = "*" + pointers[name]
        else:
            types[name] = "fp32" if name in ("scale", "softcap", "hidden", "limit", "eps") else "i64"
    made = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", CAPABILITY, 32))
    assert "cubin" in made.asm
    assert made.metadata.shared <= 100 * 1024, made.metadata.shared
    print("compiled", kernel.__name__)
"""


SMALL = ("_column_mass, _attention, _window2d, _causal, _mass_move, _block_sparse, _group_mass", False, 90)
FULL = ("_reduce, _apply, _sums_before", True, 80)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        (SMALL, FULL),
        pytest.param((("_column_mass, _attention, _window2d", True, 80),), marks=pytest.mark.grid),
    ],
    ids=["each-once", "full"],
)
def test_kernels_compile_for_a_gpu(sets, tmp_path):
    """To machine code, within the shared memory that every such GPU has; no GPU is needed for that.

    In one process, or most of the time would go into imports.
    """
    head, loop = COMPILE.split("flags =")
    source = head
    for kernels, full, capability in sets:
        part = f"flags ={loop}".replace("FULL", str(full)).replace("KERNELS", f"({kernels})")
        source += part.replace("CAPABILITY", str(capability))
    script = tmp_path / "compile_kernels.py"
    script.write_text(source)
    code, output = python(tmp_path, str(script), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert code == 0, output[-4000:]
    for kernels, _, _ in sets:
        for name in kernels.split(", "):
            assert f"compiled {name}\n" in output


@needs_triton
@pytest.mark.slow
def test_machine_code_keeps_its_limits(tmp_path):
    """No spills; of packed codes at most four instructions each and no conversions from integers."""
    script = HERE.parent.parent / "benchmarks" / "machine_code.py"
    only = ("packed_decode, 4 bits, width 128, 4", "slot_decode", "block_sparse over lists")
    code, output = python(tmp_path, str(script), "--only", *only, "--check", TRITON_CACHE_DIR=str(tmp_path))
    kept = [line for line in output.splitlines() if "'limits': 'kept'" in line]
    assert code == 0 and all(any(name in line for line in kept) for name in only), output[-3000:]


def test_importing_the_kernels_does_not_import_triton(tmp_path):
    # torch may do so itself; what counts is that ours adds nothing.
    code = (
        "import sys, torch, torch.library; before = {m for m in sys.modules if m.split('.')[0] == 'triton'}; "
        "import trainless.kernels.lse, trainless.kernels.column_mass, trainless.kernels.mass_move, "
        "trainless.kernels.group_mass, trainless.kernels.window2d, trainless.kernels.linear, "
        "trainless.kernels.block_sparse, trainless.kernels.quant_kv, trainless.kernels.slots; "
        "after = {m for m in sys.modules if m.split('.')[0] == 'triton'}; "
        "assert not any(m.endswith('.triton') for m in sys.modules if m.startswith('trainless.kernels')); "
        "print(len(before), len(after))"
    )
    failed, output = python(tmp_path, "-c", code)
    assert not failed, output
    before, after = output.split()[-2:]
    assert before == after


def test_a_cpu_tensor_is_told_why_not_triton():
    assert any("CUDA" in reason for reason in triton_reasons([torch.zeros(1)]))
    assert any("float64" in reason for reason in triton_reasons([torch.zeros(1, dtype=torch.float64)]))
    grown = torch.zeros(1, requires_grad=True)
    assert any("gradient" in reason for reason in triton_reasons([grown]))


def test_what_is_available_is_named_with_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = available()
    every = {
        "lse",
        "column_mass",
        "mass_move",
        "group_mass",
        "block_sparse",
        "quant_kv",
        "linear",
        "window2d",
    }
    assert set(found) == every
    assert found["lse"].name == "fused" and found["column_mass"].name == "blocked"
    assert found["mass_move"].reasons and "triton" in found["mass_move"].reasons[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if importlib.util.find_spec("triton") is not None:
        assert {c.name for c in available().values()} == {"triton"}
