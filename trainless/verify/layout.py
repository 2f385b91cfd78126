"""Where a denoiser's tokens stand, found out by experiment and held against what methods are told.

One image token or one word of the prompt is replaced, and the layers show which of their keys changed. Meanwhile
each attention at the patch's sites gives every token its own value back, so that tokens do not mix there and the one
that was replaced stands out at every depth.

Checks of the whole patch: ``tokens`` (each image token is the key that methods take for it, no word and no reference
image is taken for one, and a pattern leaves the same pairs of the image whatever the prompt), ``prompt`` (padding after
a prompt changes no more than without the patch), ``size`` (a pipeline's own default size has as many image tokens as
methods take for trained).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.patterns import fitted
from ..engine.runtime import Runtime, runtime_of
from ..engine.watching import Made
from ..errors import TrainlessError, Unsupported
from ..hosts.diffusers.experiments import Change, changes, latents_of, longer, padded, with_reference
from ..hosts.probes import SEED
from ..seams import AttentionCall, Site, State, Statistics
from .outcome import FAILED, OK, UNCHECKED, WHOLE, Answer, Check
from .probing import tensors_in
from .standing import seed
from .trial import Trial, told

MANY = 3
CLEAR = 3.0  # a token that was replaced stands out by this much, or nothing is concluded
MOSTLY = 0.8  # of a change in a UNet stands around one place, or nothing is concluded
APART = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest output; others 0.05


@dataclass
class Shown:
    """One call of a site: what every key was made of, and what methods were told of its tokens."""

    made: Made
    call: AttentionCall | None


class Isolating:
    """Notes the first call of a site and gives every token its own value."""

    settles = traced = False

    def __init__(self, runtime: Runtime):
        self.runtime, self.thread = runtime, threading.get_ident()
        self.inside = False
        self.call: AttentionCall | None = None
        self.first: Shown | None = None

    def wants(self) -> bool:
        return not self.inside and threading.get_ident() == self.thread

    def told(self, call: AttentionCall) -> None:
        if threading.get_ident() == self.thread:
            self.call = call

    def around(self, made: Made, proceed: Callable[[], Tensor], stock: Callable[[], Tensor]) -> Tensor:
        self.inside, self.call = True, None
        try:
            out = proceed()
        finally:
            self.inside = False
        if self.first is None:
            self.first = Shown(made, self.call)
        if made.query.shape[2] != made.key.shape[2]:
            return out
        share = made.query.shape[1] // made.value.shape[1]
        return made.value.repeat_interleave(share, 1).transpose(1, 2).contiguous()


def checks(trial: Trial) -> list[Check]:
    """Nothing for models whose sites hold no image tokens of a denoiser."""
    sites = [site for b in trial.patch.bindings for site, _ in b.contributions]
    sites = [s for s in dict.fromkeys(sites) if "denoiser" in s.facts and s.kind == "attention"]
    sites = [s for s in sites if (r := runtime_of(s.module)) is not None and not r.plan.inert]
    if not sites:
        return []
    found = []
    tokens: list[Answer] = []
    prompts: list[Answer] = []
    try:
        for model, given in _calls(trial, sites):
            own = [s for s in sites if s.facts["denoiser"] is model]
            tokens.append(_tokens(trial, model, own, given))
            try:
                prompts += _prompt(trial, model, given)
            except Exception as error:
                prompts.append((UNCHECKED, f"an experiment does not run: {told(error)}"))
    except Exception as error:  # the calls that are made here are experiments, and a class may not take them
        tokens.append((UNCHECKED, f"an experiment does not run: {told(error)}"))
    found.append(Check(WHOLE, "tokens", *_worst(tokens)))
    if prompts:
        found.append(Check(WHOLE, "prompt", *_worst(prompts)))
    size = _size(sites)
    return [*found, Check(WHOLE, "size", *size)] if size is not None else found


def _worst(answers: Sequence[Answer]) -> Answer:
    for status in (FAILED, UNCHECKED):
        some = [detail for said, detail in answers if said == status]
        if some:
            return status, "; ".join(dict.fromkeys(some))
    return OK, "; ".join(dict.fromkeys(detail for _, detail in answers))


def _calls(trial: Trial, sites: Sequence[Site]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Each denoiser with the arguments of a call: the probe that was given, or a small one of its own."""
    from ..hosts.diffusers.probe import small_inputs

    if isinstance(trial.given, dict) and not trial.parts[0].prefix:
        return [(sites[0].facts["denoiser"], dict(trial.given))]
    if trial.given is not None:
        raise Unsupported(
            "the probe is a function, whose arguments for the denoiser are not known; give those"
        )
    found = []
    for part in trial.parts:
        own = [s for s in sites if s.facts["denoiser"] in set(part.module.modules())]
        found += small_inputs(part, own) if own else []
    return found


