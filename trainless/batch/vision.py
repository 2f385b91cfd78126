"""Text from prompts with images, through the processor that comes with a vision-language model.

The processor decides how many tokens an image takes and what else the model needs to know about it. Each
prompt goes through it twice: alone, before weights are loaded, to find what is wrong with it and how long it
is; and with its batch. Every image is decoded in the first pass, so a broken file is found before anything
expensive starts; pixels are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import InputError, Unsupported
from ..models.describe import first_line
from ..models.extras import require
from . import params as parameters
from .chat import RAW, Chat
from .items import Item, ItemFaults
from .keys import Job
from .pictures import Picture, TooLargeError
from .text import TextEngine, flat

# What processors make for training only.
_NOT_INPUTS = ("labels",)


class ImagePrompts:
    """Items as a processor takes them. ``spec``: what the model is called; ``placeholder``: its image token.

    Raises Unsupported for a processor that reads no images.
    """

    def __init__(self, processor: Any, spec: str, placeholder: int | None, chat: Chat = RAW):
        require("PIL", f"reading images for {spec}")
        if not hasattr(processor, "image_processor"):
            raise Unsupported(
                f"{spec}: its processor ({type(processor).__name__}) reads no images; the folder needs the "
                "processor files of the checkpoint (preprocessor_config.json and others)"
            )
        self.processor, self.spec, self.placeholder = processor, spec, placeholder
        self.chat = chat
        self.tokenizer = processor.tokenizer
        marker = getattr(processor, "image_token", None)
        self.marker = str(marker) if marker is not None else None
        if self.tokenizer.pad_token is None:
            # Padded places are masked, so which token stands there makes no difference.
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self._broken: dict[Picture, str | None] = {}
        self._sent: dict[int, str] = {}  # by item: what goes to the processor

    @property
    def template(self) -> Any:
        """The chat template: the processor's own, or that of its tokenizer."""
        own = getattr(self.processor, "chat_template", None)
        return own or getattr(self.tokenizer, "chat_template", None)

    def check(self, item: Item, faults: ItemFaults) -> None:
        """Faults of what an item brings: images that are none, messages where there is no chat template."""
        if item.messages is not None and not self.template:
            faults.add(item.where, f"{self.spec} has no chat template: give prompt, not messages")
        for picture in item.images:
            if picture not in self._broken:
                self._broken[picture] = _broken(picture)
            if self._broken[picture]:
                faults.add(item.where, f"image {picture.name!r} {self._broken[picture]}")

    def tokens(self, item: Item, faults: ItemFaults) -> list[int]:
        """The tokens of a checked item; empty when a fault was added."""
        try:
            text = self._sent[id(item)] = self._text(item)
        except Exception as error:  # chat templates raise what they like
            what = "these messages" if item.messages is not None else "this prompt"
            faults.add(item.where, f"the chat template refuses {what} ({str(error)[:160]})")
            return []
        wrong = self._out_of_step(item, text)
        # Some processors put the images in themselves when a prompt has no placeholder at all; only they know.
        silent = (
            bool(wrong)
            and self._messages(item) is None
            and self.marker is not None
            and self.marker not in text
        )
        if wrong and not silent:
            faults.add(item.where, wrong)
            return []
        try:
            tokens = self.tensors([item])["input_ids"][0].tolist()
        except InputError:
            raise
        except Exception as error:
            faults.add(item.where, wrong or f"the processor refuses this prompt ({first_line(error)})")
            return []
        if not tokens or not (item.prompt or item.messages or item.images):
            faults.add(item.where, "the prompt is empty")
        if item.images and self.placeholder is not None and self.placeholder not in tokens:
            faults.add(item.where, wrong or "the processor gives the images no place in the prompt")
        return list(tokens)

    def group(self, item: Item) -> tuple[bool, bool]:
        """(without images, begins with its own first token): what a call of the processor has for all rows."""
        bos = self.tokenizer.bos_token
        # Templates often write the first token themselves, and it must not be written once more.
        begun = self._messages(item) is not None and bos is not None and self._sent[id(item)].startswith(bos)
        return not item.images, begun

    def tensors(self, items: Sequence[Item]) -> dict[str, Any]:
        """The processor's tensors for items of one group, padded on the left."""
        bare, begun = self.group(items[0])
        with _hushed():
            made = self.processor(
                text=[self._sent[id(item)] for item in items],
                images=None if bare else [[picture.open() for picture in item.images] for item in items],
                return_tensors="pt", padding=True, padding_side="left", truncation=False,
                **({"add_special_tokens": False} if begun else {}),
            )  # fmt: skip
        if "input_ids" not in made:
            raise InputError(
                f"{self.spec}: {type(self.processor).__name__} makes no tokens of a prompt; only models whose "
                "images stand among the tokens of a prompt are run"
            )
        found = {name: value for name, value in made.items() if name not in _NOT_INPUTS}
        found.setdefault("attention_mask", torch.ones_like(found["input_ids"]))
        return found

    def _messages(self, item: Item) -> list[dict[str, Any]] | None:
        return self.chat.messages(item, self.marker)

    def _text(self, item: Item) -> str:
        """What is sent to the processor: the prompt as it is, or the messages through the chat template."""
        sent = self._messages(item)
        if sent is None:
            return str(item.prompt)
        texts = [part["text"] for m in sent for part in _parts(m) if part["type"] == "text"]
        said: Exception | None = None
        # Templates of these models want lists of parts; some of text models know only strings, and would
        # print a list as Python does.
        for messages in ([{**m, "content": _parts(m)} for m in sent], _strings(sent)):
            try:
                text = self._render(messages) if messages is not None else ""
            except Exception as error:
                said = said or error
                continue
            if all(t.strip() in text for t in texts) and not (
                "'type': " in text and "'type': " not in "".join(texts)
            ):
                return text
        raise said or ValueError("what it makes of them does not hold their text")

    def _render(self, messages: list[dict[str, Any]]) -> str:
        with _hushed():
            return str(
                self.processor.apply_chat_template(
                    messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
                )
            )

    def _out_of_step(self, item: Item, text: str) -> str:
        """What is wrong with the number of placeholders in ``text``, or "" when it is that of the images."""
        if self.marker is None or (count := text.count(self.marker)) == len(item.images):
            return ""
        images = f"{len(item.images)} image" + "s" * (len(item.images) != 1)
        places = f"{count} placeholder" + "s" * (count != 1)
        if item.messages is not None or self.chat.plain:
            return f"the messages have {images}, and become a prompt with {places} {self.marker!r} for them"
        if count > len(item.images):
            return (
                f"the prompt has {places} {self.marker!r} and {images}; give the missing ones, or take it out"
            )
        return (
            f"the prompt has {places} {self.marker!r} and {images}; write {self.marker!r} where each image "
            "belongs, or give messages"
        )


