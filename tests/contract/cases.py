"""The table: what each method claims, in the form that the suite checks. A method without a row fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from methods.publications import contract_weights
from oracle import (
    H2O,
    Act,
    AttnTemperature,
    Clear,
    HeadGain,
    KeyDiff,
    Knorm,
    KvQuant,
    KVzip,
    Random,
    Rule,
    Scheduled,
    SnapKV,
    Streaming,
    Tova,
    Var,
    XAttention,
    ZipCache,
    ZipVL,
    models,
    vlms,
)
from oracle.entropy import DenoiserOracle

from trainless.patchers.zipcache import ZipCache as ZipCacheMethod
from trainless.patchers.zipvl import ZipVL as ZipVLMethod

CAUSAL, ENCODERS, DENOISERS = models.CAUSAL, models.ENCODERS, models.DENOISERS
FULL = models.FULL_ATTENTION
VLMS = ("qwen2_5_vl", "llava", "gemma3", "idefics3", "paligemma")
# gemma2 has a full layer between two sliding ones; in mistral all slide.
EVICTABLE = (*FULL, "gemma2")


# Methods that act in the same way and differ in their rule alone: tokens by another score, a factor elsewhere.
LIKE = dict.fromkeys(("streaming", "tova", "keydiff", "knorm"), "h2o") | {"head_gain": "attn_temperature"}


@dataclass(frozen=True)
class Case:
    """One parameter set of a method.

    rule: the oracle's rule (language models), or a logit factor by name (``temperature``, ``entropy``) on
    denoisers. identity: parameters at which it is bitwise nothing, known before the call (inert);
    wide: parameters at which it watches and still changes nothing. layers: the layers that it acts on, of
    the three; by family where that differs. neighbours: two uses that compose with it, on the first family.
    chunks, assisted: what a prefill in chunks does, and a draft that is rejected in part.
    """

    label: str
    method: str
    parameters: Mapping[str, Any]
    rule: Callable[[], Rule]
    families: Sequence[str]
    identity: Mapping[str, Any] | None  # None: there is none
    wide: Mapping[str, Any] | None = None
    layers: Sequence[int] = (0, 1, 2)
    layers_of: Mapping[str, Sequence[int]] = field(default_factory=dict)
    neighbours: Sequence[Mapping[str, Any]] = ()
    neighbour_rules: Callable[[], list[Rule]] = list
    clashes: Sequence[tuple[str, Mapping[str, Any], str]] = ()  # (method, parameters, seam)
    evicts: bool = False
    pattern: bool = False  # its prefill leaves tokens out, and what the cache keeps has no budget
    protects: bool = False  # what was given stays, on top of the budget
    once: bool = False  # evicts after the first prefill alone, and grows from there
    chunks: str = "same"
    assisted: str = "same"  # or "refused", when drafts are rejected in part
    main: bool = False  # the one that stands for its method in the long tests
    trained: int = 0  # entropy: pixels
    # The oracle's reading on denoisers, where it is another: the oracle, and processors that it brings.
    denoised: Callable[[], DenoiserOracle] | None = None
    replaces: bool = False  # weights, so that saving is refused while it is on
    sites: int | None = None  # of a denoiser, where it acts on some of them only
    late: bool = False  # that the identity is one is found out at the call: the grid's size decides

    @property
    def use(self) -> dict[str, Any]:
        return {"use": self.method, "with": dict(self.parameters)}

    @property
    def kinds(self) -> list[Any]:
        """What tests tell cases apart by: the method, and what it does to a cache and to calls."""
        cache = self.evicts, self.pattern, self.protects, self.once, self.parameters.get("positions")
        return [self.method, cache, self.chunks, self.assisted, self.replaces, self.late]

    @property
    def ways(self) -> list[Any]:
        """What tests of the mechanism tell cases apart by: how they act, whatever the method's rule."""
        return [LIKE.get(self.method, self.method), *self.kinds[1:]]

    @property
    def by_head(self) -> bool:
        """Whether heads may hold different numbers of tokens."""
        return self.parameters.get("budgets") == "adaptive"

    @property
    def even(self) -> bool:
        """Whether all layers hold equally many tokens after one prefill."""
        return self.method != "kvzip" and (not self.pattern or "ratio" in self.parameters)

    def acted_layers(self, family: str) -> Sequence[int]:
        return self.layers_of.get(family, self.layers)


