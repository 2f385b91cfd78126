"""The role of every attention module of transformers is what it is given at a call, on every model that can be run small.

The states that a module's queries come from are made a leaf of their own; its keys are its own where they depend on
it, and another's where they do not. Modules that are given queries and keys apart are told by how many there are of
each; of those that read both nothing is held.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from oracle import decoder_zoo, models, vision_zoo
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.auto import modeling_auto
from transformers.models.llama import modeling_llama

import trainless
from trainless.hosts.transformers.dispatch import dispatches
from trainless.hosts.transformers.images import pretrained
from trainless.hosts.transformers.parts import ModelParts

NAME = "roles_under_test"
LARGEST = 40_000_000  # parameters
LISTS = (
    "MODEL_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASK_GENERATION_MAPPING_NAMES", "MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES",
)  # fmt: skip
# One of each kind: what the model says, what its class's table says, and queries and keys that come apart.
SOME = ("bart", "bert", "gpt2", "llama", "mllama", "sam", "switch_transformers", "t5", "whisper")
# Arguments of modules that are given queries and keys apart, also where both are of the same tokens.
APART = frozenset({"key", "keys", "key_hidden_states"})
KINDS = sorted({kind for name in LISTS for kind in getattr(modeling_auto, name, {})})


def _classes(kind: str) -> Iterator[Any]:
    """Its classes, bases and those with heads."""
    for name in LISTS:
        listed = getattr(modeling_auto, name, {}).get(kind)
        for one in listed if isinstance(listed, (tuple, list)) else (listed,):
            if one is not None and (cls := getattr(transformers, one, None)) is not None:
                yield cls


def _configs(kind: str) -> Iterator[Any]:
    """Small in every field, as tests/oracle makes them; then with few layers alone."""
    for make in (vision_zoo.config_of, decoder_zoo.config_of, _shallow):
        try:
            yield make(kind)
        except Exception:  # not every config can be made small field by field
            continue


def _shallow(kind: str) -> Any:
    config = transformers.CONFIG_MAPPING[kind]()
    for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig))):
        for name in vision_zoo.COUNTS:
            if isinstance(getattr(part, name, None), int) and getattr(part, name) > 2:
                setattr(part, name, 2)
    return config


def _models(kind: str, cls: Any, more: dict[str, Any]) -> Iterator[nn.Module]:
    """The same model, in the ways that it can be made small."""
    for config in _configs(kind):
        try:
            if any(not hasattr(config, name) for name in more):
                return
            for name, value in more.items():
                setattr(config, name, value)
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(config).parameters())
            if count <= LARGEST:
                yield cls(config).float().eval()
        except Exception:
            continue


def _number(config: Any, *names: str) -> int | None:
    for part in (config, getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
        for name in names:
            value = getattr(part, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    return None


def _inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Guesses at arguments, the fullest first."""
    takes = inspect.signature(type(model).forward).parameters
    config, ids = model.config, torch.arange(3, 12)[None]
    size, bins = _number(config, "image_size") or 32, _number(config, "num_mel_bins", "feature_size") or 80
    channels = _number(config, "num_channels") or 3
    wide = _number(config, "hidden_size", "d_model", "n_embd") or 32
    given: dict[str, Any] = {}
    if "input_ids" in takes:
        given["input_ids"] = ids
    if "decoder_input_ids" in takes:
        given["decoder_input_ids"] = ids[:, :5]
    if "use_cache" in takes:
        given["use_cache"] = False
    other = {"encoder_hidden_states": torch.randn(1, 7, wide)} if "encoder_hidden_states" in takes else {}
    pixels = torch.randn(1, channels, size, size)
    points = {"input_points": torch.rand(1, 1, 3, 2), "input_labels": torch.ones(1, 1, 3, dtype=torch.long)}
    extra: list[dict[str, Any]] = []
    for pictures in (pixels, pixels[:, None], pixels[:, None].expand(-1, 8, -1, -1, -1)):
        extra += [{"pixel_values": pictures, **{k: v for k, v in points.items() if k in takes}}]
    long = 2 * (_number(config, "max_source_positions") or 100)
    extra += [{"input_features": torch.randn(1, bins, long)}, {"input_features": torch.randn(1, 200, bins)}]
    extra += [{"input_values": torch.randn(1, 8000)}, {"input_values": torch.randn(1, 1, 8000)}]
    if "cross_attention_states" in takes:
        extra.insert(0, {"cross_attention_states": torch.randn(1, 7, wide)})
    for more in [*extra, {}]:
        if all(name in takes for name in more):
            yield {**given, **other, **more}
    if other:
        yield given


