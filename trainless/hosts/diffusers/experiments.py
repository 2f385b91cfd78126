"""Changes to the arguments of a denoiser's call, by which can be seen where each of its tokens stands.

Arguments are told apart by what every denoiser of diffusers calls them: the latents are ``sample`` or
``hidden_states``, the prompt is in ``encoder_hidden_states``, also where there are several of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LATENTS = ("sample", "hidden_states")
PROMPT = "encoder_hidden_states"
MASK = "mask"  # how the names of masks end
MORE = 3  # tokens by which a prompt is made longer
SEED = 71


@dataclass(frozen=True)
class Change:
    """The arguments of a call in which one token was replaced.

    what: "image", "text" or "reference". place: of an image token its (row, column) in latents, or its number where
    the latents come as a sequence of tokens; of a text token its number.
    """

    what: str
    place: tuple[int, int] | int
    given: dict[str, Any]


def latents_of(given: Mapping[str, Any]) -> str | None:
    """The name of the latents among the arguments."""
    return next(
        (n for n in LATENTS if isinstance(given.get(n), Tensor) and given[n].dim() in (3, 4, 5)), None
    )


def changes(given: Mapping[str, Any], patch: tuple[int, int] | None, image: int | None) -> list[Change]:
    """One change for each of a few places of the image and of the prompt.

    patch: latents per image token. image: how many of the tokens in a sequence are the generated image's.
    """
    found = []
    name = latents_of(given)
    if name is not None and given[name].dim() > 3:
        rows, columns = given[name].shape[-2:]
        tall, wide = patch or (1, 1)
        down, right = rows // tall - 1, columns // wide - 1
        for r, c in ((0, 0), (0, right), (down, 0), (down // 2, right // 2), (down, right)):
            changed = given[name].clone()
            part = changed[..., r * tall : (r + 1) * tall, c * wide : (c + 1) * wide]
            part += _noise(part)
            found.append(Change("image", (r * tall, c * wide), {**given, name: changed}))
    elif name is not None:
        last = (given[name].shape[1] if image is None else image) - 1
        for number in sorted({0, last // 3, last}):
            found.append(Change("image", number, {**given, name: _at(given[name], number)}))
    for name, text in _prompts(given).items():
        seen = next((m for m in _masks(given).values() if m.shape[1] == text.shape[1]), None)
        count = text.shape[1] if seen is None else max(1, int(seen[0].bool().sum()))
        for number in sorted({0, count - 1}):
            found.append(Change("text", number, {**given, name: _at(text, number)}))
    return found


def with_reference(given: Mapping[str, Any]) -> tuple[dict[str, Any], Change] | None:
    """(the call with a reference image beside the generated one, the same with one of its tokens replaced).

    For classes whose latents come packed, with ids that say which image a token belongs to; None for others, and
    where there is a reference already.
    """
    name, ids = latents_of(given), given.get("img_ids")
    if name is None or given[name].dim() != 3 or not isinstance(ids, Tensor) or ids.shape[-1] < 3:
        return None
    table = ids if ids.dim() == 2 else ids[0]
    if len(table) != given[name].shape[1] or bool((table[:, 0] != table[0, 0]).any()):
        return None
    other = ids.clone()
    other[..., 0] += 1
    latents = torch.cat([given[name], _noise(given[name])], 1)
    made = {**given, name: latents, "img_ids": torch.cat([ids, other], ids.dim() - 2)}
    number = latents.shape[1] - 1
    return made, Change("reference", number, {**made, name: _at(latents, number)})


def longer(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same call with a longer prompt; None where there is none."""
    return _extended(given, 1.0)


def padded(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(the call with a mask of its whole prompt, the same with padding after it); None where there is no mask."""
    masks = _masks(given)
    if not masks:
        return None
    whole = {**given, **{name: torch.ones_like(mask) for name, mask in masks.items()}}
    more = _extended(whole, 0.0)
    return None if more is None else (whole, more)


def _masks(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks of the prompt: (B, tokens), as many as it has."""
    lengths = {text.shape[1] for text in _prompts(given).values()}
    return {
        name: value for name, value in given.items()
        if name.endswith(MASK) and isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] in lengths
    }  # fmt: skip


def _extended(given: Mapping[str, Any], mask: float) -> dict[str, Any] | None:
    prompts = _prompts(given)
    if not prompts:
        return None
    made = dict(given)
    for name, text in prompts.items():
        made[name] = torch.cat([text, _noise(text[:, :MORE])], 1)
    for name, held in _masks(given).items():
        made[name] = torch.cat([held, torch.full_like(held[:, :MORE], mask)], 1)
    places = given.get("txt_ids")
    if isinstance(places, Tensor):
        axis = places.dim() - 2
        made["txt_ids"] = torch.cat([places, places.narrow(axis, 0, MORE)], axis)
    return made


def _prompts(given: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value for name, value in given.items()
        if name.startswith(PROMPT) and isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
    }  # fmt: skip


def _at(tokens: Tensor, number: int) -> Tensor:
    changed = tokens.clone()
    changed[:, number] += _noise(changed[:, number])
    return changed


def _noise(like: Tensor) -> Tensor:
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(SEED))
    return drawn.to(like.device, like.dtype) * 2