def _temperature(label: str, temperature: float, families: Sequence[str], **more: Any) -> Case:
    return Case(
        label, "attn_temperature", {"temperature": temperature}, lambda: AttnTemperature(temperature),
        families, {"temperature": 1.0}, **more,
    )  # fmt: skip


def _schedule(schedule: str, families: Sequence[str], wide: Any, **given: Any) -> Case:
    whole = {"schedule": schedule, **given}
    return Case(
        f"temperature-{schedule}", "attn_temperature", whole, lambda: Scheduled(**whole), families,
        {"temperature": 1.0} if schedule != "yarn" else {**whole, "length": given["trained"]},
        None if wide is None else {"schedule": schedule, **wide},
    )  # fmt: skip


def _act(label: str, families: Sequence[str], layers: Sequence[int] = (1, 2), **more: Any) -> Case:
    extra = {
        k: more.pop(k)
        for k in ("chunks", "assisted", "main", "neighbours", "neighbour_rules", "clashes")
        if k in more
    }
    given = {"beta": 0.3, "alpha": 1.5, "skip_layers": 1, "min_rows": 3, **more}
    extra.setdefault("chunks", "refused")
    # A threshold that nothing reaches: looked at, never edited.
    wide = {**given, "theta": 1e6} if given.get("statistics") != "running" else None
    return Case(
        label, "act", given, lambda: Act(**given), families, {**given, "beta": 1.0}, wide, layers, **extra
    )


HEADS = [[0, 1], [1, 0], [1, 3], [2, 2]]


def _gain(label: str, gain: float, families: Sequence[str], heads: Any = "all", **more: Any) -> Case:
    listed = [[layer, head] for layer in range(3) for head in range(4)] if heads == "all" else heads
    return Case(
        label, "head_gain", {"heads": heads, "gain": gain}, lambda: HeadGain(listed, gain),
        families, {"heads": heads, "gain": 1.0}, **more,
    )  # fmt: skip


def _evicting(label: str, method: str, rule: Any, families: Sequence[str], **more: Any) -> Case:
    extra = {k: more.pop(k) for k in ("main", "neighbours", "neighbour_rules", "clashes") if k in more}
    oracle = {**more, "reduce": "call"} if method == "h2o" else more
    return Case(
        label, method, more, lambda: rule(**oracle), families, {**more, "recent": 1 << 30},
        {**more, "recent": 60}, layers_of={"gemma2": (1,)}, evicts=True, **extra,
    )  # fmt: skip


def _clear(
    label: str, families: Sequence[str], main: bool = False, neighbours: Any = (), **given: Any
) -> Case:
    return Case(
        label, "clear", {**given, "force": True}, Rule, families, {"radius": 1000}, {"radius": 30}, main=main,
        neighbours=neighbours, denoised=lambda: Clear(**given), late=True,
    )  # fmt: skip


def _linfusion(label: str, middle: int, layers: int, **more: Any) -> Case:
    given, oracle = contract_weights(middle, layers)
    return Case(
        label, "linfusion", given, Rule, ("unet",), None, denoised=oracle, sites=layers, replaces=True, **more
    )


LARGE = {"use": "entropy"}  # the tiny UNet states its size


def _capped(label: str, method: str, rule: Any, families: Sequence[str], **more: Any) -> Case:
    """An evictor whose budget is one number, ``capacity``."""
    extra = {
        k: more.pop(k) for k in ("main", "neighbours", "neighbour_rules", "clashes", "once") if k in more
    }
    return Case(
        label, method, more, lambda: rule(**more), families, {**more, "capacity": 1 << 30},
        {**more, "capacity": 60}, layers_of={"gemma2": (1,)}, evicts=True, **extra,
    )  # fmt: skip