# ---------------------------------------------------------------- which key is which token


def _tokens(trial: Trial, model: nn.Module, sites: Sequence[Site], given: dict[str, Any]) -> Answer:
    if latents_of(given) is None:
        return UNCHECKED, f"which argument of a {type(model).__name__} is the latents is not known"
    base = _shown(trial, model, sites, given)
    known = [s for s in sites if s in base and _image(base[s]) is not None]
    if not known:
        return UNCHECKED, "no site says where the image's tokens stand"
    packed = next((i.tokens for s in known if (i := _image(base[s])) is not None and i.tokens), None)
    patch = known[0].facts.get("patch")
    wrong: list[str] = []
    seen = unclear = 0
    for change in changes(given, patch, packed):
        now = _shown(trial, model, sites, change.given)
        for site in known:
            answer = _place(site, base[site], now[site], change, given)
            seen += answer is not None
            unclear += answer is None
            if answer:
                wrong.append(f"{site.name}: {answer}")
    note = ""
    for what, look in (("a longer prompt", _pairs), ("a reference image", _references)):
        try:
            wrong += look(trial, model, known, given, base)
        except Exception as error:
            note += f"; with {what} the call does not run ({told(error)})"
    if wrong:
        more = f" (and {len(wrong) - MANY} more)" if len(wrong) > MANY else ""
        return FAILED, "; ".join(wrong[:MANY]) + more
    if not seen:
        return UNCHECKED, "no replaced token stood out among the keys, so their places could not be told"
    said = f"image and text stand where methods are told, by {seen} replaced tokens at {len(known)} sites"
    said += f"; {unclear} could not be told" if unclear else ""
    return OK, said + note


def _image(shown: Shown) -> Any:
    return None if shown.call is None else shown.call.image


def _shown(trial: Trial, model: nn.Module, sites: Sequence[Site], given: dict[str, Any]) -> dict[Site, Shown]:
    with _isolated(sites) as watches:
        trial.standing.fresh()
        seed(SEED)
        model(**given)
    return {site: watch.first for site, watch in watches.items() if watch.first is not None}


@contextmanager
def _isolated(sites: Sequence[Site]) -> Iterator[dict[Site, Isolating]]:
    watches = {s: Isolating(r) for s in sites if (r := runtime_of(s.module)) is not None}
    try:
        for watch in watches.values():
            watch.runtime.watch = watch
        yield watches
    finally:
        for watch in watches.values():
            watch.runtime.watch = None


