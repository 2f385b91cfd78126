"""Choosing attention heads by labelled examples: which heads answer better when only they are changed.

1. The accuracy of the model as it is. 2. A screen: one observed pass tells for every head and example
whether the method would change anything there. What it would not change needs no run, because a head's
statistics are those of the unpatched model as long as no earlier layer is changed. 3. Each remaining head
alone, on the examples where it changes something. 4. Heads that raise the accuracy are kept; ties are not.
5. All kept heads together, on the same examples and on held-out ones: heads that help alone need not help
together, and the result says so either way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..batch.items import ItemFaults
from ..batch.prompts import refuse
from ..errors import CalibrationError, InputError, Unsupported, did_you_mean
from ..patch import calibration
from ..patch.api import patched, patches_on
from ..patch.binding import bind
from ..patchers import Method, option, parameters_of
from ..recipes import Recipe, Use, Where
from ..recipes.typed import arms, hints_of
from ..recipes.values import build, values_of
from ._data import Data, DataOptions, read
from ._journal import ResumeJournal
from ._meter import Meter
from ._outcome import CalibrationOutcome
from ._scoring import Encoded, Scorer, encode
from .base import Calibration, Measurement, Session, Stopped, provenance

Head = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class HeadOptions(DataOptions):
    """How heads are chosen, beside the method's own parameters."""

    layers: str | int | list[int] | None = option(None, help="try only the heads of these layers")
    choice_token: Literal["first", "last"] = option(
        "first", help="judge a choice by the first token that differs, or by its last one as ACT's code does"
    )
    batch_size: int = option(8, help="examples at a time", low=1)