def _shared(label: str, method: str, rule: Any, whole: Mapping[str, Any], **more: Any) -> Case:
    """An evictor given a ``ratio`` or ``protect``; ``whole``: budgets of its own that keep everything."""
    extra = {
        k: more.pop(k) for k in ("main", "neighbours", "neighbour_rules", "clashes", "once") if k in more
    }
    given = {k: more[k] for k in ("ratio", "protect") if k in more}
    oracle = {k: v for k, v in more.items() if k not in given}
    wide = {**{k: v for k, v in more.items() if k != "ratio"}, **whole}
    return Case(
        label, method, more, lambda: rule(**oracle).shares(**given), ("llama",), {**oracle, "ratio": 1.0} if
        not oracle.keys() & whole.keys() else {"ratio": 1.0}, wide, evicts=True, protects="protect" in given, **extra,
    )  # fmt: skip


class SeededZipVL(ZipVL):
    """The oracle, which is told the probe rows, with the rows that the method draws for a prompt of that length."""

    def __init__(self, probes: tuple[Any, Any], **given: Any):
        self.drawn = ZipVLMethod(probes=probes, ratio=given.get("ratio"))._chosen
        super().__init__(last=probes[0], **given)

    def select(self, call: Any, p: Any, row: int, number: int, chunk: list[int], last: int) -> set[int]:
        self.probes = None if number else [{row: self.drawn(len(chunk)).tolist()}]
        return super().select(call, p, row, number, chunk, last)


def _zipvl(label: str, families: Sequence[str], **more: Any) -> Case:
    extra = {k: more.pop(k) for k in ("main", "neighbours", "neighbour_rules", "clashes") if k in more}
    given = {"tau": 0.7, "probes": (2, 3), "interval": 3, "min_tokens": 6, **more}
    drops = given.get("mode") == "discard"
    # Watched and left alone: every row at the end is a probe, so every token is important.
    wide = {**given, "probes": (1.0, 0), "interval": 1000} if drops else None
    whole = "tau"
    if "ratio" in more:
        whole, wide = "ratio", {**given, "min_tokens": 1000}
        del given["tau"], wide["tau"]
    return Case(
        label, "zipvl", given, lambda: SeededZipVL(**given), families, {**given, whole: 1.0, "bits": (16, 16)},
        wide, layers_of={"gemma2": (1,)}, evicts=drops, pattern=True, chunks="refused", assisted="refused", **extra,
    )  # fmt: skip


def _blocks(label: str, families: Sequence[str], main: bool = False, **more: Any) -> Case:
    given = {"threshold": 0.6, "stride": 2, "block": 4, **more}
    return Case(
        label, "xattention", given, lambda: XAttention(**given), families, {**given, "threshold": 1.0},
        {**given, "block": 64}, layers_of={"gemma2": (1,)}, chunks="refused", assisted="refused", main=main,
        neighbours=(GAIN, KEEP) if main else (), neighbour_rules=_around(gain_rule, keep_rule) if main else list,
        clashes=[("act", {}, "pattern"), ("h2o", {"normalise": True}, "pattern")] if main else (),
    )  # fmt: skip


def _packing(label: str, method: str, rule: Any, families: Sequence[str], **more: Any) -> Case:
    names = ("main", "neighbours", "neighbour_rules", "clashes", "chunks", "assisted", "identity", "wide")
    extra = {k: more.pop(k) for k in names if k in more}
    exact = extra.pop("identity", {**more, "k_bits": 16, "v_bits": 16})
    wide = extra.pop("wide", {**more, "residual": 60})
    return Case(
        label, method, more, lambda: rule(**more), families, exact, wide, layers_of={"gemma2": (1,)}, **extra
    )


def _zip(label: str, families: Sequence[str], **more: Any) -> Case:
    extra = {k: more.pop(k) for k in ("main", "neighbours", "neighbour_rules", "clashes") if k in more}
    given = {"interval": 3, "probes": (2, 0.3), **more}

    def rule() -> Rule:
        """The oracle is told the probe rows of the first call, which depend on the length of the row alone."""
        return ProbedZipCache(ZipCacheMethod(**given), **{k: v for k, v in given.items() if k != "probes"})

    return Case(
        label, "zipcache", given, rule, families, {**given, "bits": (16, 16)}, None,
        layers_of={"gemma2": (1,)}, chunks="refused", assisted="refused", **extra,
    )  # fmt: skip


