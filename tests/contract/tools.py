"""What the suite shares: running any family, comparing, and recording everything that a patch may touch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from oracle import Evictor, float64_math, install, install_entropy, models, real_rows, replay, vlms
from oracle.core import Rule
from oracle.entropy import install_denoiser
from oracle.packing import Packed
from torch import Tensor, nn

from .cases import Case

CALLS = [14, 1, 1, 5, 1]  # prefill, steps, a turn of several tokens, a step: 22 tokens
LENGTHS = [22, 17, 13]  # the last row has 5 real tokens in the prefill
EXACT = 1e-11
# FLUX's own rotary code rounds to float32 on the way.
TOLERANCE = {"flux": 1e-7}


@torch.no_grad()
def build(family: str, **more: Any) -> Any:
    if family not in vlms.FAMILIES:
        return models.build(family, **more)
    model = vlms.build(family, **{"layers": 3, **more})
    key = f"{family} {sorted(more.items(), key=str)}"
    if key not in _planted:  # solved for once: a solver need not give the same bits twice
        vlms.plant(model, vlms.batch(model, family))
        _planted[key] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.copy_(_planted[key][name])
    return model


_planted: dict[str, dict[str, Tensor]] = {}
_reading: list[Rule] = []  # the rules of ``dense``; some have to be told which tokens are images


def _with_images(model: nn.Module, family: str, padded: bool) -> list[Tensor]:
    """A left-padded batch of rows with one image, two and none, or the first row alone; the usual calls."""
    given = vlms.batch(model, family)
    given = given if padded else vlms.row(model, given, 0)
    calls = [given.prompt, *CALLS[1:]]
    for rule in _reading:
        if hasattr(rule, "image"):
            rule.image = given.image
    found = vlms.replay(model, None, given, calls)
    return [a[r] for a, r in zip(found, vlms.real(given, calls), strict=True)]


def text(padded: bool = True) -> tuple[Tensor, Tensor | None]:
    """Ids and mask of a batch: left-padded rows, or one row without padding."""
    return models.left_padded(LENGTHS) if padded else (models.prompt(22), None)


def given_of(family: str, model: nn.Module, size: int = 20) -> dict[str, Tensor]:
    """Inputs of an encoder or denoiser, in the model's dtype; denoisers off their trained size."""
    if family in models.DENOISERS:
        given = models.inputs(family, height=12, width=size)
    elif family == "vit":
        given = models.inputs(family)
    else:
        given = models.inputs(family, length=size)
    dtype = next(model.parameters()).dtype
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()
    }


def wide(model: nn.Module) -> AbstractContextManager[None]:
    """For gemma2 in float64: its stock eager attention goes through float32, where the float64 mask is -inf
    and padded rows become NaN. All other families run without any help."""
    family = getattr(model.config, "model_type", "")
    exact = next(model.parameters()).dtype == torch.float64
    return float64_math() if family == "gemma2" and exact else nullcontext()


@torch.no_grad()
def outputs(model: nn.Module, family: str, padded: bool = True, calls: Sequence[int] = CALLS) -> list[Tensor]:
    """What the model says, real rows only, call by call."""
    if family in vlms.FAMILIES:
        return _with_images(model, family, padded)
    if family in models.CAUSAL:
        ids, mask = text(padded)
        with wide(model):
            found = replay(model, None, ids, mask, calls)
        return [a[r] for a, r in zip(found, real_rows(mask, calls, ids.shape[0]), strict=True)]
    given = given_of(family, model)
    out = model(**given)
    if family in models.DENOISERS:
        return [out[0]]
    tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return [tensor[given["attention_mask"].bool()] if family == "bert" else tensor]


