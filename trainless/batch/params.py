"""The closed lists of ``params``: what each is, what it may be, and which models take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import did_you_mean
from .items import ItemFaults


class Param(NamedTuple):
    """A parameter: a test of its value and the same in words."""

    accepts: Callable[[Any], bool]
    what: str


def _number(low: float, high: float = float("inf"), above: bool = False) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (low < value if above else low <= value) and value <= high and abs(value) < float("inf")

    return accepts


def _count(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _stops(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list) and bool(strings) and all(isinstance(s, str) and s for s in strings)


TEXT: dict[str, Param] = {
    "max_new_tokens": Param(_count(1), "an integer from 1"),
    "temperature": Param(_number(0), "a number from 0 (0: greedy)"),
    "top_k": Param(_count(1), "an integer from 1"),
    "top_p": Param(_number(0, 1, above=True), "a number above 0, up to 1"),
    "min_p": Param(_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": Param(_number(0, above=True), "a number above 0 (1: none)"),
    "stop": Param(_stops, "a string or a list of strings, none of them empty"),
}
# Any of these asks for sampling; without them decoding is greedy.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")

IMAGE: dict[str, Param] = {
    "guidance_scale": Param(_number(0), "a number from 0"),
    "guidance_rescale": Param(_number(0, 1), "a number from 0 to 1"),
    "true_cfg_scale": Param(_number(0), "a number from 0"),
    "num_inference_steps": Param(_count(1), "an integer from 1"),
    "height": Param(_count(8), "pixels, an integer from 8"),
    "width": Param(_count(8), "pixels, an integer from 8"),
    "max_sequence_length": Param(_count(1), "tokens, an integer"),
    "clip_skip": Param(_count(1), "an integer from 1"),
    "eta": Param(_number(0, 1), "a number from 0 to 1"),
}


def check_params(
    params: Mapping[str, Any], known: Mapping[str, Param], model: str, where: str, faults: ItemFaults
) -> None:
    """Add a fault for each parameter that ``model`` does not take, and for each value that it cannot be."""
    for name, value in params.items():
        if name not in known:
            faults.add(where, f"{model} takes no parameter {name!r}{did_you_mean(str(name), known)}")
        elif not known[name].accepts(value):
            faults.add(where, f"params.{name} must be {known[name].what}, not {value!r}")


def samples(params: Mapping[str, Any]) -> bool:
    """Whether these parameters ask for sampling (temperature 0 says greedy, whatever else is there)."""
    return params.get("temperature", 1) != 0 and any(name in params for name in SAMPLING)
