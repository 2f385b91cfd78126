"""Small helpers for the diffusers tests: inputs by family, calls watched as they pass, layers scaled by hand."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from oracle import models
from oracle.entropy import halved, unet_level
from torch import nn

from trainless.edits.journal import Journal
from trainless.engine.runtime import Runtime
from trainless.hosts.diffusers.host import DiffusersHost
from trainless.seams import AttentionCall, Entry, Lease, Scale

TRAINED = 128  # pixels; the tiny models' sample_size is 16


def stable_diffusion(unet: nn.Module | None = None) -> Any:
    """A pipeline around a tiny UNet, without the parts that a patch needs nothing of; 8 pixels per latent."""
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=models.build("unet") if unet is None else unet,
        feature_extractor=None, scheduler=diffusers.DDIMScheduler(), safety_checker=None,
        requires_safety_checker=False,
    )  # fmt: skip


def run(model: nn.Module, family: str, height: int = 24, width: int = 20, **more: Any) -> torch.Tensor:
    """One call of the denoiser on fixed inputs of that latent size."""
    dtype = next(model.parameters()).dtype
    given = models.inputs(family, height=height, width=width)
    given = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in given.items()}
    return model(**given, **more)[0]


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """Collect every AttentionCall that the host hands to the engine; nothing is changed."""
    host, calls, lease, journal = DiffusersHost(), [], Lease("watch"), Journal()
    lease.active = True
    runtimes = []
    for site in host.sites(model):
        runtime = Runtime(site)
        look = Scale(lambda call, statistics, state: calls.append(call))
        runtime.add([Entry("watch", lease, look)])
        host.install(runtime)
        runtimes.append(runtime)
    host.install_model(model, journal, runtimes)
    try:
        yield calls
    finally:
        for runtime in runtimes:
            assert runtime.journal.undo() == []
        assert journal.undo() == []


def scaled_by_hand(model: nn.Module, height: int, width: int) -> nn.Module:
    """A copy of a tiny UNet with the query projections of self-attention times the entropy factor."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if name.endswith("attn1"):
            level = unet_level(name, 3)
            now, trained = (halved(h, level) * halved(w, level) for h, w in ((height, width), (16, 16)))
            module.to_q.weight.mul_(math.sqrt(math.log(now) / math.log(trained)))
    return copied
