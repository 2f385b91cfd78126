"""Which process of how many this is, as torchrun and accelerate say it through the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Launch:
    """Rank ``rank`` of ``world`` processes; ``id`` is the same in all of them and in no other launch."""

    rank: int = 0
    world: int = 1
    id: str = ""

    @property
    def several(self) -> bool:
        return self.world > 1

    @classmethod
    def from_environment(cls) -> Launch:
        env = os.environ
        try:
            rank, world = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise InputError(f"RANK and WORLD_SIZE must be integers ({error})") from error
        if not 0 <= rank < world:
            raise InputError(f"RANK={rank} does not fit WORLD_SIZE={world}")
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        return cls(rank, world, "|".join([str(world), *(env.get(name, "") for name in names)]))
