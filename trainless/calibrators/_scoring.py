"""Which choice a language model prefers: one forward pass per example, one token per choice.

Rule     The prompt is tokenised with each choice appended. What all of these share is read by the model; the
         token at which the choices part stands for each choice, and its logit at the last shared position
         is the choice's score. An example is right when the label's score is greater than every other.
Source   The ACT paper: classification compares the logits of one sub-token of each label at the end of the
         prompt, multiple choice takes one greedy token.
Differs  - The first token that differs, where ACT's code takes the last sub-token of each label: at the end
           of the prompt the model predicts what comes next, not what ends a label. With labels of one token
           the two are the same. ``choice_token="last"`` is the rule of the code.
         - Tokens that a tokenizer merges across the end of the prompt are judged as they will be written.
         - Multiple choice compares the choices with each other; the code takes the greedy token over the
           whole vocabulary, so that an answer that is no choice counts as wrong.
         - Equal scores count as wrong, so that a model without an opinion is not right by the order of
           choices.

Scores of whole continuations would need rows after the prompt, and methods whose statistics look ahead
would then be judged by what the answer says.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batch.items import ItemFaults
from ..errors import InputError, TrainlessError
from ._data import Example

ChoiceToken = Literal["first", "last"]


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: what the model reads, and the token that stands for each choice."""

    where: str
    tokens: tuple[int, ...]
    choices: tuple[int, ...]
    label: int

    @property
    def content(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        return self.tokens, self.choices, self.label


def encode(
    examples: Sequence[Example], tokenizer: Any, positions: int | None, rule: ChoiceToken, faults: ItemFaults
) -> list[Encoded]:
    """The examples in tokens; faults for those that are too long or whose choices no token tells apart."""
    found = []
    for example in examples:
        if rule == "first":
            texts = [example.prompt + choice for choice in example.choices]
            whole = tokenizer(texts)["input_ids"]
            shared = _shared(whole)
            tokens, choices = whole[0][:shared], [ids[shared] if len(ids) > shared else None for ids in whole]
        else:
            tokens = tokenizer(example.prompt)["input_ids"]
            ends = tokenizer(list(example.choices), add_special_tokens=False)["input_ids"]
            choices = [ids[-1] if ids else None for ids in ends]
        fault = _fault(example, tokens, choices, positions, tokenizer)
        if fault is None:
            chosen = tuple(c for c in choices if c is not None)
            found.append(Encoded(example.where, tuple(tokens), chosen, example.label))
        else:
            faults.add(example.where, fault)
    return found


def _shared(whole: list[list[int]]) -> int:
    """How many leading tokens all have in common."""
    count = 0
    for column in zip(*whole, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _fault(
    example: Example, tokens: list[int], choices: list[int | None], positions: int | None, tokenizer: Any
) -> str | None:
    for i, token in enumerate(choices):
        if token is None:
            return (
                f"choice {i} {example.choices[i]!r} is how another choice begins: no token tells them apart"
            )
        if token in choices[:i]:
            first = choices.index(token)
            text = tokenizer.decode([token])
            return (
                f"choices {first} {example.choices[first]!r} and {i} {example.choices[i]!r} tokenise alike: both "
                f"are judged by {text!r}; choose texts that begin differently, such as letters"
            )
    if not tokens:
        return "the prompt is empty"
    if positions is not None and len(tokens) > positions:
        return f"the prompt has {len(tokens)} tokens, and the model {positions} positions"
    return None


class Scorer:
    """Runs examples through a model in left-padded batches of similar length.

    ``margins`` gives, per example, the label's logit minus the largest other, which is the difference of
    their log-likelihoods.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Encoded], batch_size: int, pad: int):
        self.model, self.examples, self.batch_size, self.pad = model, examples, batch_size, pad
        self.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self.positions = "position_ids" in accepted
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        if "logits_to_keep" in accepted:
            self.options["logits_to_keep"] = 1

    def batches(self, numbers: Sequence[int]) -> list[list[int]]:
        """``numbers`` of examples, dealt into batches by length."""
        order = sorted(numbers, key=lambda i: (len(self.examples[i].tokens), i))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def margins(self, batch: Sequence[int]) -> list[float]:
        """Margins of one batch. TrainlessError when memory does not suffice or logits are not finite."""
        examples = [self.examples[i] for i in batch]
        try:
            logits = self._logits(examples)
        except torch.OutOfMemoryError as error:
            raise TrainlessError(
                f"out of memory with {len(batch)} examples at a time; set batch_size={max(1, len(batch) // 2)}"
            ) from error
        found = []
        for row, example in zip(logits, examples, strict=True):
            scores = row[list(example.choices)]
            if not bool(torch.isfinite(scores).all()):
                raise InputError(
                    f"{example.where}: the model gives logits that are not finite here; try dtype float32"
                )
            others = torch.cat([scores[: example.label], scores[example.label + 1 :]])
            found.append(float(scores[example.label] - others.max()))
        return found

    def _logits(self, examples: Sequence[Encoded]) -> Tensor:
        """(B, vocabulary) logits at the last position, in float32 at least, on the CPU."""
        width = max(len(e.tokens) for e in examples)
        pads = [width - len(e.tokens) for e in examples]
        ids = torch.tensor([[self.pad] * n + list(e.tokens) for n, e in zip(pads, examples, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        with torch.inference_mode():
            logits = self.model(**inputs, **self.options).logits[:, -1]
        return logits.cpu().to(torch.promote_types(logits.dtype, torch.float32))
