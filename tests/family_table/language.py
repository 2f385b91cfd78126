"""Every method on one tiny language model: patched, a prompt and a few steps, held against rules written out densely.

Where no such rule reaches (``plain``), the identity's bits, the padded batch and the change that was asked for are held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from contract.cases import ProbedZipCache, SeededZipVL
from oracle import (
    Act,
    AttnTemperature,
    HeadGain,
    KeyDiff,
    Knorm,
    KvQuant,
    KVzip,
    Random,
    Rule,
    SnapKV,
    Tova,
    XAttention,
    dense,
    install,
)
from oracle import decoder_zoo as zoo
from oracle.h2o import H2O
from oracle.streaming import Streaming
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import trainless
from trainless.patchers import known
from trainless.patchers.zipcache import ZipCache as ZipCacheMethod

from .outcomes import fault, one_line, passed, refused, said

TOLERANCE = 1e-5  # of the largest logit: stock models compute norms and rotary tables in float32
LOOSE = 1e-3
STEPS, FEW = 5, 2  # tokens of a row, and of a padded batch
ROW, SHORT = 24, 15


Given = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Try:
    """A method as it is tried. rule: the oracle's, from the sites that it acts on; cache: whether it touches what a
    cache holds; identity: parameters at which the stock bits come out."""

    given: dict[str, Any]
    identity: dict[str, Any]
    rule: Callable[[Sequence[Any]], Rule]
    cache: bool = True
    dense: dict[str, int] | None = None  # the same rule for caches that are not plain: tests/oracle/dense.py
    near: bool = False  # its result is near the stock one


def _gain(sites: Sequence[Any]) -> Rule:
    pairs = {(site.layer, head) for site in sites for head in range(site.heads)}  # one for both stacks
    return HeadGain(sorted(pairs), 0.5)


ACT: dict[str, Any] = {"beta": 0.3, "alpha": 1.5, "skip_layers": 0, "min_rows": 3}
ZIP: dict[str, Any] = {"interval": 3, "probes": (2, 0.3), "bits": (8, 8)}
ZIPVL: dict[str, Any] = {"tau": 0.7, "probes": (2, 3), "interval": 3, "min_tokens": 6}
QUANT: dict[str, Any] = {"k_bits": 8, "v_bits": 8, "group": 4, "residual": 4}
KEYS: dict[str, Any] = {"capacity": 12, "sinks": 2, "recent": 4}
BLOCKS: dict[str, Any] = {"threshold": 0.6, "stride": 2, "block": 4}
H2O_: dict[str, Any] = {"heavy": 4, "recent": 5}
TRIES: dict[str, Try] = {
    "act": Try(ACT, {"beta": 1.0}, lambda sites: Act(**ACT), cache=False),
    "attn_temperature": Try(
        {"temperature": 0.7}, {"temperature": 1.0}, lambda sites: AttnTemperature(0.7), cache=False
    ),
    "h2o": Try(
        H2O_, {"recent": 1 << 20}, lambda sites: H2O(**H2O_, reduce="call"), dense={"heavy": 4, "recent": 5}
    ),
    "head_gain": Try({"gain": 0.5}, {"gain": 1.0}, _gain, cache=False),
    "keydiff": Try(
        KEYS, {"capacity": 1 << 20}, lambda sites: KeyDiff(**KEYS)
    ),
    "knorm": Try(KEYS, {"capacity": 1 << 20}, lambda sites: Knorm(**KEYS)),
    "kvzip": Try({"ratio": 0.5, "sinks": 2}, {"ratio": 1.0}, lambda sites: KVzip(ratio=0.5, sinks=2)),
    "kvquant": Try(QUANT, {"k_bits": 16, "v_bits": 16}, lambda sites: KvQuant(**QUANT), near=True),
    "random": Try({"ratio": 0.5}, {"ratio": 1.0}, lambda sites: Random().shares(ratio=0.5)),
    "snapkv": Try(
        {"capacity": 9, "window": 4}, {"capacity": 1 << 20}, lambda sites: SnapKV(capacity=9, window=4)
    ),
    "streaming": Try(
        {"sinks": 2, "recent": 7}, {"recent": 1 << 20}, lambda sites: Streaming(recent=7, sinks=2),
        dense={"first": 2, "recent": 7},
    ),
    "tova": Try({"capacity": 9}, {"capacity": 1 << 20}, lambda sites: Tova(capacity=9)),
    "xattention": Try(
        BLOCKS, {"threshold": 1.0}, lambda sites: XAttention(**BLOCKS), cache=False
    ),
    "zipcache": Try(
        ZIP, {"bits": (16, 16)},
        lambda sites: ProbedZipCache(ZipCacheMethod(**ZIP), interval=3, bits=(8, 8)), near=True,
    ),
    "zipvl": Try(ZIPVL, {"tau": 1.0, "bits": (16, 16)}, lambda sites: SeededZipVL(**ZIPVL)),
}  # fmt: skip


def methods() -> list[str]:
    """Methods on language models, by name; those that have to see an image are not among them."""
    return sorted(name for name, cls in known().items() if "transformers" in cls.hosts and name != "var")


@dataclass
class Found:
    """outcomes by method; held: the methods that a dense rule was held against, all others by their identity."""

    outcomes: dict[str, str] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)


@dataclass
class Texts:
    """A model with what it does unpatched: on one row, and on a padded batch (None: it cannot)."""

    model: Any
    row: dict[str, Tensor]
    stock: Tensor
    batch: dict[str, Tensor]
    batched: Tensor | None
    oracle: bool  # whether attention written out densely gives the stock model's logits
    turned: bool  # the same of tests/oracle/dense.py


def texts(model: Any, given: Given = lambda model, batch: batch) -> Texts:
    """Raises whatever the stock model raises."""
    row, short = given(model, zoo.padded(zoo.prompt(ROW))), given(model, zoo.padded(zoo.prompt(SHORT, 2)))
    batch = given(model, zoo.padded(zoo.prompt(ROW), zoo.prompt(SHORT, 2)))
    stock = logits(model, row)
    if not bool(torch.isfinite(stock).all()):
        raise ArithmeticError("its logits are not finite")
    if not torch.equal(logits(model, row), stock):
        raise ArithmeticError("two calls differ")
    try:
        batched: Tensor | None = logits(model, batch, FEW)
        alone = max(off(batched[:1], stock[:, :FEW]), off(batched[1:], logits(model, short, FEW)))
        batched = batched if alone < LOOSE else None
    except Exception:  # a stock model that takes no padding, or whose rows change by it
        batched = None
    found = Texts(model, row, stock, batch, batched, False, False)
    found.oracle = _reproduces(found, lambda: install(model))
    found.turned = _reproduces(found, lambda: dense.ruled(model, {}), plain=False)
    return found


def _reproduces(t: Texts, ruled: Callable[[], Any], plain: bool = True) -> bool:
    try:
        with ruled():
            return (
                off(logits(t.model, t.row, cache=forgetful(t.model) if plain else None), t.stock) < TOLERANCE
            )
    except Exception:  # arguments that it does not know, other dtypes, caches of another kind
        return False


def forgetful(model: Any) -> Any:
    """For the oracle: a cache that keeps everything, in layers with windows as well; None where others are needed."""
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception:  # a config of which no cache can be made; the model then makes its own
        return None
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    if getattr(model.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache()


def logits(model: Any, batch: dict[str, Tensor], tokens: int = STEPS, cache: Any = None) -> Tensor:
    """What the model says, (rows, steps, values): its logits for ``tokens`` tokens, or what RUNS makes of it."""
    run = RUNS.get(type(model).__name__)
    return (generated if run is None else run.by)(model, batch, tokens, cache)


def generated(model: Any, batch: dict[str, Tensor], tokens: int, cache: Any) -> Tensor:
    given = dict(batch) if cache is None else {**batch, "past_key_values": cache}
    if model.generation_config.pad_token_id != 0:
        given["pad_token_id"] = 0
    with torch.no_grad():
        found = model.generate(
            **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return torch.stack(found.logits, 1)


def _acted(model: Any, batch: dict[str, Tensor], tokens: int, cache: Any) -> Tensor:
    """Of a model of actions: all of them as one step."""
    return model.sample_actions(**batch).flatten(1)[:, None]


def _painted(model: Any, batch: dict[str, Tensor], tokens: int, cache: Any) -> Tensor:
    """Of a model that denoises blocks of text: the logits of one step, those of all places together."""
    with torch.no_grad():
        return model(**batch).logits.flatten(1)[:, None]


def _by_its_text(model: Any, batch: dict[str, Tensor], tokens: int, cache: Any) -> Tensor:
    return generated(model.language_model, batch, tokens, cache)


@dataclass(frozen=True)
class Run:
    """Of a class that is not run by its own ``generate``. how: for a reader of the table; {error}: what that raises."""

    how: str
    by: Callable[[Any, dict[str, Tensor], int, Any], Tensor]


RUNS = {
    "DiffusionGemmaForBlockDiffusion": Run("by one denoising step behind a prompt", _painted),
    "Llama4ForConditionalGeneration": Run(
        "by its text model's `generate`; its own raises {error}", _by_its_text
    ),
    "PI0ForConditionalGeneration": Run("by `sample_actions`", _acted),
}


def _how(model: Any, batch: dict[str, Tensor]) -> dict[str, str]:
    run = RUNS.get(type(model).__name__)
    if run is None or "{error}" not in run.how:
        return {} if run is None else {"run": run.how}
    try:
        generated(model, batch, FEW, None)
    except Exception as error:
        return {"run": run.how.format(error=said(error))}
    raise AssertionError(f"{type(model).__name__} runs by its own generate: take it out of RUNS")


def off(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest logit, up to the first token that is another; inf for no number."""
    worst = 0.0
    for a, b in zip(got[0], want[0], strict=True):
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
        if a.argmax() != b.argmax():
            break
    return worst