class VisionEngine(TextEngine):
    """Vision-language models that read images through placeholder tokens in their prompt."""

    def prepare(self, jobs: Sequence[Job], faults: ItemFaults) -> None:
        description = self.description
        placeholder = getattr(description.config, "image_token_id", None)
        self.prompts = ImagePrompts(description.processor, description.spec, placeholder, self.chat)
        super().prepare(jobs, faults)

    @property
    def tokenizer(self) -> Any:
        return self.prompts.tokenizer

    @property
    def template(self) -> Any:
        return self.prompts.template

    def _usable(self, item: Item, faults: ItemFaults) -> bool:
        before, name = len(faults.found), self.description.spec
        if item.negative_prompt is not None:
            faults.add(item.where, f"{name} writes text and takes no negative_prompt")
        parameters.check_params(item.params, parameters.TEXT, name, item.where, faults)
        self.prompts.check(item, faults)
        return len(faults.found) == before

    def _tokens(self, item: Item, faults: ItemFaults) -> list[int]:
        return self.prompts.tokens(item, faults)

    def order(self, job: Job) -> tuple[Any, ...]:
        return (self.prompts.group(job.item), *super().order(job))

    def together(self, a: Job, b: Job) -> bool:
        return self.prompts.group(a.item) == self.prompts.group(b.item)

    def inputs(self, jobs: Sequence[Job]) -> dict[str, Any]:
        assert self.loaded is not None
        given = self.prompts.tensors([job.item for job in jobs])
        for row, mask, job in zip(given["input_ids"], given["attention_mask"], jobs, strict=True):
            if row[mask.bool()].tolist() != job.tokens or bool((mask.diff() < 0).any()):
                raise InputError(
                    f"{job.item.where}: the processor makes other tokens of this prompt in a batch than "
                    "alone; has an image changed since the run began? Otherwise use --batch-size 1"
                )
        return moved(given, self.loaded.device, self.loaded.dtype)


def moved(given: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors on ``device``, floating ones in ``dtype``; what is no tensor as it is."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in given.items()
    }


def _broken(picture: Picture) -> str | None:
    """What is wrong with an image, or None."""
    try:
        picture.open()
    except TooLargeError as error:
        return str(error)
    except Exception as error:  # Pillow raises a dozen kinds, and so do its plugins
        return f"cannot be decoded ({first_line(error)})"
    return None


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _strings(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with plain strings for contents; None when there are images among them."""
    if any(part["type"] == "image" for m in messages for part in _parts(m)):
        return None
    return flat(messages)


@contextmanager
def _hushed() -> Iterator[None]:
    """No advice of transformers on how to call a processor: what matters is checked here."""
    from transformers.utils import logging

    was = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(was)