def _place(site: Site, base: Shown, now: Shown, change: Change, given: dict[str, Any]) -> str | None:
    """What is wrong about the key that changed; "" when it is the one that it should be, None when none stands out."""
    if base.made.value.shape != now.made.value.shape:
        return f"has another number of keys once a token of the {change.what} is replaced"
    moved = (now.made.value.double() - base.made.value.double()).norm(dim=-1).norm(dim=1)[0]  # (Lk,)
    key = int(moved.argmax())
    image = _image(base)
    first = int(image.first[0]) if isinstance(image.first, Tensor) else int(image.first)
    if change.what == "text" and image.tokens == base.made.key.shape[2]:
        return ""  # all of its keys are the image's, and no word is among them
    inside = first <= key < first + image.tokens
    if not _stands_out(moved, key, first, image.grid if site.facts.get("patch") is None else None):
        return None
    if change.what != "image":
        what = "a word of the prompt" if change.what == "text" else "a reference image's"
        return f"key {key} is {what}, and is taken for an image token" if inside else ""
    if isinstance(change.place, int):
        if given[latents_of(given) or ""].shape[1] == len(moved) != image.tokens:
            return None  # the argument is the whole sequence, text and all: nothing is told apart by it
        want = first + _number(change.place, image.grid, given)
        return (
            "" if key == want else f"image token {change.place} is key {key}, and is taken to be key {want}"
        )
    if image.grid is None:
        return "" if inside else f"key {key} is an image token, and is not taken for one"
    rows, columns = given[latents_of(given) or ""].shape[-2:]
    grid, patch = image.grid, site.facts.get("patch")
    r, c = change.place[0] * grid[0] // rows, change.place[1] * grid[1] // columns
    want = first + r * grid[1] + c
    if key == want:
        return ""
    # Convolutions carry a change to its neighbours, in a UNet to some cells around.
    at = divmod(key - first, grid[1])
    if inside and patch is None and max(abs(at[0] - r), abs(at[1] - c)) <= _reach(grid):
        return ""
    return f"the image token of row {r}, column {c} is key {key}, and is taken to be key {want}"


def _stands_out(moved: Tensor, key: int, first: int, grid: tuple[int, int] | None) -> bool:
    """Whether one key has changed and the others have not; on a ``grid``, whether the change is around one place."""
    others = moved.clone()
    others[key] = 0
    if grid is None:
        return float(moved[key]) > CLEAR * float(others.max())
    image = moved[first : first + grid[0] * grid[1]].square()
    if not first <= key < first + len(image):
        return False
    number = torch.arange(len(image), device=moved.device)
    row, column = number // grid[1], number % grid[1]
    near = torch.maximum((row - row[key - first]).abs(), (column - column[key - first]).abs()) <= _reach(grid)
    return float(image[near].sum()) > MOSTLY * float(image.sum())


