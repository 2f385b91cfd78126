"""Train demo:shapes, a text-to-image pipeline for scenes of coloured shapes, from nothing.

    python examples/shapes/train_pipeline.py --out out/shapes --minutes 110 --export out/demo-shapes

With --denoiser transformer it is demo:shapes-dit: a transformer in place of the UNet, over the same autoencoder, which
is taken from --out if it is there.

Three stages, one after the other: the autoencoder; denoiser and text encoder together, on latents that are computed
once, where the noise leaves nothing of the picture and the caption alone says what goes where; then both at all levels
of noise, half of it where little is left. Kill it whenever you like; the same command takes it up again. With
--minutes the stages share that time; without, they take all their steps (and the weights depend on the seed alone).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pipeline_models as models
import torch
import training
import transformer_models
from arguments import positive
from scenes import KNOWN, RELATIONS, SIDE, Array, caption, draw, rng_for, sample_scene, vocabulary
from torch import Tensor, nn
from tqdm import tqdm
from world import sample_picture

VAE, LATENTS, UNET, PROMPTS, LAYOUT = range(5)  # what random numbers are for
PARTS: dict[str, Any] = {"unet": models, "transformer": transformer_models}  # what goes over the autoencoder
VAE_SHARE, LAYOUT_SHARE = 0.2, 0.28  # of the minutes


@dataclass(frozen=True)
class Setting:
    sizes: models.Sizes
    vae: training.Plan
    layout: training.Plan
    unet: training.Plan
    vae_batch: int
    unet_batch: int
    scenes: int  # that latents are computed of
    fine: int = 300  # times below which pictures outweigh noise
    drop: float = 0.1  # captions left out, so that guidance has something to guide away from
    where_share: float = 0.7  # of captions with a place or a relation, half each, when layouts are learnt


FULL = Setting(
    models.FULL,
    vae=training.Plan(steps=2000, rate=1.5e-3, average=0.995),
    layout=training.Plan(steps=2500, rate=1e-3, average=0.99, final=1.0),
    unet=training.Plan(steps=5000, rate=1e-3, warmup=200, average=0.9985),
    vae_batch=16, unet_batch=32, scenes=40_000,
)  # fmt: skip
TINY = Setting(
    models.TINY,
    vae=training.Plan(steps=3, rate=1e-3, warmup=1),
    layout=training.Plan(steps=3, rate=1e-3, warmup=1),
    unet=training.Plan(steps=3, rate=1e-3, warmup=1),
    vae_batch=2, unet_batch=2, scenes=8,
)  # fmt: skip


def batch(images: Sequence[Array], device: torch.device) -> Tensor:
    """Pictures (H, W, 3) in 0..1 as (B, 3, H, W) in -1..1."""
    stacked = torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2)
    return (stacked * 2 - 1).contiguous().to(device)


def spread(number: int, generator: torch.Generator) -> Tensor:
    """One number from each of ``number`` equal parts of 0..1, in any order: every batch sees all levels of noise."""
    return (torch.randperm(number, generator=generator) + torch.rand(number, generator=generator)) / number


class PipelineTraining:
    """All stages in one folder."""

    def __init__(self, setting: Setting, out: Path, *, seed: int, device: torch.device, minutes: float | None,
                 save_every: float, dtype: str, denoiser: str = "unet"):  # fmt: skip
        self.setting, self.out, self.seed, self.device = setting, out, seed, device
        self.minutes, self.save_every, self.dtype, self.denoiser = minutes, save_every, dtype, denoiser
        torch.manual_seed(seed)  # of the first weights
        self.vae = models.build_vae(setting.sizes).to(device)
        self.parts = PARTS[denoiser]
        self.tokenizer = self.parts.build_tokenizer()
        self.painter = self.parts.Painter(
            self.parts.build_denoiser(setting.sizes),
            self.parts.build_text_encoder(setting.sizes, self.tokenizer),
        ).to(device)
        self.recorded: nn.Module | None = None
        self.stages: dict[str, dict[str, Any]] = {}

    def stage(
        self, name: str, module: nn.Module, plan: training.Plan, minutes: float | None, more: Any = None
    ) -> training.Stage:
        sizes = self.setting.sizes  # an autoencoder may go on with another denoiser
        settings = {"sizes": repr(sizes.vae if name == "vae" else sizes), "dtype": self.dtype, **(more or {})}
        return training.Stage(
            name, nn.ModuleDict({name: module}), plan, self.out, seed=self.seed, minutes=minutes,
            save_every=self.save_every, settings=settings,
        )  # fmt: skip

    def run(self) -> None:
        share = None if self.minutes is None else self.minutes * VAE_SHARE
        self.settle_type()
        stage = self.stage("vae", self.vae, self.setting.vae, share)
        stage.run(self.vae_loss, before=self.out / "latents.pt")
        self.stages["vae"] = stage.summary()
        # A denoiser belongs to one autoencoder: trained further, that would leave it latents it never saw.
        more = {"steps of the vae": stage.step, "batch": self.setting.unet_batch}
        layout = "layout" if self.denoiser == "unet" else f"layout-{self.denoiser}"
        plans = {layout: self.setting.layout, self.denoiser: self.setting.unet}
        for name, plan in plans.items():  # one of another autoencoder is refused before its latents are lost
            self.stage(name, self.painter, plan, None, more).kept()
        latents, ids, seconds = self.latents(stage.step)
        spent = (stage.seconds + seconds) / 60
        losses = {
            layout: partial(self.layout_loss, weights=self.layout_weights(ids)),
            self.denoiser: self.unet_loss,
        }
        for name, plan in plans.items():
            share = None
            if self.minutes is not None:
                share = self.minutes - spent
                if name == layout:
                    share = min(share, self.minutes * LAYOUT_SHARE)
            stage = self.stage(name, self.painter, plan, share, more)
            stage.run(
                partial(losses[name], latents=latents, ids=ids),
                before=self.out / f"{self.denoiser}.pt" if name == layout else None,
            )
            self.stages[name] = stage.summary()
            spent += stage.seconds / 60

    def settle_type(self) -> None:
        def loss(name: str) -> Tensor:
            self.dtype = name
            return self.vae_loss(1)[0]

        self.dtype = training.settle_type(self.dtype, self.out / "dtype.json", self.device, loss)

    # ------------------------------------------------------------ the autoencoder

    def vae_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_for(self.seed, VAE, step)
        # Every fourth batch is larger pictures, so that the decoder is no weak point at other sizes.
        side, number = (
            (SIDE, self.setting.vae_batch) if step % 4 else (96, max(self.setting.vae_batch * 4 // 9, 1))
        )
        pixels = batch([draw(sample_picture(rng, side, side)) for _ in range(number)], self.device)
        with training.autocast(self.device, self.dtype):
            latent = self.vae.encode(pixels).latent_dist
            noise = torch.randn(
                latent.mean.shape,
                generator=training.noise_for(self.device, self.seed, VAE, step),
                device=self.device,
            )
            decoded = self.vae.decode(latent.mean + latent.std * noise).sample
        ground = pixels.flatten(2).median(-1).values[..., None, None]
        weight = 1 + 3 * ((pixels - ground).abs().amax(1, keepdim=True) > 0.1)  # most pixels are background
        difference = decoded.float() - pixels
        rebuilt = (weight * (difference.abs() + difference.square())).mean()
        spread = latent.kl().mean() / latent.mean[0].numel()
        return rebuilt + 2e-4 * spread, {"mae": difference.abs().mean().item(), "kl": spread.item()}

    # ------------------------------------------------------------ latents, once

    @torch.no_grad()
    def latents(self, steps: int) -> tuple[Tensor, Tensor, float]:
        """Latents (N, 4, 16, 16) of captioned scenes, tokens of their captions, and the seconds that it took.

        Kept in a file, with the ``steps`` of the autoencoder that made them; it is normalised by them.
        """
        file, began = self.out / "latents.pt", time.monotonic()
        if not file.exists() or training.read(file, mmap=True)["steps of the vae"] != steps:
            rng, size = rng_for(self.seed, LATENTS), min(64, self.setting.scenes)
            means, captions = [], []
            for _ in tqdm(range(self.setting.scenes // size), desc="latents", dynamic_ncols=True):
                scenes = [sample_scene(rng) for _ in range(size)]
                captions += [caption(request) for request, _ in scenes]
                pixels = batch([draw(scene) for _, scene in scenes], self.device)
                means.append(self.vae.encode(pixels).latent_dist.mean.float().cpu())
            latents = torch.cat(means)
            mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
            latents = (latents - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
            found = {
                "latents": latents.half(),
                "captions": captions,
                "mean": mean,
                "std": std,
                "seconds": time.monotonic() - began,
                "steps of the vae": steps,
            }
            training.write_atomically(file, found)
        found = training.read(file)
        models.normalise(self.vae, found["mean"].to(self.device), found["std"].to(self.device))
        return found["latents"], models.tokens(self.tokenizer, found["captions"]), found["seconds"]

    # ------------------------------------------------------------ denoiser and text encoder

    def layout_weights(self, ids: Tensor) -> Tensor:
        """(N,): how often each caption (N, L) is to be drawn when layouts are learnt."""
        shares = ((1 - self.setting.where_share), self.setting.where_share / 2, self.setting.where_share / 2)
        weights = torch.zeros(len(ids), dtype=torch.float64)
        for share, kind in zip(shares, self.kinds(ids), strict=True):
            weights[kind] = share / max(int(kind.sum()), 1)
        return weights

    def layout_loss(
        self, step: int, latents: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """From noise alone, at the last time, and mostly with captions that say where things are.

        Everywhere else a batch can be denoised without knowing it: words of places stay without effect, and later
        they are much harder to learn than at the beginning.
        """
        number = self.setting.unet_batch
        generator = training.noise_for(torch.device("cpu"), self.seed, LAYOUT, step)
        chosen = torch.multinomial(weights, number, replacement=True, generator=generator)
        return self.denoise(latents[chosen], ids[chosen], torch.full((number,), 999.0), generator)

    def unet_loss(self, step: int, latents: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Half at all levels of noise; half where little is left and edges say a circle from a star.

        A schedule that hides things leaves few of its times to what they look like.
        """
        number = self.setting.unet_batch
        generator = training.noise_for(torch.device("cpu"), self.seed, UNET, step)
        chosen = torch.randint(len(latents), (number,), generator=generator)
        some = number // 2
        times = torch.cat(
            [spread(some, generator) * self.setting.fine, spread(number - some, generator) * 1000]
        )
        return self.denoise(latents[chosen], ids[chosen], times, generator)

    def denoise(
        self, latents: Tensor, ids: Tensor, times: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of the velocity that is predicted for ``latents`` (B, 4, h, w) noised to ``times`` (B,), 0..1000."""
        clean, words, times = latents.float(), ids.clone(), times.long().clamp(max=999)
        words[torch.rand(len(words), generator=generator) < self.setting.drop] = self.empty
        noise = torch.randn(clean.shape, generator=generator)
        scheduler = models.build_scheduler()
        noisy, target = scheduler.add_noise(clean, noise, times), scheduler.get_velocity(clean, noise, times)
        inputs = (noisy.to(self.device), times.to(self.device), words.to(self.device))
        with training.autocast(self.device, self.dtype):
            if self.recorded is None:
                self.recorded = training.recorded(self.painter, inputs)
            made = self.recorded(*inputs)
        return (made.float() - target.to(self.device)).square().mean(), {}

    def kinds(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """bool (N,): captions (N, L) that say nothing of where things are, that name a place, and a relation."""

        def holds(words: Iterable[str]) -> Tensor:
            return torch.isin(ids, torch.tensor(models.word_ids(self.tokenizer, words))).any(1)

        place = holds(["at"])
        relation = holds(name.split()[0] for name in RELATIONS) & ~place
        return ~place & ~relation, place, relation

    @property
    def empty(self) -> Tensor:
        return models.tokens(self.tokenizer, [""])[0]

    # ------------------------------------------------------------ export

    def export(self, folder: Path, prompts: int) -> None:
        """The pipeline in bfloat16 with TRAINED.md, scored by the reader on ``prompts`` new captions."""
        from evaluate import load_pipeline, score_pipeline

        pipeline = self.parts.assemble(self.vae, self.painter, self.tokenizer, torch.bfloat16)
        pipeline.save_pretrained(folder)
        training.write_vocabulary(folder, vocabulary(), KNOWN)
        loaded = load_pipeline(str(folder)).to(self.device)
        scores = (
            score_pipeline(loaded, prompts=prompts, sizes=[(SIDE, SIDE)], seed=self.seed + 1)
            if prompts
            else {}
        )
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "seed": self.seed,
            "device": training.name_of(self.device),
            "threads": torch.get_num_threads(),
            "dtype of training": self.dtype,
            "parameters": models.parameters(self.vae, self.painter),
            "bytes of weights": training.size_of(folder),
            "settings": json.dumps(asdict(self.setting)),
            "torch": torch.__version__,
        }
        training.write_report(folder, self.parts.NAME, facts, self.stages, scores)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/shapes"), help="checkpoints; taken up if there are any"
    )
    parser.add_argument("--denoiser", choices=list(PARTS), default="unet")
    parser.add_argument("--export", type=Path, help="folder for the finished pipeline, in bfloat16")
    parser.add_argument("--minutes", type=training.minutes, help="time for all stages, earlier runs included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch",
        type=positive,
        help=f"captions in a step of the denoiser (default: {FULL.unet_batch}); a GPU has room for 256",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the faster one"
    )
    parser.add_argument("--save-seconds", type=float, default=60, help="between checkpoints")
    parser.add_argument(
        "--score-prompts", type=int, default=128, help="captions that the exported pipeline paints"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="three steps of a model that learns nothing, for tests"
    )
    given = parser.parse_args(arguments)
    setting = TINY if given.tiny else FULL
    if given.batch is not None:
        setting = replace(setting, unet_batch=given.batch)
    torch.backends.cuda.matmul.allow_tf32 = True  # as its convolutions are anyway
    try:
        training.check_export(given.export, given.score_prompts > 0)
        work = PipelineTraining(
            setting, given.out, seed=given.seed, device=torch.device(given.device),
            minutes=given.minutes, save_every=given.save_seconds, dtype=given.dtype, denoiser=given.denoiser,
        )  # fmt: skip
        work.run()
        if given.export:
            work.export(given.export, given.score_prompts)
            print(f"exported to {given.export}", file=sys.stderr)
    except training.Unusable as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