class ProbedZipCache(ZipCache):
    """The oracle with the rows that the method draws: they are its input, not what is checked."""

    def __init__(self, method: ZipCacheMethod, **more: Any) -> None:
        super().__init__(**more)
        self.method = method

    def pack(self, call: Any, p: Any) -> None:
        lengths = [self.length(call, row) for row in range(call.key.shape[0])]
        self.probes = [[self.method.probed(n).tolist() for n in lengths]]
        super().pack(call, p)


def _var(label: str, families: Sequence[str], **more: Any) -> Case:
    extra = {
        k: more.pop(k) for k in ("main", "neighbours", "neighbour_rules", "clashes", "layers") if k in more
    }
    given = {
        "sink_dims": list(vlms.DIMS), "min_nonsink": 0.3, "min_visual": 0.1, "max_sink_share": 0.3, "layers": "1:",
        **more,
    }  # fmt: skip
    return Case(
        label, "var", given, lambda: Var(torch.zeros(1, 0), **given), families, {**given, "move": 0.0},
        {**given, "tau": 1e6}, **{"layers": (1, 2), "chunks": "refused", **extra},
    )  # fmt: skip


GAIN = {"use": "head_gain", "with": {"heads": HEADS, "gain": 0.5}}
WARM = {"use": "attn_temperature", "with": {"temperature": 1.3}}
KEEP = {"use": "h2o", "with": {"heavy": 4, "recent": 3}}


def _around(*others: Any) -> Callable[[], list[Rule]]:
    return lambda: [make() for make in others]


def gain_rule() -> Rule:
    return HeadGain(HEADS, 0.5)


def warm_rule() -> Rule:
    return AttnTemperature(1.3)


def keep_rule() -> Rule:
    return H2O(4, 3)