def _reach(grid: tuple[int, int]) -> int:
    """How many cells around a place convolutions carry a change in a UNet."""
    return max(2, max(grid) // 4)


def _number(place: int, grid: Any, given: dict[str, Any]) -> int:
    """The number of a packed token among the image's: by its row and column where its ids say them."""
    ids = given.get("img_ids")
    if grid is None or not isinstance(ids, Tensor) or ids.shape[-1] < 3:
        return place
    table = (ids if ids.dim() == 2 else ids[0]).double()
    row, column = (int((table[place, axis] - table[0, axis]).round()) for axis in (1, 2))
    return row * grid[1] + column


# ---------------------------------------------------------------- the prompt


def _pairs(
    trial: Trial, model: nn.Module, sites: Sequence[Site], given: dict[str, Any], base: dict[Site, Shown]
) -> list[str]:
    """Static patterns must leave the same pairs of the image for a prompt that is longer."""
    more = longer(given)
    restricted = [s for s in sites if _patterns(s)]
    if more is None or not restricted:
        return []
    now = _shown(trial, model, sites, more)
    wrong = []
    for site in restricted:
        pairs = [_image_pairs(site, shown[site]) for shown in (base, now) if site in shown]
        if len(pairs) == 2 and any(not torch.equal(a, b) for a, b in zip(*pairs, strict=True)):
            wrong.append(f"{site.name}: which pairs of the image exist depends on the length of the prompt")
    return wrong


def _references(
    trial: Trial, model: nn.Module, sites: Sequence[Site], given: dict[str, Any], base: dict[Site, Shown]
) -> list[str]:
    """A reference image beside the generated one must not be taken for a part of it."""
    made = with_reference(given)
    if made is None:
        return []
    beside, change = made
    before, after = (_shown(trial, model, sites, one) for one in (beside, change.given))
    wrong = []
    for site in sites:
        if site not in before or site not in after or _image(before[site]) is None:
            continue
        was, now = _image(base[site]).tokens, _image(before[site]).tokens
        if now != was:
            wrong.append(
                f"{site.name}: beside a reference image {now} tokens are taken for the image's, without it {was}"
            )
        elif answer := _place(site, before[site], after[site], change, beside):
            wrong.append(f"{site.name}: {answer}")
    return wrong


def _patterns(site: Site) -> list[Any]:
    runtime = runtime_of(site.module)
    entries = () if runtime is None else runtime.plan.of["pattern"]
    return [e.contribution.value for e in entries if not e.contribution.dynamic and e.contribution.value]


def _image_pairs(site: Site, shown: Shown) -> list[Tensor]:
    """For each pattern the pairs (rows, columns) of the image's own tokens; everything where it says nothing."""
    assert shown.call is not None
    image = _image(shown)
    first = int(image.first[0]) if isinstance(image.first, Tensor) else int(image.first)
    own = torch.arange(first, first + image.tokens, device=shown.call.key.device)
    found = []
    for value in _patterns(site):
        pattern = fitted(site.name, shown.call, value(shown.call, Statistics(), State()))
        seen = torch.ones(1, len(own), len(own), dtype=torch.bool, device=own.device)
        if pattern is not None:
            seen = seen & pattern.visible(own[:, None], own[None]).reshape(-1, len(own), len(own))[:1]
        found.append(seen)
    return found


def _prompt(trial: Trial, model: nn.Module, given: dict[str, Any]) -> list[Answer]:
    """Padding after the prompt must change no more than it does without the patch."""
    both = padded(given)
    if both is None:
        return []
    with trial.patch.paused():
        stock = [_output(trial, model, one) for one in both]
    here = [_output(trial, model, one) for one in both]
    before, after = _gap(*stock), _gap(*here)
    allowed = APART.get(stock[0].dtype, 0.05)
    if before > allowed:
        return [(UNCHECKED, "padding after the prompt changes the model's own result as well")]
    if after > allowed:
        return [
            (
                FAILED,
                f"padding after the prompt moves the result by {after:.2g}, without the patch by {before:.1g}",
            )
        ]
    return [(OK, "padding after the prompt changes nothing")]


def _output(trial: Trial, model: nn.Module, given: dict[str, Any]) -> Tensor:
    trial.standing.fresh()
    seed(SEED)
    return next(tensors_in(model(**given)))


def _gap(a: Tensor, b: Tensor) -> float:
    size = float(a.double().abs().max()) or 1.0
    return float((a.double() - b.double()).abs().max()) / size if a.shape == b.shape else float("inf")


# ---------------------------------------------------------------- the size of training


def _size(sites: Sequence[Site]) -> Answer | None:
    """The image tokens that a pipeline's own code makes at its default size, against those taken for trained."""
    sizes = [s.facts["sizes"] for s in sites if s.facts.get("sizes") is not None]
    sizes = [s for s in sizes if s.pipeline is not None]
    if not sizes:
        return None
    try:
        pixels = sizes[0].default()
        painted = None if pixels is None else sizes[0].painted(pixels)
    except TrainlessError as error:
        return UNCHECKED, str(error)
    if painted is None:
        return UNCHECKED, "what the pipeline makes of its default size cannot be run by itself"
    made = painted[0] * (painted[1] if len(painted) == 2 else 1)
    for site in sites:
        trained, patch = site.facts.get("trained_latent"), site.facts.get("patch") or (1, 1)
        if trained is None:
            continue
        taken = (trained[0] // patch[0]) * (trained[1] // patch[1])
        if taken != made:
            return FAILED, (
                f"at its default size the pipeline makes {made} image tokens, and {taken} are taken for the size of "
                f"training ({site.name})"
            )
    return OK, f"at its default size the pipeline makes {made} image tokens, as methods take for trained"
