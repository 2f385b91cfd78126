"""Train demo:shapes-vlm, a LLaVA-style model that describes pictures of shapes and answers questions, from nothing.

    python examples/shapes/train_vlm.py --out out/shapes-vlm --minutes 110 --export out/demo-shapes-vlm

Two stages, one after the other: the vision tower alone learns what each patch shows; then tower, projector and
decoder learn captions and answers end to end. Kill it whenever you like; the same command takes it up again.
With --minutes the stages share that time; without, they take all their steps (and the weights depend on the seed
alone).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import training
import vlm_models as models
from pool import Pool
from questions import KNOWN, describe, sample_questions, words
from scenes import COLOURS, SHAPES, Array, Scene, rng_for
from torch import Tensor, nn
from world import photograph

TOWER, ANSWERS = 10, 11  # what random numbers are for
TOWER_SHARE = 0.15  # of the minutes


@dataclass(frozen=True)
class Setting:
    sizes: models.Sizes
    tower: training.Plan
    answers: training.Plan
    tower_batch: int
    batch: int
    scenes: int  # that are drawn once and seen with new blur, noise and questions each time
    questions: int = 8  # for each picture, beside its caption
    aid: float = 0.1  # weight of what each patch shows while answers are learnt


FULL = Setting(
    models.FULL,
    tower=training.Plan(steps=3500, rate=1e-3, average=0.998),
    answers=training.Plan(steps=4500, rate=1e-3, warmup=200, average=0.9985),
    tower_batch=64, batch=32, scenes=60_000,
)  # fmt: skip
TINY = Setting(
    models.TINY,
    tower=training.Plan(steps=3, rate=1e-3, warmup=1),
    answers=training.Plan(steps=3, rate=1e-3, warmup=1),
    tower_batch=2, batch=2, scenes=8, questions=3,
)  # fmt: skip


def patch_labels(scenes: Sequence[Scene], side: int, patch: int) -> tuple[Tensor, Tensor]:
    """Colour and shape of the thing nearest to the middle of each patch, if it reaches there: (B, N) each.

    0 is the background.
    """
    middles = (np.arange(side // patch) + 0.5) * patch
    colours = np.zeros((len(scenes), len(middles), len(middles)), np.int64)
    shapes = np.zeros_like(colours)
    for b, scene in enumerate(scenes):
        for thing in scene.things:
            near = np.hypot(middles[None, :] - thing.x, middles[:, None] - thing.y) < thing.radius + patch / 4
            colours[b][near] = 1 + list(COLOURS).index(thing.colour)
            shapes[b][near] = 1 + SHAPES.index(thing.shape)
    return torch.from_numpy(colours).flatten(1), torch.from_numpy(shapes).flatten(1)


class VlmTraining:
    """Both stages in one folder."""

    def __init__(self, setting: Setting, out: Path, *, seed: int, device: torch.device, minutes: float | None,
                 save_every: float, dtype: str):  # fmt: skip
        self.setting, self.out, self.seed, self.device = setting, out, seed, device
        self.minutes, self.save_every, self.dtype = minutes, save_every, dtype
        torch.manual_seed(seed)  # of the first weights
        self.processor = models.build_processor(setting.sizes)
        self.tokenizer = self.processor.tokenizer
        self.model = models.build_model(setting.sizes, self.tokenizer).to(device)
        self.aid = models.PatchReader(setting.sizes).to(device)
        self.stages: dict[str, dict[str, Any]] = {}
        self.pool: Pool | None = None

    def run(self) -> None:
        self.pool = Pool(self.out / "pool.npz", self.setting.scenes, self.seed)
        self.settle_type()
        tower = self.model.model.vision_tower
        share = None if self.minutes is None else self.minutes * TOWER_SHARE
        modules = nn.ModuleDict({"tower": tower, "aid": self.aid})
        self.stages["tower"] = self.stage(
            "tower", modules, self.setting.tower, share, self.tower_loss, self.out / "answers.pt"
        )
        rest = (
            None
            if self.minutes is None
            else self.minutes - self.stages["tower"]["minutes"] - self.pool.seconds / 60
        )
        modules = nn.ModuleDict({"model": self.model, "aid": self.aid})
        self.stages["answers"] = self.stage("answers", modules, self.setting.answers, rest, self.answers_loss)

    def stage(
        self,
        name: str,
        modules: nn.ModuleDict,
        plan: training.Plan,
        minutes: float | None,
        loss: training.Loss,
        before: Path | None = None,
    ) -> dict[str, Any]:
        settings = {"sizes": repr(self.setting.sizes), "dtype": self.dtype}
        stage = training.Stage(
            name, modules, plan, self.out, seed=self.seed, minutes=minutes, save_every=self.save_every,
            settings=settings,
        )  # fmt: skip
        stage.run(loss, before)
        return stage.summary()

    def settle_type(self) -> None:
        def loss(name: str) -> Tensor:
            self.dtype = name
            return self.answers_loss(0)[0]

        self.dtype = training.settle_type(self.dtype, self.out / "dtype.json", self.device, loss)

    # ------------------------------------------------------------ losses

    def pictures(self, number: int, *numbers: int) -> tuple[list[Scene], Array, np.random.Generator]:
        assert self.pool is not None
        rng = rng_for(self.seed, *numbers)
        chosen = rng.integers(len(self.pool), size=number)
        return [self.pool.scene(int(i)) for i in chosen], photograph(self.pool.images(chosen), rng), rng

    def tower_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes, images, _ = self.pictures(self.setting.tower_batch, TOWER, step)
        with training.autocast(self.device, self.dtype):
            # The layer that the decoder reads; the last one learns nothing here.
            features = self.model.model.vision_tower(
                pixel_values=models.pixels(images, self.device), output_hidden_states=True
            ).hidden_states[self.model.config.vision_feature_layer]
            return self.aid_loss(features[:, 1:], scenes)

    def aid_loss(self, features: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, dict[str, float]]:
        colour, shape = self.aid(features)
        is_colour, is_shape = (
            t.to(self.device) for t in patch_labels(scenes, self.image_side, self.setting.sizes.patch)
        )
        loss = F.cross_entropy(colour.float().flatten(0, 1), is_colour.flatten()) + F.cross_entropy(
            shape.float().flatten(0, 1), is_shape.flatten()
        )
        right = (shape.argmax(-1) == is_shape)[is_shape > 0].float().mean().item()
        return loss, {"patch shapes": right}

    @property
    def image_side(self) -> int:
        return int(self.model.config.vision_config.image_size)

    def answers_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes, images, rng = self.pictures(self.setting.batch, ANSWERS, step)
        turns = []
        for scene in scenes:
            asked = [*sample_questions(scene, rng, self.setting.questions), describe(scene)]
            turns.append([(question.text, question.answer) for question in asked])
        packed = models.pack(self.tokenizer, turns, self.model.config.image_seq_length)
        labels = packed.labels.to(self.device)
        with training.autocast(self.device, self.dtype):
            hidden = self.model.model.vision_tower(
                pixel_values=models.pixels(images, self.device), output_hidden_states=True
            ).hidden_states[self.model.config.vision_feature_layer][:, 1:]
            seen = self.model.model.multi_modal_projector(hidden)
            embedded = self.model.get_input_embeddings()(packed.ids.to(self.device))
            embedded = torch.cat(
                [embedded[:, :1], seen.to(embedded.dtype), embedded[:, 1 + seen.shape[1] :]], 1
            )
            out = self.model.model.language_model(
                inputs_embeds=embedded,
                attention_mask=packed.mask.to(self.device),
                position_ids=packed.positions.to(self.device),
                use_cache=False,
            ).last_hidden_state
            learnt = labels[:, 1:] != -100  # only there is a word to predict: spares most of the head's work
            logits = self.model.lm_head(out[:, :-1][learnt])
            wanted = labels[:, 1:][learnt]
            answers = F.cross_entropy(logits.float(), wanted)
            aid, shown = self.aid_loss(hidden, scenes)
        right = (logits.argmax(-1) == wanted).float().mean().item()
        return answers + self.setting.aid * aid, {"answers": answers.item(), "words right": right, **shown}

    # ------------------------------------------------------------ export

    def export(self, folder: Path, pictures: int) -> None:
        """Model and processor in bfloat16 with TRAINED.md, scored on ``pictures`` new ones."""
        from evaluate import load_vlm, score_vlm

        self.model.to("cpu", torch.bfloat16).eval().save_pretrained(folder)
        self.processor.save_pretrained(folder)
        training.write_vocabulary(folder, words(), KNOWN)
        scores = score_vlm(*load_vlm(str(folder)), pictures=pictures, seed=self.seed + 1) if pictures else {}
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "seed": self.seed,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "dtype of training": self.dtype,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "bytes of weights": training.size_of(folder),
            "settings": json.dumps(asdict(self.setting)),
            "torch": torch.__version__,
        }
        training.write_report(folder, "demo:shapes-vlm", facts, self.stages, scores)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/shapes-vlm"), help="checkpoints; taken up if any"
    )
    parser.add_argument("--export", type=Path, help="folder for the finished model, in bfloat16")
    parser.add_argument(
        "--minutes", type=training.minutes, help="time for both stages, earlier runs included"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the faster one"
    )
    parser.add_argument("--save-seconds", type=float, default=60, help="between checkpoints")
    parser.add_argument(
        "--score-pictures", type=int, default=200, help="pictures that the exported model is asked about"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="three steps of a model that learns nothing, for tests"
    )
    given = parser.parse_args(arguments)
    try:
        training.check_export(given.export, given.score_pictures > 0)
        work = VlmTraining(
            TINY if given.tiny else FULL, given.out, seed=given.seed, device=torch.device(given.device),
            minutes=given.minutes, save_every=given.save_seconds, dtype=given.dtype,
        )  # fmt: skip
        work.run()
        if given.export:
            work.export(given.export, given.score_pictures)
            print(f"exported to {given.export}", file=sys.stderr)
    except training.Unusable as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