class HeadSelection(Measurement):
    """Base of measurements that choose heads for ``method_class``, a method with a ``heads`` parameter."""

    method_class: ClassVar[type[Method]]

    def __init__(self, options: Mapping[str, Any]):
        own = parameters_of(self.method_class)
        rest = {f.name: f for f in dataclasses.fields(HeadOptions)}
        for name in options:
            if name not in own and name not in rest:
                raise InputError(f"unknown option {name!r} of {self.name}{did_you_mean(name, [*own, *rest])}")
        self.method: Any = built(self.method_class, {k: v for k, v in options.items() if k in own})
        self.options = built(HeadOptions, {k: v for k, v in options.items() if k in rest})
        for name, value in (self.method.identity or {}).items():
            if getattr(self.method, name) == value:
                raise InputError(f"{name}={value!r}: this changes no head, so there is nothing to measure")

    @classmethod
    def option_table(cls) -> list[tuple[str, str]]:
        fields = [*parameters_of(cls.method_class).values(), *dataclasses.fields(HeadOptions)]
        return [(f"{f.name}={f.default!r}", str(f.metadata["help"])) for f in fields]

    @classmethod
    def is_text(cls, name: str) -> bool:
        hint = {**hints_of(cls.method_class), **hints_of(HeadOptions)}.get(name)
        return hint is Any or set(arms(hint)) <= {str, type(None)}

    @abstractmethod
    def watching(self, found: dict[int, Tensor]) -> Method:
        """The method as one that changes nothing and says where it would.

        It puts into ``found``, by layer, bool (B, h): the chosen heads that would be changed.
        """

    # ------------------------------------------------------------------ before weights

    def read(self, data: Any) -> None:
        self.data, self.held_out = read(data, self.options)

    def check(self, model: nn.Module) -> None:
        if patches_on(model):
            raise InputError("the model is patched; remove the patches, then calibrate it as it is")
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if output is None or getattr(model.config, "is_encoder_decoder", False):
            raise Unsupported(
                f"{self.name} chooses heads by the next token, and {type(model).__name__} is no decoder-only "
                "language model"
            )
        self.offered = self._offered(model)

    def encode(self, tokenizer: Any, positions: int | None, processor: Any = None) -> None:
        faults = ItemFaults()
        self.pad = tokenizer.pad_token_id or 0
        rule = self.options.choice_token
        self.examples = encode(self.data.examples, tokenizer, positions, rule, faults)
        held = self.held_out.examples if self.held_out is not None else []
        self.held_examples = encode(held, tokenizer, positions, rule, faults)
        refuse(faults)

    def _offered(self, model: nn.Module) -> list[Head]:
        """Every (layer, head) that may be chosen, in order; sets the shape of per-head results."""
        binding = bind(model, self._recipe(self.method, Where(layers=self.options.layers)))[1][0]
        offered: list[Head] = []
        for site, contributions in binding.contributions:
            for heads in {c.heads for c in contributions}:
                if heads is None and site.heads is None:
                    raise Unsupported(f"{site.name}: it does not say how many heads it has")
                offered += [(site.layer, h) for h in (range(site.heads or 0) if heads is None else heads)]
        sites = [site for site, _ in binding.contributions]
        self.shape = max(s.layers for s in sites), max(s.heads or 0 for s in sites)
        self.heads_of = {s.layer: sorted(h for layer, h in offered if layer == s.layer) for s in sites}
        return sorted(offered)

    # ------------------------------------------------------------------ the measurement

    def run(self, model: nn.Module, session: Session) -> Calibration:
        training = [name for name, module in model.named_modules() if module.training]
        if training:
            raise InputError("the model is in training mode, where dropout decides; call model.eval() first")
        self.check(model)
        self.session = session
        self.scorer = Scorer(model, self.examples, self.options.batch_size, self.pad)
        progress = session.out.with_name(session.out.name + ".progress") if session.out is not None else None
        with ResumeJournal(progress, self._settings(model)) as self.journal:
            margins = self._baseline()
            changed = self._screen(model)
            outcome = CalibrationOutcome(self.offered, self.shape, margins, changed)
            self._alone(model, outcome)
            if not outcome.kept:
                kept_at = f" The measurements are in {progress}." if progress is not None else ""
                raise CalibrationError(f"{outcome.nothing()}; nothing was saved.{kept_at}")
            joint = self._together(model, outcome.kept, "joint", self.scorer)
            outcome.joint = joint[1]
            if self.held_out is not None:
                scorer = Scorer(model, self.held_examples, self.options.batch_size, self.pad)
                outcome.held_out = self._together(model, outcome.kept, "held out", scorer)
            made = Calibration(
                self.name, model, outcome.tensors(), self._facts(model, outcome), outcome.summary(self.name)
            )
            if session.out is not None:
                made.save(session.out)
                self.journal.finish()
        return made

    def _baseline(self) -> list[float]:
        return self._per_example("as it is", "plain", lambda batch: self.scorer.margins(batch))

    def _screen(self, model: nn.Module) -> list[set[Head]]:
        """For each example the heads that the method would change."""
        found: dict[int, Tensor] = {}

        def observe(batch: Sequence[int]) -> list[str]:
            found.clear()
            self.scorer.margins(batch)
            rows = []
            for row in range(len(batch)):
                bits = {
                    (layer, head)
                    for layer, mask in found.items()
                    for head, on in zip(self.heads_of[layer], mask[row].tolist(), strict=True)
                    if on
                }
                rows.append(f"{sum(1 << i for i, head in enumerate(self.offered) if head in bits):x}")
            return rows

        recipe = self._recipe(self.watching(found), Where(layers=self.options.layers))
        with patched(model, recipe):
            codes = self._per_example("screen", "changes", observe)
        return [{h for i, h in enumerate(self.offered) if int(code, 16) >> i & 1} for code in codes]

    def _alone(self, model: nn.Module, outcome: CalibrationOutcome) -> None:
        """Fill in the margins of every head that the screen left, with only that head changed."""
        todo = outcome.candidates
        done = sum(f"head {h}" in self.journal for h in todo)
        with Meter("heads", len(todo), done, self.session.shown) as meter:
            for head in todo:
                key = f"head {head}"
                if key not in self.journal:
                    self._pause(f"{meter.done} of {len(todo)} heads are done")
                    numbers = outcome.examples_of(head)
                    with self._with_heads(model, [head]):
                        margins = {
                            i: m
                            for batch in self.scorer.batches(numbers)
                            for i, m in zip(batch, self.scorer.margins(batch), strict=True)
                        }
                    self.journal.add({key: [margins[i] for i in numbers]})
                    outcome.add(head, self.journal[key])
                    meter.add(1, f"{len(outcome.kept)} help")
                else:
                    outcome.add(head, self.journal[key])

    def _together(
        self, model: nn.Module, kept: Sequence[Head], name: str, scorer: Scorer
    ) -> tuple[list[float], list[float]]:
        """Margins of all examples of ``scorer``, without and with all kept heads."""
        was = self.scorer
        self.scorer = scorer
        try:
            plain = (
                self._baseline()
                if scorer is was
                else self._per_example(name, f"{name} plain", scorer.margins)
            )
            with self._with_heads(model, kept):
                return plain, self._per_example(f"{name}, together", name, scorer.margins)
        finally:
            self.scorer = was

    # ------------------------------------------------------------------ steps

    def _per_example(self, what: str, key: str, compute: Any) -> list[Any]:
        """``compute(batch of example numbers)`` for what the journal does not hold; one value per example."""
        total = len(self.scorer.examples)
        todo = [i for i in range(total) if f"{key} {i}" not in self.journal]
        with Meter(f"{what}: examples", total, total - len(todo), self.session.shown) as meter:
            for batch in self.scorer.batches(todo):
                self._pause(f"{what}: {meter.done} of {total} examples are done")
                values = compute(batch)
                self.journal.add({f"{key} {i}": value for i, value in zip(batch, values, strict=True)})
                meter.add(len(batch))
        return [self.journal[f"{key} {i}"] for i in range(total)]

    def _pause(self, state: str) -> None:
        if self.session.stop():
            raise Stopped(f"stopped; {state}; run the same command again to go on")

    @contextmanager
    def _with_heads(self, model: nn.Module, heads: Sequence[Head]) -> Iterator[None]:
        method = dataclasses.replace(self.method, heads=[list(h) for h in heads])
        with patched(model, self._recipe(method)):
            yield

    def _recipe(self, method: Method, where: Where | None = None) -> Recipe:
        return Recipe(method.name, [Use(method.name, method, where or Where())])

    # ------------------------------------------------------------------ provenance

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        """What decides the result. Batch size does not, up to rounding."""
        return {
            "measurement": self.name,
            "model": calibration.fingerprint(model),
            "dtype": str(next(model.parameters()).dtype),
            **values_of(self.method),
            "layers": self.options.layers,
            "choice_token": self.options.choice_token,
            "data": self.data.digest,
            "held_out": self.held_out.digest if self.held_out is not None else None,
            "tokens": _digest([*self.examples, *self.held_examples]),
        }

    def _facts(self, model: nn.Module, outcome: CalibrationOutcome) -> dict[str, Any]:
        parameters = values_of(self.method)
        parameters.pop("heads")
        how = values_of(self.options)
        source: Data | None = self.held_out
        return {
            **outcome.facts(),
            "parameters": parameters,
            "options": {
                k: how[k] for k in ("template", "choices", "label", "layers", "choice_token", "batch_size")
            },
            "data": self.data.facts(),
            "held_out_data": None if source is None else source.facts(),
            **provenance(model),
        }


def built(cls: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of options; InputError with every fault of ``values``."""
    faults: list[str] = []

    def fault(path: tuple[Any, ...], reason: str) -> None:
        faults.append(": ".join([".".join(map(str, path)), reason]) if path else reason)

    made = build(cls, values, fault)
    if made is None:
        raise InputError("\n".join(faults))
    return made


def _digest(examples: Sequence[Encoded]) -> str:
    return hashlib.sha256(json.dumps([e.content for e in examples]).encode()).hexdigest()[:32]
