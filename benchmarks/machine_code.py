"""What the Triton kernels are as machine code of a GPU, and what a call of them launches; needs no GPU.

    python benchmarks/machine_code.py            all kernels; writes benchmarks/results/machine-code-sm90.json
    python benchmarks/machine_code.py --only packed --check   exit 1 where a limit is broken; writes nothing

Every kernel is compiled for compute capability 9.0 (H100) with the shapes of an 8B Llama and bfloat16 unless its name
says otherwise, and its machine code is counted: registers, bytes of stack and instructions that spill, matrix
instructions, copies into shared memory, the instructions of its main loop. The loop's instructions are those of one
thread; *each* is how many a thread executes for every code (packed kernels) or for every pair of a query and a key
(16,384 of which a tile of 128 x 128 has), divided by what a thread's share of them is.

Launches are counted by running the host side of a call on the CPU with kernels that do nothing: every torch operator that
is no view is one launch on a GPU, and one that reads a value waits for the device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

RESULT = Path(__file__).parent / "results" / "machine-code-sm90.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FORM = "trainless.kernels.{}"
# What a pointer points to, by its name in the kernels, where a case says nothing else.
TYPES = {
    **dict.fromkeys("q k v new_k new_v keys_bf values_bf tail_k tail_v ek ev bias sinks out".split(), "bf16"),
    **dict.fromkeys("keys mask valid real".split(), "u8"),
    **dict.fromkeys(
        "lse logits scores part_out part_lse state total records found_worth near_turns far_turns".split(),
        "fp32",
    ),
    **dict.fromkeys(
        "packed age tickets positions free count limit recent never found_slot shifts partner".split(), "i32"
    ),
    **dict.fromkeys("key_step key_min value_step value_min value_root".split(), "u32"),
    **dict.fromkeys("key value".split(), "u16"),
    **dict.fromkeys("rows_of cols_of limits index spans lots".split(), "i64"),
}
PARAMETERS = ("key_step", "key_min", "value_step", "value_min", "value_root")
FLOATS = {"scale", "softcap", "hidden", "eps"}
ONES = {"q_d", "k_d", "v_d", "out_d"}  # strides along the width, which the launcher specialises
UNALIGNED = {
    "hkv",
    "r",
    "parts",
    "part",
    "clusters",
    "code_parts",
    "groups",
    "blocks",
    "runs",
    "share",
    "heads",
    "pieces",
}


@dataclass
class Case:
    """A kernel with its compile-time constants.

    per: codes or pairs that one iteration of the main loop handles, over all threads. limits: what must hold, by the
    name of a number, at most.
    """

    name: str
    module: str
    kernel: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    per: int = 0
    types: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    yield from packed_cases()
    yield from slot_cases()
    yield from old_packed_cases()
    masks = {
        "CAUSAL": True,
        "WINDOW": False,
        "CAP": False,
        "KEYS": False,
        "MASK": 0,
        "BIAS": False,
        "SINKS": False,
        "EXACT": False,
    }
    for mode, name in enumerate(("subset", "blocks", "spans")):
        sizes = {"BM": 64, "BN": 64, "BD": 128}
        yield Case(
            f"block_sparse, {name}",
            "block_sparse.triton",
            "_block_sparse",
            {**masks, **sizes, "MODE": mode},
            4,
            2,
            4096,
        )
    kept: dict[str, float] = {"spills": 0}
    for keys in (64,):
        tiles = {
            "CAUSAL": True, "SPANS": False, "SINKS": False, "TMA": True, "EXACT": False, "BT": 32, "TOGETHER": 4,
            "BN": keys, "BD": 128,
        }  # fmt: skip
        lists = dict.fromkeys(("entries", "counts", "wholes", "order"), "i32")
        types = dict.fromkeys("kv", f"tensordesc<bf16[1,1,{keys},128]>") | lists
        yield Case(
            f"block_sparse over lists, {keys} keys", "block_sparse.listed", "_tiles", tiles, 8, 3, 128 * keys, types, kept
        )  # fmt: skip
    for d in (64, 128):
        wide = {"FEATURE": 0, "KEYS": False, "EXACT": False, "BD": d, "BV": 64}
        sums, chunks = {"BN": 64, "WHOLE": True, "CLUSTER": 8}, {"BN": 32 if d == 64 else 16, "CUT": True}
        yield Case(f"linear, sums, width {d}", "linear.triton", "_reduce", {**wide, **sums}, limits=kept)
        yield Case(f"linear, apply, width {d}", "linear.triton", "_apply", {**wide, "BM": 64}, limits=kept)
        yield Case(
            f"linear, causal, width {d}", "linear.triton", "_causal", {**wide, **chunks}, 4 if d == 64 else 8, 2,
            limits=kept,
        )  # fmt: skip
    yield Case(
        "lse", "lse.triton", "_attention", {**masks, "BM": 64, "BN": 64, "BD": 128, "MODE": 0}, 4, 3, 4096
    )


def packed_cases() -> Iterator[Case]:
    from trainless.kernels.quant_kv import fixed_packed, fixed_triton

    for bits, d, share in ((4, 128, 4), (2, 128, 4), (8, 128, 4), (4, 64, 3), (4, 128, 16)):
        like = torch.zeros(1, 8, 1, d, dtype=torch.bfloat16)
        buffers = fixed_packed(like, like, k_bits=bits, v_bits=bits, group=64, groups=512, ring=192)
        plan = fixed_triton.plan(buffers, share)
        chosen = {n: plan[n] for n in ("BR", "BN", "BK", "BV", "BD", "BW", "BT")}
        constants = dict(
            D=d, DV=d, SIZE=64, KBITS=bits, VBITS=bits, KIND=fixed_triton.BF16, ASM=True, APPEND=True, VALID=False,
            REAL=False, SINKS=False, SCORES=False, CAP=False, **chosen,
        )  # fmt: skip
        limits = {"spills": 0, "int to float": 15} | ({"each": 4.0} if bits == 4 and share <= 8 else {})
        yield Case(
            f"packed_decode, {bits} bits, width {d}, {share} rows a head", "quant_kv.fixed_triton", "_packed_decode",
            constants, plan["num_warps"], plan["num_stages"], 2 * d * plan["BN"], limits=limits,
        )  # fmt: skip
    pack = {"D": 128, "DV": 128, "SIZE": 64, "KBITS": 4, "VBITS": 4, "BS": 64, "BK": 64, "BV": 64}
    types = dict.fromkeys(PARAMETERS, "bf16") | {"key": "u8", "value": "u8", "residual": "i32"}
    yield Case(
        "pack_group, 4 bits", "quant_kv.fixed_pack", "_pack", pack, 8, 3, types=types, limits={"spills": 0}
    )


def slot_cases() -> Iterator[Case]:
    of = {
        "D": 128,
        "DV": 128,
        "EXACT": False,
        "REAL": False,
        "SINKS": False,
        "CAP": False,
        "TURN": False,
        "NEAR": 256,
        "BR": 8,
        "BN": 64,
        "BD": 128,
        "BV": 128,
    }
    for logits in (True, False):
        name = "slot_decode, attend" + (", logits kept" if logits else "")
        types = {"keys": "bf16", "values": "bf16"}
        yield Case(
            name, "slots.triton", "_attend", {**of, "LOGITS": logits}, types=types, limits={"spills": 0}
        )
    rule = {"SCORE": 1, "GQA": 0, "SHARED": False, "NORMALISE": False, "REAL": False}
    rule |= {"TURN": False, "BN": 1024, "BB": 8}
    yield Case("slot_decode, settle", "slots.triton", "_settle", rule, limits={"spills": 0})
    turned = {**of, "LOGITS": True, "TURN": True, "BN": 32}
    yield Case(
        "slot_decode, attend, keys turned",
        "slots.triton",
        "_attend",
        turned,
        types=types,
        limits={"spills": 0},
    )
    rolled, drawn = rule | {"TURN": True}, rule | {"SCORE": 3}
    yield Case("slot_decode, settle, keys turned", "slots.triton", "_settle", rolled, limits={"spills": 0})
    types = {"found_worth": "fp64"}
    yield Case(
        "slot_decode, settle, drawn", "slots.triton", "_settle", drawn, types=types, limits={"spills": 0}
    )


def old_packed_cases() -> Iterator[Case]:
    for bits in (4, 2):
        wide = 128 * bits // 8
        constants = {
            "KBITS": bits, "VBITS": bits, "KPER": 8 // bits, "VPER": 8 // bits, "VALID": False,
            "EXACT": False, "ONE": True, "CAP": False,
            "BR": 16, "BN": 64, "BK": wide, "BV": wide,
        }  # fmt: skip
        types = {"key": "u8", "value": "u8", "out": "fp32", "spans": ""} | dict.fromkeys(PARAMETERS, "bf16")
        yield Case(
            f"packed_rows, {bits} bits",
            "quant_kv.triton",
            "_packed",
            constants,
            per=2 * 128 * 64,
            types=types,
        )


# ---------------------------------------------------------------- machine code

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)(.*)$")
LABEL = re.compile(r"^(\.L_x_\d+):")


def built(case: Case) -> tuple[Any, list[tuple[str, str]], list[tuple[int, int]], tuple[int, int]]:
    """(what Triton made, instructions, loops as (first, last), (registers, bytes of stack))."""
    kernel = getattr(import_module(FORM.format(case.module)), case.kernel)
    types, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in case.constants:
            types[name], constants[name] = "constexpr", case.constants[name]
        elif name in ONES:
            types[name], constants[name] = "constexpr", 1
        elif name in FLOATS:
            types[name] = "fp32"
        else:
            pointer = {**TYPES, **case.types}.get(name) or None
            described = pointer is not None and pointer.startswith("tensordesc")
            types[name] = "i32" if pointer is None else pointer if described else "*" + pointer
            if not described and (pointer is not None or name not in UNALIGNED):
                attributes[(place,)] = [["tt.divisibility", 16]]
    made = compile(
        ASTSource(kernel, types, constants, attributes), target=GPUTarget("cuda", 90, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        text = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file], capture_output=True, text=True, check=True
        ).stdout
        used = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", used.stdout + used.stderr)
    assert numbers is not None
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
    loops = []
    for last, (name, rest) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", rest) if name.startswith("BRA") else None
        if target is not None and labels.get(target[0], last + 1) <= last:
            loops.append((labels[target[0]], last))
    return made, instructions, loops, (int(numbers[1]), int(numbers[2]))


def counted(case: Case) -> dict[str, Any]:
    """One row of the table of kernels."""
    made, instructions, loops, (registers, stack) = built(case)
    names = Counter(name for name, _ in instructions)

    def several(*starts: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(starts))

    def matrix(first: int, last: int) -> int:
        return sum(name.startswith(("HMMA", "HGMMA")) for name, _ in instructions[first : last + 1])

    # Loops that hold no other; of those with the most matrix instructions the shortest, whose tiles have no mask.
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    main = max(inner, key=lambda loop: (matrix(*loop), loop[0] - loop[1]), default=None)
    if not any(matrix(*loop) for loop in inner):
        main = max(inner, key=lambda loop: loop[1] - loop[0], default=None)
    size = 0 if main is None else main[1] - main[0] + 1
    row = {
        "kernel": case.name,
        "warps": case.warps,
        "registers": registers,
        "spills": several("STL", "LDL"),
        "stack": stack,
        "shared memory": made.metadata.shared,
        "instructions": len(instructions),
        "main loop": size,
        "each": round(size / (case.per / (32 * case.warps)), 2) if case.per and size else "",
        "wgmma": several("HGMMA"),
        "mma": several("HMMA"),
        "TMA": several("UBLKCP", "UTMA"),
        "cp.async": several("LDGSTS"),
        "int to float": several("I2F"),
        "integer": several("IMAD", "IADD", "LEA", "VIADD", "LOP3", "SHF", "PRMT"),
        "select": several("FSEL", "SEL"),
        "exp": several("MUFU.EX2"),
        "barriers": several("BAR"),
    }
    broken = [f"{n} {row[n]} > {most}" for n, most in case.limits.items() if row[n] > most]
    return row | {"limits": "; ".join(broken) or ("kept" if case.limits else "")}


# ---------------------------------------------------------------- launches

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2", "_unique2"}
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "alias",
    "_local_scalar_dense",
    "new_empty_strided",
}


class Launches(TorchDispatchMode):
    """Counts operators that a GPU would have to run, and those that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.waits = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.waits += name in WAITS
        self.operators += not func.is_view and name not in FREE
        return func(*args, **(kwargs or {}))

    def stub(self) -> Any:
        """A kernel that only counts how often it is launched."""

        def run(*args: Any, **kwargs: Any) -> None:
            self.kernels += 1

        return type("Kernel", (), {"__getitem__": lambda kernel, grid: run})()


