"""Where the States lie that outlast a call elsewhere than on a cache layer, and whose they are."""

from __future__ import annotations

from ..errors import Unsupported
from ..seams import Entry, Site, State


def held_in(states: dict[str, State], entry: Entry, site: Site) -> State:
    """The State of a method at ``site`` among ``states``; a new one where there is none of this patch."""
    name = f"{entry.method} at {site.name}"
    found = states.get(name)
    if found is None or found.owner is not entry.owner:
        found = states[name] = State(entry.owner, keyed=False)
    return found


def of_run(states: dict[str, State] | None, entry: Entry, site: Site) -> State:
    """The State of a method at ``site`` for the run under way; Unsupported where no run is known."""
    if states is None:
        raise Unsupported(
            f"{entry.method}: {site.name} was called outside a denoiser's call, or in one without a timestep, so what "
            "is kept for a run has none; call the denoiser with its timestep"
        )
    return held_in(states, entry, site)


def of_call(entry: Entry) -> State:
    """A State for one call of a module, in which nothing can be kept."""
    said = (
        f'{entry.method}: seam around keeps a State where its scope says so: scope="sequence", or "run" on a '
        "denoiser (site.lasting says which)"
    )
    return State(entry.owner, keyed=False, refusal=said)
