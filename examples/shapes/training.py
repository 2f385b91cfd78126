"""What both training scripts share: a loop that survives being killed, its checkpoints, averages and schedule.

Step ``s`` of a stage draws everything random from generators made of (seed, stage, s), so a checkpoint needs no
state of generators: a run that was killed and taken up again computes the numbers that it would have computed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


class Unusable(ValueError):
    """What a folder holds cannot be gone on with; says what to do."""


@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    steps: of the whole stage. rate: highest learning rate, reached after ``warmup`` steps; from there it falls
    to ``final`` of it along half a cosine. average: decay of the moving average of the weights, which is what
    the stage leaves behind.
    """

    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.01
    average: float = 0.999
    final: float = 0.01
    clip: float = 1.0

    def factor(self, progress: float, step: int) -> float:
        cosine = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return cosine * min(1.0, (step + 1) / max(self.warmup, 1))


class Stage:
    """One stage of a training: parameters of ``modules``, trained by ``plan``, kept in ``folder/NAME.pt``.

    minutes: time for the whole stage, earlier runs of it included; None: as long as the steps take. The rate
    follows the larger of (steps done of all) and (time gone of all), so a stage that runs out of time is still
    a finished one, with a low rate at its end. How many steps it made is in its checkpoint and in TRAINED.md.
    """

    def __init__(
        self, name: str, modules: nn.ModuleDict, plan: Plan, folder: Path, *,
        seed: int, minutes: float | None = None, save_every: float = 60.0, settings: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.name, self.modules, self.plan, self.seed = name, modules, plan, seed
        self.file = folder / f"{name}.pt"
        self.minutes, self.save_every = minutes, save_every
        self.settings = {**(settings or {}), "seed": seed, "steps": plan.steps}
        decayed = [p for p in modules.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in modules.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": plan.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98), eps=1e-8)
        self.average = {name: p.detach().clone() for name, p in modules.named_parameters() if p.requires_grad}
        self.step, self.seconds, self.last = 0, 0.0, dict[str, float]()

    # ------------------------------------------------------------ running

    def run(self, loss: Loss, before: Path | None = None) -> None:
        """Train to the end of the stage, from its checkpoint if there is one; leaves the averaged weights.

        loss: step -> (loss to minimise, numbers to show). before: what the next stage makes of this one; where it
        exists this stage is over, also if a run with more minutes would give it some of them. Raises Unusable
        when the checkpoint that ``before`` was made of is gone, or when there is no time for a single step.
        """
        self.restore()
        used = before is not None and before.exists()
        if used and not self.step:
            raise Unusable(
                f"{before} is there and {self.file}, which it was made with, is not; put that back, or delete both"
            )
        if not self.done and not used:
            self._train(loss)
        if not self.step:
            raise Unusable(
                f"no time is left for {self.name}: what comes before it took all of --minutes; give more, or none"
            )
        with torch.no_grad():
            for name, p in self.modules.named_parameters():
                if name in self.average:
                    p.copy_(self.average[name])
        self.modules.eval()

    @property
    def progress(self) -> float:
        if self.minutes is None:
            timed = 0.0
        else:  # of no time at all everything is gone
            timed = self.seconds / (60 * self.minutes) if self.minutes > 0 else 1.0
        return max(self.step / self.plan.steps, timed)

    @property
    def done(self) -> bool:
        return self.progress >= 1

    def _train(self, loss: Loss) -> None:
        self.modules.train()
        before, began = self.seconds, time.monotonic()
        saved = began
        bar = tqdm(total=self.plan.steps, initial=self.step, desc=self.name, dynamic_ncols=True)
        with bar:
            while not self.done:
                self._one(loss)
                now = time.monotonic()
                self.seconds = before + now - began
                bar.update()
                if self.step % 10 == 0 or self.done:
                    bar.set_postfix(
                        {**{k: f"{v:.4f}" for k, v in self.last.items()}, "done": f"{self.progress:.0%}"}
                    )
                if now - saved >= self.save_every or self.done:
                    self.save()
                    saved = time.monotonic()

    def _one(self, loss: Loss) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate * self.plan.factor(self.progress, self.step)
        value, shown = loss(self.step)
        if not torch.isfinite(value):
            raise RuntimeError(f"{self.name}: the loss is {value.item()} at step {self.step}; lower the rate")
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), self.plan.clip)
        self.optimiser.step()
        self.step += 1
        keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = {name: p for name, p in self.modules.named_parameters() if name in self.average}
            torch._foreach_lerp_(list(self.average.values()), [current[n] for n in self.average], 1 - keep)
        for name, number in {"loss": value.item(), **shown}.items():
            self.last[name] = 0.98 * self.last.get(name, number) + 0.02 * number

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the checkpoint beside the old one and put it in its place: a kill leaves one or the other."""
        write_atomically(
            self.file,
            {
                "modules": self.modules.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "last": self.last,
                "settings": self.settings,
            },
        )

    def restore(self) -> None:
        """Take up the checkpoint, if there is one. Raises Unusable when it was made with other settings."""
        found = self.kept()
        if found is None:
            return
        self.modules.load_state_dict(found["modules"])
        self.optimiser.load_state_dict(found["optimiser"])
        for name, tensor in self.average.items():
            tensor.copy_(found["average"][name])
        self.step, self.seconds, self.last = found["step"], found["seconds"], found["last"]

    def kept(self) -> dict[str, Any] | None:
        """The checkpoint, or None. Raises Unusable when it was made with other settings or cannot be read."""
        if not self.file.exists():
            return None
        found: dict[str, Any] = read(self.file)
        other = [k for k, v in self.settings.items() if found["settings"].get(k) != v]
        if other:
            said = ", ".join(f"{k} {found['settings'].get(k)!r}, now {self.settings[k]!r}" for k in other)
            raise Unusable(f"{self.file} was made with other settings ({said}); give those or another folder")
        return found

    def summary(self) -> dict[str, Any]:
        """What TRAINED.md says of this stage."""
        return {
            "steps": self.step,
            "of": self.plan.steps,
            "minutes": round(self.seconds / 60, 1),
            "seconds_per_step": round(self.seconds / max(self.step, 1), 3),
            "stopped_by": "steps" if self.step >= self.plan.steps else "time",
            **{name: round(value, 5) for name, value in self.last.items()},
        }


def write_atomically(file: Path, content: Any) -> None:
    """``torch.save`` that leaves the old file or the new one, whenever the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with new.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)