def calls() -> Iterator[tuple[str, str, Callable[[Any], Any]]]:
    """(name, module of the kernels, call given that module), with the registered operators taken off."""
    from trainless.kernels.block_sparse.patterns import Blocks, Spans, Subset
    from trainless.kernels.common import Terms
    from trainless.kernels.quant_kv import fixed_packed, quantise, raw
    from trainless.kernels.slots import SlotRule, SlotStep, fixed_slots
    from trainless.kernels.visibility import visibility

    def some(*shape: int) -> Tensor:
        return torch.randn(shape).to(torch.bfloat16)

    step = some(1, 32, 1, 128), some(1, 8, 1, 128), some(1, 8, 1, 128)
    buffers = fixed_packed(step[1], step[2], k_bits=4, v_bits=4, group=64, groups=16, ring=192)
    yield "packed_decode", "quant_kv.fixed_triton", lambda m: m.decode(*step, buffers, Terms(0.1))
    residual = torch.zeros(1, dtype=torch.int32)
    yield "pack_group", "quant_kv.fixed_pack", lambda m: m.pack_group(buffers, residual)
    scores = torch.zeros(1, 32, buffers.slots)
    yield (
        "packed_decode, with probabilities",
        "quant_kv.fixed_triton",
        lambda m: m.decode(*step, buffers, Terms(0.1), scores=scores),
    )
    held = some(1, 8, 256, 128)
    positions = torch.arange(256).expand(1, 8, 256)
    for name, score in (("oldest goes", None), ("scored", "sum")):
        extra = None if score is None else torch.zeros(1, 8, 256)
        slots = fixed_slots(held, held, positions, 257, age=torch.tensor([256]), limit=256, scores=extra)
        yield (
            f"slot_decode, {name}",
            "slots.triton",
            lambda m, s=slots, k=score: m.decode(SlotStep(*step, s, SlotRule(k), Terms(0.1))),
        )
    segments = [
        quantise(*(some(1, 8, 4, 64, 128) for _ in range(2)), 4, 4),
        raw(some(1, 8, 64, 128), some(1, 8, 64, 128)),
    ]
    yield (
        "packed_rows (dynamic cache)",
        "quant_kv.triton",
        lambda m: m.rows(step[0], segments, Terms(0.1), None, True),
    )
    q, k = some(1, 32, 512, 128), some(1, 8, 512, 128)
    seen, keep = visibility(None, causal=True, lq=512, lk=512), torch.rand(1, 512) < 0.5
    index = torch.arange(8).view(1, 1, 1, 8).expand(1, 1, 8, 8).contiguous()
    patterns = {
        "subset": Subset(keep, keep),
        "blocks": Blocks(index, 64),
        "spans": Spans(torch.full((32,), 128), 4),
    }
    again = {f"{name}, next layer": patterns[name] for name in ("blocks", "spans")}
    for name, pattern in {**patterns, **again}.items():
        yield (
            f"block_sparse, {name}",
            "block_sparse.triton block_sparse.listed",
            lambda m, p=pattern: m.block_sparse(q, k, k, p, visibility=seen, terms=Terms(0.1)),
        )
    x = some(1, 8, 4096, 64)
    for causal in (False, True):
        view = visibility(None, causal=causal, lq=4096, lk=4096)
        yield (
            "linear, causal" if causal else "linear",
            "linear.triton",
            lambda m, s=view: m.linear_attention(x, x, x, visibility=s, feature="elu", eps=1e-4),
        )