def line_of(
    kind: str, build: Callable[..., Any], inputs: Given = lambda model, batch: batch, **given: Any
) -> dict[str, Any]:
    """The line of a model type; every value is text. ``build`` raises ValueError where nothing small can be made.
    ``inputs``: a model and a batch of prompts -> what its ``generate`` is given.

    A float64 model if it runs as one: some compute in float32 whatever they are given.
    """
    why = ""
    for dtype in (torch.float64, torch.float32):
        try:
            model = build(kind, dtype=dtype, **given)
        except ValueError as error:
            return {"family": kind, "not built": one_line(str(error).removeprefix(f"{kind}: "), 200)}
        try:
            found = found_on(model, inputs=inputs)
        except Exception as error:  # what the stock model raises
            why = one_line(f"it does not run: {type(error).__name__}: {error}", 200)
            continue
        loose = [
            m for m, said in found.outcomes.items() if m not in found.held and not said.startswith("refused")
        ]
        return {
            "family": kind,
            "class": type(model).__name__,
            **_how(model, inputs(model, zoo.padded(zoo.prompt(ROW)))),
            "methods": found.outcomes,
            "by identity": loose,
        }
    return {"family": kind, "not built": why}


def found_on(
    model: Any, only: Sequence[str] | None = None, inputs: Given = lambda model, batch: batch
) -> Found:
    t, found = texts(model, inputs), Found()
    for method in methods() if only is None else only:
        found.outcomes[method] = _outcome(t, method, found.held)
    if not torch.equal(logits(t.model, t.row), t.stock):
        found.outcomes = dict.fromkeys(found.outcomes, fault("after removal the model is another"))
    return found