CASES: list[Case] = [
    _temperature(
        "temperature-sharp", 0.7, (*CAUSAL, *ENCODERS, *DENOISERS), main=True,
        neighbours=(GAIN, KEEP), neighbour_rules=_around(gain_rule, keep_rule),
    ),
    _temperature("temperature-smooth", 1.6, ("llama", "vit", "t5")),
    _schedule("logn", ("llama", "mistral", "bert", "t5"), {"trained": 60}, trained=3, temperature=0.8),
    _schedule("llama4", ("llama",), {"trained": 60}, trained=4),
    _schedule("yarn", ("llama", "gemma2"), None, trained=100, length=3000),
    _schedule("ssa", ("llama",), {"beta": 9.0}, beta=-0.5),
    _act(
        "act", CAUSAL, main=True, neighbours=(WARM, KEEP), neighbour_rules=_around(warm_rule, keep_rule),
    ),
    _act("act-theta-heads", ("llama", "gemma2"), (0, 1, 2), theta=0.12, heads=HEADS),
    _act("act-removes", ("llama",), beta=0.0),
    _act("act-running", CAUSAL, statistics="running", chunks="same", assisted="refused"),
    _gain(
        "gain-heads", 0.5, (*CAUSAL, *ENCODERS), HEADS, main=True,
        neighbours=(WARM, KEEP), neighbour_rules=_around(warm_rule, keep_rule),
    ),
    _gain("gain-off", 0.0, ("llama", "bert")),
    _evicting(
        "streaming", "streaming", Streaming, EVICTABLE, sinks=2, recent=5, main=True, neighbours=(WARM, GAIN),
        neighbour_rules=_around(warm_rule, gain_rule), clashes=[("h2o", {"heavy": 2, "recent": 2}, "kv")],
    ),
    _evicting("streaming-rolled", "streaming", Streaming, FULL, sinks=2, recent=5, positions="rolled"),
    _evicting("streaming-fractions", "streaming", Streaming, ("llama",), sinks=0.2, recent=0.3),
    _evicting(
        "h2o", "h2o", H2O, EVICTABLE, heavy=4, recent=3, main=True, neighbours=(WARM, GAIN),
        neighbour_rules=_around(warm_rule, gain_rule), clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    _evicting("h2o-rolled", "h2o", H2O, FULL, heavy=4, recent=3, positions="rolled"),
    _evicting("h2o-fractions", "h2o", H2O, ("llama", "phi"), heavy=0.3, recent=0.2),
    _evicting("h2o-normalised", "h2o", H2O, ("llama",), heavy=4, recent=3, normalise=True),
    _evicting("h2o-no-recent", "h2o", H2O, ("llama",), heavy=5, recent=0),
    _evicting("h2o-window", "h2o", H2O, ("llama", "qwen2"), heavy=0, recent=6),
    *(
        _evicting(f"h2o-{gqa}", "h2o", H2O, ("llama",), heavy=4, recent=3, gqa=gqa)
        for gqa in ("first", "max", "mean")
    ),
    _capped(
        "tova", "tova", Tova, EVICTABLE, capacity=7, main=True, neighbours=(WARM, GAIN),
        neighbour_rules=_around(warm_rule, gain_rule), clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    _capped("tova-heads", "tova", Tova, ("llama", "qwen2"), capacity=7, shared=False),
    _capped("tova-fraction", "tova", Tova, ("llama",), capacity=0.4),
    _capped(
        "snapkv", "snapkv", SnapKV, EVICTABLE, capacity=9, window=4, pool=3, main=True, once=True,
        neighbours=(WARM, GAIN), neighbour_rules=_around(warm_rule, gain_rule),
        clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    _capped(
        "snapkv-max", "snapkv", SnapKV, ("llama", "qwen2"), capacity=8, window=3, pool=5, pooling="max", once=True
    ),
    _shared(
        "random", "random", Random, {"capacity": 60}, ratio=0.5, main=True, neighbours=(WARM, GAIN),
        neighbour_rules=_around(warm_rule, gain_rule), clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    _shared("random-protect", "random", Random, {"capacity": 60}, capacity=1, seed=5, protect="prompt"),
    _shared("h2o-ratio", "h2o", lambda **m: H2O(**m, reduce="call"), {"recent": 60}, ratio=0.4),
    _shared("streaming-share", "streaming", lambda **m: Streaming(1, **m), {"recent": 60}, ratio=0.45),
    _shared(
        "tova-protect", "tova", lambda **m: Tova(m.pop("capacity", 1), **m), {"capacity": 60}, ratio=0.1,
        protect="prompt",
    ),
    _capped(
        "snapkv-adaptive", "snapkv", lambda budgets, **m: SnapKV(**m).adaptive(), ("llama", "qwen2"), capacity=8,
        window=3, pool=1, once=True, budgets="adaptive",
    ),
    _capped(
        "tova-adaptive", "tova", lambda budgets, **m: Tova(**m).adaptive(), ("llama",), capacity=7, shared=False,
        budgets="adaptive",
    ),
    _capped("snapkv-fraction", "snapkv", SnapKV, ("llama",), capacity=0.6, window=2, pool=1, once=True),
    _capped(
        "keydiff", "keydiff", KeyDiff, ("llama", "gemma2"), capacity=9, sinks=2, recent=3, main=True, once=True,
        neighbours=(WARM, GAIN), neighbour_rules=_around(warm_rule, gain_rule),
        clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    _capped(
        "knorm", "knorm", Knorm, ("llama",), capacity=0.6, sinks=1, recent=2, main=True, once=True,
        neighbours=(WARM, GAIN), neighbour_rules=_around(warm_rule, gain_rule),
        clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    Case(
        "kvzip", "kvzip", {"ratio": 0.4, "sinks": 2}, lambda: KVzip(ratio=0.4, sinks=2), ("llama", "gemma2"),
        {"ratio": 1.0}, None, layers_of={"gemma2": (1,)}, evicts=True, once=True, main=True, assisted="refused",
        neighbours=(WARM, GAIN), neighbour_rules=_around(warm_rule, gain_rule),
        clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    _zipvl(
        "zipvl", EVICTABLE, main=True, neighbours=(WARM, GAIN), neighbour_rules=_around(warm_rule, gain_rule),
        clashes=[("kvquant", {}, "kv")],
    ),
    _zipvl("zipvl-everything", ("llama",), tau=1.0, bits=(4, 2)),
    _zipvl(
        "zipvl-discard", EVICTABLE, mode="discard", neighbours=(WARM, GAIN),
        neighbour_rules=_around(warm_rule, gain_rule), clashes=[("streaming", {"recent": 4}, "kv")],
    ),
    _zipvl("zipvl-share", ("llama",), ratio=0.45),
    _zipvl("zipvl-share-discard", ("llama", "qwen2"), ratio=0.4, mode="discard", probes=(6, 4), bits=(4, 2)),
    _blocks("xattention", ("llama", "qwen2"), main=True),
    _blocks("xattention-shared", ("llama", "qwen2"), threshold=0.5, shared=True, stride=4),
    _packing(
        "kvquant", "kvquant", KvQuant, EVICTABLE, group=4, residual=3, main=True, neighbours=(WARM, KEEP),
        neighbour_rules=_around(warm_rule, keep_rule), clashes=[("zipcache", {}, "kv")],
    ),
    _packing("kvquant-k2-v8", "kvquant", KvQuant, ("llama", "phi"), k_bits=2, v_bits=8, group=3, residual=0),
    _packing("kvquant-k4-v16", "kvquant", KvQuant, ("llama",), k_bits=4, v_bits=16, group=5, residual=0.25),
    _packing("kvquant-singles", "kvquant", KvQuant, ("llama",), k_bits=16, v_bits=2, group=1, residual=1),
    _zip(
        "zipcache", EVICTABLE, main=True, neighbours=(WARM, GAIN),
        neighbour_rules=_around(warm_rule, gain_rule), clashes=[("kvquant", {}, "kv")],
    ),
    _zip("zipcache-published", ("llama",), normalise="published", salient=0.4, bits=(8, 4)),
    _zip("zipcache-exact-tier", ("llama", "phi"), salient=2, bits=(16, 2), interval=5),
    _var(
        "var", VLMS, main=True, neighbours=(GAIN, KEEP), neighbour_rules=_around(gain_rule, keep_rule),
        clashes=[("act", {}, "mass")],
    ),
    _var("var-all-moved", ("gemma3", "llava"), move=1.0, min_nonsink=0.0),
    Case(  # of a UNet or PixArt alone nobody knows how many pixels a latent is
        "entropy-config", "entropy", {}, Rule, ("unet", "pixart"), None, trained=128,
    ),
    Case(
        "entropy", "entropy", {"trained": 256}, Rule, ("sd3", "flux"), {"trained": 128}, main=True, trained=256,
        neighbours=(
            {**WARM, "where": {"layers": "0:1"}},
            {"use": "attn_temperature", "with": {"temperature": 0.6}, "where": {"layers": "1:"}},
        ),
    ),
    _clear("clear", DENOISERS, radius=2, main=True, neighbours=(WARM, LARGE)),
    _linfusion(
        "linfusion", 4, 6, main=True, clashes=[("attn_temperature", {"temperature": 1.3}, "form")],
        neighbours=({**WARM, "where": {"layers": "6:8"}}, {**LARGE, "where": {"layers": "8:"}}),
    ),
    _linfusion("linfusion-plain", -1, 10),
    _clear("clear-pooled", ("sd3", "flux", "pixart"), radius=3, pool=2),
]  # fmt: skip

LANGUAGE = [c for c in CASES if set(c.families) & {*CAUSAL, *ENCODERS}]
MAIN = [c for c in CASES if c.main]
MAIN_CAUSAL = [c for c in MAIN if set(c.families) & set(CAUSAL)]
EVICTORS = [c for c in CASES if c.evicts]
BUDGETED = [c for c in EVICTORS if c.even and not (c.pattern or c.protects)]


def pairs(kinds: Sequence[str], cases: Sequence[Case] = ()) -> list[Any]:
    """pytest params of (case, family) for the families among ``kinds``."""
    import pytest

    return [
        pytest.param(case, family, id=f"{case.label}-{family}")
        for case in (cases or CASES)
        for family in case.families
        if family in kinds
    ]


def named(cases: Sequence[Case]) -> dict[str, Any]:
    """Arguments of ``parametrize`` for a list of cases."""
    return {"argnames": "case", "argvalues": cases, "ids": [c.label for c in cases]}