def arranged(rules: Sequence[Rule]) -> list[Rule]:
    """The rules in the order that the oracle wants: what packs, told what evicts beside it, comes before that."""
    evictor = next((r for r in rules if isinstance(r, Evictor) and not isinstance(r, Packed)), None)
    packers = [r for r in rules if isinstance(r, Packed)]
    for packer in packers:
        packer.evictor = evictor
    # A rule that chooses tokens looks at logits that those before it have changed.
    plain = [r for r in rules if not isinstance(r, Evictor)]
    return [*plain, *packers, *(r for r in rules if r not in packers and r not in plain)]


@contextmanager
def dense(model: nn.Module, family: str, case: Case, more: Sequence[Rule] = ()) -> Iterator[Any]:
    """The stock model under the oracle's reading of the case."""
    if family not in models.DENOISERS:
        rules = [case.rule(), *more]
        if family in case.layers_of:
            rules[0].layers = set(case.layers_of[family])
        inside = vlms.decoder(model) if family in vlms.FAMILIES else None
        with install(model, arranged(rules), inside) as oracle:
            _reading[:] = rules
            try:
                yield oracle
            finally:
                _reading.clear()
        return
    if case.denoised is not None:
        found = case.denoised()
        # Most read the logits of a dense attention; another operator brings its own way to run the model.
        with getattr(found, "installed", install_denoiser)(model, found) as oracle:
            yield oracle
        return
    trained = (case.trained, case.trained) if case.trained else None
    with install_entropy(model, trained, scale=bool(case.trained)) as oracle:
        if not case.trained:
            temperature = case.parameters["temperature"]
            oracle.apply = lambda name, logits, image, words: logits / temperature
        yield oracle


def same(got: Sequence[Tensor], want: Sequence[Tensor], atol: float = 0.0) -> None:
    """Equal call by call; bitwise unless a tolerance is given."""
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        if atol == 0.0:
            assert torch.equal(a, b), f"call {number}: differs by {(a - b).abs().max():.2e}"
        else:
            assert a.shape == b.shape and (a - b).abs().max() <= atol, (
                f"call {number}: differs by {(a - b).abs().max():.2e}, more than {atol:.0e}"
            )


def differs(got: Sequence[Tensor], want: Sequence[Tensor], least: float = 1e-4) -> bool:
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) > least


class Snapshot:
    """Everything on a model that a patch could leave changed, held by reference and compared by identity."""

    def __init__(self, model: nn.Module):
        self.modules = {name: self._of(module) for name, module in model.named_modules()}
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        config = getattr(model, "config", None)
        self.config = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        self.classes = {
            cls: dict(vars(cls)) for m in model.modules() for cls in type(m).__mro__ if cls is not object
        }

    @staticmethod
    def _of(module: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {"": type(module)}
        for key, value in vars(module).items():
            # Hooks and the like are containers that stay; what is in them counts.
            inside = isinstance(value, dict) and key.startswith("_")
            found[key] = dict(value) if inside else value
        return found

    def check(self, model: nn.Module) -> None:
        """AssertionError naming the first thing that is not as it was."""
        now = Snapshot(model)
        assert list(now.modules) == list(self.modules)
        for name, before in self.modules.items():
            after = now.modules[name]
            assert list(after) == list(before), f"{name}: {set(after) ^ set(before) or 'order of vars'}"
            for key, value in before.items():
                _unchanged(f"{name}.{key}", value, after[key])
        assert list(now.state) == list(self.state)
        for key, value in self.state.items():
            assert torch.equal(now.state[key], value), f"{key} has other contents"
        assert now.config == self.config
        for cls, before in self.classes.items():
            for key, value in before.items():
                assert vars(cls).get(key) is value, f"class {cls.__name__}.{key} changed"
            assert set(vars(cls)) == set(before), f"class {cls.__name__}: {set(vars(cls)) ^ set(before)}"


def _unchanged(where: str, before: Any, after: Any) -> None:
    if isinstance(before, dict) and isinstance(after, dict) and before is not after:
        assert list(after) == list(before), f"{where}: {set(after) ^ set(before)}"
        for key, value in before.items():
            assert after[key] is value, f"{where}[{key!r}] was replaced"
    else:
        assert after is before, f"{where} was replaced"