def read(file: Path, **options: Any) -> Any:
    """``torch.load``. Raises Unusable, which names the file, when it is damaged."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch raises whatever its readers raise
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> Unusable:
    why = type(error).__name__
    return Unusable(
        f"{file} is damaged ({why}); put it back from a copy, or delete it and lose what it holds"
    )


def check_export(folder: Path | None, scored: bool) -> None:
    """Before hours of training: the folder can be written, and what scoring needs can be imported."""
    if folder is None:
        return
    if scored:
        import evaluate  # noqa: F401 — scipy may be missing
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"--export {folder}: {error.strerror}; give a folder that can be written") from error


def minutes(text: str) -> float:
    """A time for argparse: any number over 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def noise_for(device: torch.device, *numbers: int) -> torch.Generator:
    """A torch generator that belongs to these numbers."""
    seed = zlib.crc32(repr(numbers).encode()) | (numbers[-1] & 0x7FFFFFFF) << 32
    return torch.Generator(device).manual_seed(seed)


def settle_type(asked: str, file: Path, device: torch.device, loss: Callable[[str], Tensor]) -> str:
    """The type to train in. "auto": whichever of both makes ``loss(type)`` and its backward pass faster here;
    it is measured once for a folder and kept in ``file``, since it changes the numbers."""
    if asked == "auto":
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(".new")
            new.write_text(json.dumps(_faster_type(loss)), encoding="utf-8")
            new.replace(file)
        try:
            asked = str(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise damaged(file, error) from error
    print(f"training in {asked} on {device}", file=sys.stderr)
    return asked


def _faster_type(loss: Callable[[str], Tensor]) -> str:
    times = {"float32": math.inf, "bfloat16": math.inf}
    for name in times:
        for number in range(3):  # the first call also pays for setting up
            began = time.perf_counter()
            value = loss(name)
            value.backward()
            value.item()
            if number:
                times[name] = min(times[name], time.perf_counter() - began)
    return min(times, key=lambda name: times[name])


def autocast(device: torch.device, name: str) -> torch.autocast:
    # A recorded graph may not use the cast weights of another step.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=name == "bfloat16", cache_enabled=device.type != "cuda"
    )


def recorded(module: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """``module``, in training and on a GPU a replay of one recording for inputs of these shapes and types.

    The networks here are so small that a GPU spends most of a step on waiting for the next launch.
    """
    if inputs[0].device.type != "cuda":
        return module
    made: nn.Module = torch.cuda.make_graphed_callables(module, inputs)
    return made


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def size_of(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def write_vocabulary(folder: Path, words: Sequence[str], knows: str) -> None:
    """closed_vocabulary.json: trainless holds prompts against it and says which words mean nothing to the model."""
    found = {"words": list(words), "knows": knows}
    (folder / "closed_vocabulary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_report(
    folder: Path, title: str, facts: dict[str, Any], stages: dict[str, dict[str, Any]], scores: dict[str, Any]
) -> None:
    """TRAINED.md for people and trained.json for programs, beside the weights."""
    (folder / "trained.json").write_text(
        json.dumps({**facts, "stages": stages, "scores": scores}, indent=2) + "\n", encoding="utf-8"
    )
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), "", "## Stages", ""]
    for name, stage in stages.items():
        lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in stage.items()))
    lines += ["", "## Scores", ""]
    for name, value in scores.items():
        lines.append(f"- {name}: {json.dumps(value)}")
    (folder / "TRAINED.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
