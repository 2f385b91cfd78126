"""Text from prompts: what is sent, what fits, and one batch at a time through ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError, Unsupported
from ..models import Description, Loaded
from . import chat as chats
from . import params as parameters
from .engine import Output
from .items import Item, ItemFaults
from .keys import Job
from .rows import RowChoice, RowEnd, cut

DEFAULT_NEW_TOKENS = 64
# What decoding needs to know about the checkpoint's special tokens; nothing else of its generation
# config is used: decoding is greedy unless an item says otherwise, whatever the checkpoint prefers.
_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


class TextEngine:
    """Decoder-only and encoder-decoder language models."""

    media = False

    def __init__(
        self,
        description: Description,
        max_new_tokens: int | None,
        size: Any,
        steps: int | None,
        chat: chats.Chat = chats.RAW,
    ):
        self.description, self.chat = description, chat
        self.new_tokens = max_new_tokens or DEFAULT_NEW_TOKENS
        self.loaded: Loaded | None = None
        self.notes: list[str] = []

    @property
    def tokenizer(self) -> Any:
        return self.description.tokenizer

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        return {"tokenizer": self.tokenizer}

    # ------------------------------------------------------------ before weights

    @property
    def template(self) -> Any:
        """The chat template, or None."""
        return getattr(self.tokenizer, "chat_template", None)

    def prepare(self, jobs: Sequence[Job], faults: ItemFaults) -> None:
        if self.chat.plain and not self.template:
            raise InputError(
                f"--chat: {self.description.spec} has no chat template; leave --chat and --system out, and prompts "
                "are sent as they are"
            )
        done: dict[int, tuple[list[int], tuple[str, str] | None]] = {}
        for job in jobs:
            item = job.item
            if id(item) not in done:
                done[id(item)] = ([], None)
                if self._usable(item, faults):
                    tokens = self._tokens(item, faults)
                    done[id(item)] = (tokens, self._too_long(item, len(tokens)))
            job.tokens, job.refusal = done[id(item)]
            job.length = len(job.tokens)
        items = {id(job.item): job.item for job in jobs}.values()
        self.notes += chats.note(items, self.description.spec, self.template, self.chat)

    def _usable(self, item: Item, faults: ItemFaults) -> bool:
        before = len(faults.found)
        name = f"{self.description.spec} writes text and"
        for field, used in (("images", item.images), ("negative_prompt", item.negative_prompt)):
            if used:
                faults.add(item.where, f"{name} takes no {field}")
        parameters.check_params(item.params, parameters.TEXT, self.description.spec, item.where, faults)
        for message in item.messages or []:
            if not isinstance(message["content"], str) and any(
                p["type"] != "text" for p in message["content"]
            ):
                faults.add(item.where, f"{name} takes no image parts in messages")
        if item.messages is not None and not self.template:
            faults.add(item.where, f"{self.description.spec} has no chat template: give prompt, not messages")
        return len(faults.found) == before

    def _tokens(self, item: Item, faults: ItemFaults) -> list[int]:
        tokenizer, messages = self.tokenizer, self.chat.messages(item)
        try:
            if messages is None:
                tokens = tokenizer(item.prompt, verbose=False)["input_ids"]
            else:
                text = tokenizer.apply_chat_template(
                    flat(messages), add_generation_prompt=True, tokenize=False
                )
                tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # chat templates raise what they like
            what = "these messages" if item.messages is not None else "this prompt"
            faults.add(item.where, f"the chat template refuses {what} ({str(error)[:160]})")
            return []
        if not tokens or not (item.prompt or item.messages):
            faults.add(item.where, "the prompt is empty")
        return list(tokens)

    def _too_long(self, item: Item, length: int) -> tuple[str, str] | None:
        limit, new = self.description.positions, self._limit(item)
        if limit is None:
            return None
        if self.description.encoder_decoder:
            need, said = max(length, new), f"{length} prompt tokens, {new} new tokens"
        else:
            need, said = length + new, f"{length} prompt tokens and {new} new tokens"
        if need <= limit:
            return None
        return (
            "PromptTooLong",
            f"{said}: the model has {limit} positions; shorten the prompt or ask for fewer tokens",
        )

    def _limit(self, item: Item) -> int:
        return int(item.params.get("max_new_tokens", self.new_tokens))

    # ------------------------------------------------------------ batches

    def order(self, job: Job) -> tuple[Any, ...]:
        return (-job.length, -self._limit(job.item), job.key)

    def together(self, a: Job, b: Job) -> bool:
        return True

    def cost(self, jobs: Sequence[Job]) -> int:
        return len(jobs) * (max(j.length for j in jobs) + max(self._limit(j.item) for j in jobs))

    def start(self, loaded: Loaded) -> None:
        from transformers import GenerationConfig

        self.loaded = loaded
        own = loaded.model.generation_config
        known = {name: getattr(own, name, None) for name in _TOKENS}
        known = {name: value for name, value in known.items() if value is not None}
        ends = known.get("eos_token_id", self.tokenizer.eos_token_id)
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = own.pad_token_id
        pad = pad if isinstance(pad, int) else self.tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.ends[0] if self.ends else 0
        # generate() fills what a call leaves open from the model's own config, so that one is replaced.
        loaded.model.generation_config = GenerationConfig(pad_token_id=self.pad, do_sample=False, **known)

    def inputs(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """What ``generate`` is called with: at least input_ids and attention_mask (B, L), padded on the left."""
        assert self.loaded is not None
        width = max(job.length for job in jobs)
        rows = [[self.pad] * (width - job.length) + job.tokens for job in jobs]
        ids = torch.tensor(rows, device=self.loaded.device)
        mask = torch.ones_like(ids)
        for i, job in enumerate(jobs):
            mask[i, : width - job.length] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def generate(self, jobs: Sequence[Job]) -> list[Output]:
        assert self.loaded is not None
        model, device, tokenizer = self.loaded.model, self.loaded.device, self.tokenizer
        given = self.inputs(jobs)
        ids = given["input_ids"]
        skip = [ids.shape[1] - job.length for job in jobs]
        # An encoder-decoder writes into a sequence of its own, which starts with one token.
        start = 1 if self.description.encoder_decoder else ids.shape[1]
        limits = [self._limit(job.item) for job in jobs]
        stops = [_stops(job.item) for job in jobs]
        end = RowEnd(start, limits, self.ends, stops, tokenizer)
        pads = [0] * len(jobs) if self.description.encoder_decoder else skip
        choice = RowChoice([job.item.params for job in jobs], [job.seed for job in jobs], pads, device)
        with torch.inference_mode():
            written = model.generate(
                **given,
                max_new_tokens=max(limits),
                stopping_criteria=[end],
                **({"logits_processor": [choice]} if choice.needed else {}),
            )
        if not self.description.encoder_decoder and not torch.equal(written[:, :start], ids):
            raise Unsupported(
                f"{type(model).__name__}.generate does not return the prompt with what it wrote, so that its "
                "texts cannot be told apart; batch generation cannot run it"
            )
        outputs = []
        for row, length, stop in zip(written[:, start:].cpu(), end.lengths.tolist(), stops, strict=True):
            text = tokenizer.decode(row[:length], skip_special_tokens=True)
            outputs.append(Output(text=cut(text, stop), tokens_out=length))
        return outputs


def flat(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contents as strings: many templates know nothing of parts."""
    return [
        {
            **m,
            "content": m["content"]
            if isinstance(m["content"], str)
            else "".join(p["text"] for p in m["content"]),
        }
        for m in messages
    ]


def _stops(item: Item) -> list[str]:
    stop = item.params.get("stop", [])
    return [stop] if isinstance(stop, str) else list(stop)