class Watch:
    """What each attention module of a model was given: the names of those that ran, by role."""

    def __init__(self, model: nn.Module):
        self.found: dict[str, set[str]] = {}
        self.hooks, self.leaves = [], {}
        self.names = {m: n for n, m in model.named_modules() if dispatches(type(m)) and "config" in vars(m)}
        for module in self.names:
            vars(module)["config"]._attn_implementation = NAME
            self.hooks.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = list(inspect.signature(type(module).forward).parameters)[1]
        own = args[0] if args else kwargs.get(first)
        if not isinstance(own, Tensor) or not own.is_floating_point():
            return None
        leaf = own.detach().clone().requires_grad_(True)
        self.leaves[module] = leaf

        def swap(value: Any) -> Any:
            return leaf if value is own else value

        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    def called(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        leaf = self.leaves.get(module)
        if leaf is None or module not in self.names:
            return
        if not torch.is_grad_enabled():
            return
        takes = inspect.signature(type(module).forward).parameters
        if not APART.isdisjoint(takes):
            own = query.shape[2] == key.shape[2]
        else:
            given = (key.sum(), leaf)
            own = (
                key.requires_grad
                and None is not torch.autograd.grad(*given, allow_unused=True, retain_graph=True)[0]
            )
            if own and key.shape[2] > query.shape[2]:
                return  # its own and others', of which the class decides
        self.found.setdefault(self.names[module], set()).add("self" if own else "cross")


_watching: list[Watch] = []


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """In place of attention: what comes out has its shape, and depends on what goes in."""
    for watch in _watching:
        watch.called(module, query, key)
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return out + value.mean() + query.mean(), None


@functools.cache
def _registered() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _walk(kind: str) -> tuple[list[str], dict[str, str]]:
    """What is wrong, and the roles of the modules that ran."""
    faults: set[str] = set()
    roles: dict[str, str] = {}
    for cls in dict.fromkeys(_classes(kind)):
        for more in ({}, {"is_decoder": True, "add_cross_attention": True}):
            for model in _models(kind, cls, more):
                found = _run(model)
                parts = ModelParts(pretrained(model))
                for name, seen in found.items():
                    told = parts.role(name, model.get_submodule(name))
                    roles[f"{cls.__name__}.{name}"] = told
                    if seen != {told}:
                        kept = type(model.get_submodule(name)).__name__
                        faults.add(f"{cls.__name__}.{name} ({kept}): {told}, not {sorted(seen)}")
                if found:
                    break
    return sorted(faults), roles


def _run(model: nn.Module) -> dict[str, set[str]]:
    """By name, the roles of the modules that some call reached."""
    _registered()
    found: dict[str, set[str]] = {}
    for given in _inputs(model):
        watch = Watch(model)
        _watching.append(watch)
        try:
            model(**given)
        except Exception:  # other arguments are tried, and what ran before counts
            pass
        finally:
            _watching.pop()
            for hook in watch.hooks:
                hook.remove()
        for name, seen in watch.found.items():
            found.setdefault(name, set()).update(seen)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS if os.environ.get("TRAINLESS_ALL") else SOME)
def test_the_role_is_what_a_call_gives(kind: str) -> None:
    faults, roles = _walk(kind)
    assert not faults, faults
    if kind in SOME:
        assert roles, "it has to run"


@pytest.mark.filterwarnings("ignore")
def test_another_role_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainless.hosts.transformers import cross as transformers_cross

    monkeypatch.setitem(transformers_cross.PLACES, "T5Attention", ("SelfAttention",))
    faults, _ = _walk("t5")
    assert any("EncDecAttention" in f and "self, not ['cross']" in f for f in faults), faults
    assert any(".SelfAttention" in f and "cross, not ['self']" in f for f in faults), faults


class Foreign(nn.Module):
    """Attention that is nobody's: it dispatches as transformers' own does, and says nothing of itself."""

    def __init__(self, like: Any):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = like.config, like.layer_idx, True
        self.other: Tensor | None = None  # states that the keys are made of, in place of the queries'

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **more: Any
    ):
        shape = (1, -1, 4, 8)
        source = hidden_states if self.other is None else self.other
        query = hidden_states.view(shape).transpose(1, 2)
        key = source.view(shape).transpose(1, 2)
        interface = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, None
        )
        out, weights = interface(self, query, key, key, None, dropout=0.0, scaling=None)
        return out.reshape(*hidden_states.shape), weights


@pytest.mark.parametrize("method", ["attn_temperature", "act"])
def test_a_class_that_says_nothing_is_self_attention_and_it_is_said(method: str) -> None:
    model, ids = models.build("llama", dtype=torch.float32), models.prompt(20)
    given = {
        "attn_temperature": {"temperature": 0.5},
        "act": {"skip_layers": 0, "min_rows": 3, "alpha": 1.0},
    }[method]

    def notes() -> list[str]:
        """What is said of the classes; that prompts stay eager under a compiler is said of the method."""
        found = trainless.explain(model, method, **given).notes
        return [note for note in found if "prompts stay eager" not in note]

    assert not notes()
    layer = model.model.layers[1]
    layer.self_attn = Foreign(layer.self_attn)
    (note,) = notes()
    assert note.startswith("Foreign (1 layer)") and "taken for self-attention" in note
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
        with trainless.patched(model, method, **given) as patch:
            assert not torch.equal(model(ids, use_cache=False).logits, stock)
            assert patch.report().methods[0].sites == 3
        layer.self_attn.other = torch.randn(1, 7, 32)
        with trainless.patched(model, method, **given):
            with pytest.raises(
                trainless.Unsupported, match=r"Foreign does not say.*7 keys came for 20 queries"
            ):
                model(ids, use_cache=False)
        layer.self_attn.is_cross_attention = True
        with trainless.patched(model, method, **given) as patch:
            model(ids, use_cache=False)
            assert patch.report().methods[0].sites == 2
    assert not notes()
