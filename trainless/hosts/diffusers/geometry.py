"""What a denoiser's own inputs say about its tokens: latent size, places of image and text, step.

Read once per denoiser call, from the arguments of that call and what is declared about the class (``denoisers``),
never from constants. An attention call that does not hold the tokens that the arguments say is not described.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from ...engine.runtime import Runtime
from ...errors import Unsupported
from ...seams import Site, State
from ..modules.around import Surroundings
from .denoisers import Geometry, Size, Unknown, Unseen, layout_of
from .steps import Steps

CONTEXT = "_trainless_denoiser"  # where a patched denoiser keeps its Context


def forward_names(model: nn.Module) -> list[str]:
    """Parameter names of the model's forward; of its class, because offloading rebinds the instance's."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


class Context:
    """Stands at a patched denoiser: the geometry of the call under way and the runs so far, one per thread.

    ``runtimes``: those of the patched sites, which say whether anybody asks for the step.
    """

    def __init__(self, model: nn.Module, runtimes: Sequence[Runtime] = ()):
        self.runtimes = runtimes
        self.names = forward_names(model)
        self.layout = layout_of(model)
        self.local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        raise Unsupported("a patched denoiser cannot be copied: remove the patch first, then patch each copy")

    def __reduce__(self) -> Any:
        raise Unsupported("a patched denoiser cannot be pickled: remove the patch, or use save_pretrained")

    @property
    def geometry(self) -> Geometry | None:
        return getattr(self.local, "geometry", None)

    @property
    def run(self) -> dict[str, State] | None:
        """What is kept for the run of the call under way; None where none is known or nobody keeps anything."""
        return getattr(self.local, "run", None)

    @property
    def steps(self) -> Steps:
        if not hasattr(self.local, "steps"):
            self.local.steps = Steps()
        found: Steps = self.local.steps
        return found

    def forget(self) -> None:
        """Whatever comes next begins a run."""
        self.local.steps = Steps()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # taken off since the call began, see ``gate``
            return
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():
            self._trace(module, given)
        else:
            _uncompiled(self, module, given)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() and not self._asked():
            return
        self.local.geometry = self.local.run = None

    # Around the module that is compiled itself hooks run outside of the graph: they are no graphs of their own.
    skip_code(before.__code__)
    skip_code(after.__code__)

    def _note(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        geometry = self.read(module, given)
        self.local.run = None
        if self._stepping():
            geometry = replace(geometry, step=self.steps.at(geometry.sample, geometry.timestep))
            if geometry.step is not None:
                self.local.run = self.steps.states[geometry.sample]
        self.local.geometry = geometry

    def _trace(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """The same while a compiler traces the call: from shapes alone, else the graph breaks here."""
        if not self._asked():
            return
        try:
            if not (self._stepping() or any(runtime.prepared.refusal for runtime in self.runtimes)):
                self.local.geometry = self._stated(module, given)
                return
        except Unseen:
            pass
        except Unknown as unknown:
            self.local.geometry = Geometry(_latent_of(given), why=str(unknown))
            return
        _uncompiled(self, module, given)

    def _asked(self) -> bool:
        """Whether a site needs to know anything of a call that is being traced."""
        for runtime in self.runtimes:
            ready = runtime.prepared
            if ready.sized or ready.refusal is not None:
                return True
        return self._stepping()

    def _stepping(self) -> bool:
        """Whether the step of a call is asked for, or something is kept for a run of steps."""
        # Paused patches count as well: their steps go by all the same.
        for runtime in self.runtimes:
            for entry in runtime.entries:
                if "step" in entry.contribution.asks or entry.contribution.scope == "run":
                    return True
        return False

    def surroundings(self, runtime: Runtime) -> Surroundings:
        """What the call under way says to those who stand around a module inside."""
        geometry = self.geometry
        if geometry is None:
            return Surroundings()
        return Surroundings(self.run, geometry.sample, geometry.step)

    def read(self, model: Any, given: Mapping[str, Any]) -> Geometry:
        """What the arguments of a call state, by the declared layout of the class."""
        step = next((given[name] for name in TIMES if given.get(name) is not None), None)
        try:
            return replace(self._stated(model, given), timestep=step)
        except Unknown as unknown:
            return Geometry(_latent_of(given), why=str(unknown), timestep=step)

    def _stated(self, model: Any, given: Mapping[str, Any]) -> Geometry:
        read = None if self.layout is None else self.layout.read
        return Geometry(_latent_of(given)) if read is None else read(model, given)


_uncompiled = torch.compiler.disable(
    Context._note, reason="trainless notes the step, or what the values of ids say, outside compiled regions"
)
TIMES = ("timestep", "timesteps", "timestep_ratio", "t")  # how the classes call the time of a step


def _latent_of(given: Mapping[str, Any]) -> Size | None:
    """Rows and columns of a call of which no more is known: enough to tell one run from another."""
    hidden = given.get("sample", given.get("hidden_states"))
    return (
        (hidden.shape[-2], hidden.shape[-1])
        if isinstance(hidden, torch.Tensor) and hidden.dim() >= 4
        else None
    )


# ---------------------------------------------------------------- one attention call inside that


def describe(site: Site, geometry: Geometry | None, lq: int, lk: int) -> dict[str, Any]:
    """What is known of an attention call with ``lq`` queries and ``lk`` keys: image and facts for the AttentionCall.

    Facts: ``sample``, ``timestep``, ``step``, ``level``, ``levels``; ``no_images``, why the image's place is not known;
    ``scaled``, that the model itself scales this call with its length, and how to stop it.
    """
    facts: dict[str, Any] = {"levels": site.facts.get("levels", 1), "level": site.facts.get("level", 0)}
    if geometry is None:
        facts["no_images"] = "no call of the denoiser is under way"
        return {"facts": facts}
    facts["sample"], facts["timestep"], facts["step"] = geometry.sample, geometry.timestep, geometry.step
    facts["scaled"] = geometry.scaled
    why = site.facts.get("no_images") or geometry.why
    if why is None:
        rows, columns = site.facts.get("patch") or (1, 1)
        said = geometry.of(site.facts["holds"], facts["level"])
        for sequence in said:
            if (sequence.rows, sequence.keys) == (lq, lk):
                return {
                    "image": sequence.image(lambda size: (size[0] // rows, size[1] // columns)),
                    "facts": facts,
                }
        why = "; ".join(str(sequence) for sequence in dict.fromkeys(said)) or "nothing"
        why = f"from the arguments of the denoiser's call there should be {why}, and there are {lk} for {lq}"
    facts["no_images"] = why
    return {"facts": facts}
