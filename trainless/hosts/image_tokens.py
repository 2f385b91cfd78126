"""What the user may say about image tokens; apart from the host, so that asking imports no library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import InputError

# Where a multimodal model keeps its reader while something asks for image tokens.
READER = "_trainless_images"


@contextmanager
def image_tokens(model: nn.Module, mask: Tensor | Sequence[Sequence[bool]]) -> Iterator[None]:
    """Inside, ``mask`` says which tokens of a prompt stand for images; for prompts given as ``inputs_embeds``.

    mask: bool (B, L), True on image tokens, one row for each prompt and one entry for each of its tokens,
    padding included. Tokens that come after the prompt are read from ``input_ids`` as always. A batch that
    ``generate`` widens (beams, several answers) takes each row as often as needed.

    Raises InputError when nothing on ``model`` asks for image tokens, and during a call whose prompt does not
    fit the mask.
    """
    told = torch.as_tensor(mask)
    if told.dtype != torch.bool or told.dim() != 2:
        raise InputError(f"image_tokens: a mask of {told.dtype}, {told.dim()}-D; bool (B, L) is needed")
    readers = [r for m in model.modules() if (r := vars(m).get(READER)) is not None]
    if not readers:
        raise InputError(
            "image_tokens: nothing on this model asks which tokens are images; patch it first, then say so"
        )
    before = [reader.given for reader in readers]
    try:
        for reader in readers:
            reader.given = told
        yield
    finally:
        for reader, old in zip(readers, before, strict=True):
            reader.given = old