def _outcome(t: Texts, method: str, held: list[str]) -> str:
    tried = TRIES.get(method)
    if tried is None:
        return "not built: no parameters are said for it in tests/family_table/language.py"
    try:
        patch = trainless.patch(t.model, method, **tried.given)
    except trainless.TrainlessError as error:
        return refused(method, error)
    except Exception as error:
        return fault(f"patching raised {said(error)}")
    binding = patch.bindings[0]
    sites = [site for site, _ in binding.contributions]
    try:
        got = logits(t.model, t.row)
        if t.batched is not None:
            logits(t.model, t.batch, FEW)
        report = patch.report().methods[0]
    except Exception as error:
        return fault(f"accepted when patching; the call raised {said(error)}")
    finally:
        patch.remove()
    wrong = _wrong(t, tried, got, report, sites, method, held)
    return fault(wrong) if wrong else passed(binding.skipped, binding.candidates)


def _wrong(
    t: Texts, tried: Try, got: Tensor, report: Any, sites: list[Any], method: str, held: list[str]
) -> str:
    """What does not hold, or ""."""
    if not report.fired or not report.acted:
        return f"it did nothing: fired {report.fired}, acted {report.acted}"
    if not bool(torch.isfinite(got).all()) or torch.equal(got, t.stock):
        return "its logits are the stock model's, or not finite"
    with trainless.patched(t.model, method, **{**tried.given, **tried.identity}):
        given, stock = (t.row, t.stock) if t.batched is None else (t.batch, t.batched)
        if not torch.equal(logits(t.model, given, stock.shape[1]), stock):
            return "at its identity the bits are others"
    want = _ruled(t, tried, sites)
    if want is None:
        far = tried.near and (got[:, :2] - t.stock[:, :2]).abs().max() > 0.1 * t.stock.abs().max()
        return "at 8 bits it is far from the stock model" if far else ""
    held.append(method)
    distance = off(got, want)
    return "" if distance < TOLERANCE else f"off by {distance:.1e} from its dense rule"


def _ruled(t: Texts, tried: Try, sites: list[Any]) -> Tensor | None:
    """The logits by the rule written out densely, or None where it does not reach."""
    plain = all(
        site.facts["keys"] == "same" and site.facts["calls"] == 1 and not site.facts["borrows"]
        for site in sites
    )
    numbered = all(site.layer == getattr(site.module, "layer_idx", None) for site in sites)
    if t.oracle and numbered and (plain or not tried.cache):
        rule, names = tried.rule(sites), {site.name for site in sites}
        with _applied(rule, names), install(t.model, rule) as oracle:
            oracle.whole = True
            return logits(t.model, t.row, cache=forgetful(t.model))
    if t.turned and tried.dense is not None:
        rules = {
            s.name: dense.Rule(
                heads=s.facts["cache_shape"][0], tiled=s.facts["keys"] == "tiled", **tried.dense
            )
            for s in sites
        }
        with dense.ruled(t.model, rules):
            return logits(t.model, t.row)
    return None


@contextlib.contextmanager
def _applied(rule: Rule, names: set[str]) -> Iterator[None]:
    """The rule acts on the layers of these names and on no other."""
    rule.applies = lambda site: site.name in names  # type: ignore[method-assign]
    yield