def launched() -> Iterator[dict[str, Any]]:
    """One row per call: kernels of ours, other operators, and how often the host waits."""
    for name, module, call in calls():
        forms, count = [import_module(FORM.format(m)) for m in module.split()], Launches()
        before = [dict(vars(form)) for form in forms]
        for form in forms:
            for known, value in list(vars(form).items()):
                if isinstance(value, triton.runtime.jit.JITFunction):
                    setattr(form, known, count.stub())
                elif isinstance(value, torch._library.custom_ops.CustomOpDef):
                    setattr(form, known, value._init_fn)  # so that what happens inside is counted
        try:
            with count:
                call(forms[0])
        finally:
            for form, held in zip(forms, before, strict=True):
                vars(form).update(held)
        yield {
            "call": name,
            "our launches": count.kernels,
            "other launches": count.operators,
            "waits": count.waits,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="kernels whose name begins so; writes nothing")
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is broken; writes nothing")
    given = parser.parse_args()
    found = []
    for case in cases():
        if case.name.startswith(tuple(given.only or [""])):
            found.append(counted(case))
            print(found[-1], flush=True)
    if given.check or given.only:
        sys.exit(any(row["limits"] not in ("", "kept") for row in found) if given.check else 0)
    calls_of = list(launched())
    print(*calls_of, sep="\n")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/machine_code.py"]),
        "versions": {n: version(n) for n in ("torch", "triton")},
    }
    RESULT.write_text(
        json.dumps({**facts, "kernels": found, "launches": calls_of}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
