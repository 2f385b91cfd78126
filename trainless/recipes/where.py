"""``where``: the part of a model that one patch of a recipe is narrowed to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, get_args

from ..errors import InputError
from ..seams import Site
from ..seams.layers import check_layers, layer_numbers

__all__ = ["PARTS", "Where", "layer_numbers"]

Part = Literal["text", "vision", "audio", "connector", "encoder", "decoder", "denoiser", "text_encoder"]
PARTS: tuple[str, ...] = get_args(Part)


@dataclasses.dataclass(frozen=True)
class Where:
    """Which of a method's sites to use; an empty Where takes them all.

    layers: a Python slice in a string, an int or a list of ints, counted within each part and role.
    part: one of PARTS. modules: one glob or several on the module's full name. A site must satisfy
    every key that is given.
    """

    name: ClassVar[str] = "where"

    layers: str | int | list[int] | None = dataclasses.field(
        default=None, metadata={"help": "layers: a Python slice in a string, an int or a list of ints"}
    )
    part: Part | None = dataclasses.field(default=None, metadata={"help": "part of the model"})
    modules: str | list[str] | None = dataclasses.field(
        default=None, metadata={"help": "globs on module names"}
    )

    def check(self) -> None:
        """InputError for a bad slice, an unknown part or an empty list."""
        if self.layers is not None:
            if self.layers == []:
                raise InputError("layers=[]: name at least one layer, or leave layers out")
            check_layers(self.layers)
        if self.part is not None and self.part not in PARTS:
            raise InputError(f"part={self.part!r}: choose from {', '.join(PARTS)}")
        if self.modules is not None and not all(self.globs):
            raise InputError(f"modules={self.modules!r}: an empty glob matches nothing")
        if self.modules == []:
            raise InputError("modules=[]: name at least one glob, or leave modules out")

    @property
    def globs(self) -> list[str]:
        if self.modules is None:
            return []
        return [self.modules] if isinstance(self.modules, str) else list(self.modules)

    def __bool__(self) -> bool:
        return self != Where()

    def given(self) -> dict[str, object]:
        """The keys that narrow something, as plain data."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """The sites that satisfy this Where, in their order; possibly none.

        Raises InputError when a numbered layer does not exist in a part that is left after ``part``
        and ``modules``, or when one of several globs matches nothing while others do.
        """
        self.check()
        found = [s for s in sites if self.part is None or self.part in s.parts]
        if self.modules is not None:
            hits = {glob: [s for s in found if fnmatchcase(s.name, glob)] for glob in self.globs}
            idle = [glob for glob, matched in hits.items() if not matched]
            if idle and len(idle) < len(hits):
                raise InputError(
                    f"where.modules: {', '.join(map(repr, idle))} matches none of {len(found)} sites, "
                    f"the first of which is {found[0].name!r}; remove it or correct it"
                )
            found = [s for s in found if any(fnmatchcase(s.name, glob) for glob in hits)]
        if self.layers is None:
            return found
        found = [s for s in found if s.layers]  # modules outside of layers have none
        chosen: dict[tuple[frozenset[str], str, int], set[int]] = {}
        for site in found:
            group = (site.parts, site.role, site.layers)
            if group not in chosen:
                chosen[group] = set(self._numbers(site))
        return [s for s in found if s.layer in chosen[(s.parts, s.role, s.layers)]]

    def _numbers(self, site: Site) -> list[int]:
        assert self.layers is not None
        try:
            return layer_numbers(self.layers, site.layers)
        except InputError as error:
            part = "/".join(sorted(site.parts)) or "model"
            raise InputError(f"where.{error} (part {part}, {site.role} attention)") from None
