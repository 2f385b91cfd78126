"""Where the States lie that outlast a call elsewhere than on a cache layer, and whose they are."""

from __future__ import annotations

from ..errors import Unsupported
from ..seams import Entry, Lease, Site, State


def held_in(states: dict[str, State], entry: Entry, site: Site) -> State:
    """The State of a method at ``site`` among ``states``; a new one where there is none of this patch."""
    name = f"{entry.method} at {site.name}"
    found = states.get(name)
    if found is None or found.owner is not entry.owner:
        found = states[name] = State(entry.owner, keyed=False)
    return found


# What vision towers and encoders keep for all their layers is of one input; a cache is of the text behind it.
FORWARD_ONLY = frozenset({"vision", "encoder"})


def of_layers(states: dict[str, State] | None, entry: Entry, site: Site) -> State:
    """The State that all layers of a method share in the part of ``site``; Unsupported where no forward is known."""
    if states is None:
        raise Unsupported(
            f"{entry.method}: {site.name} was called outside a forward of its model, so no sequence whose layers "
            "could share a State; call the model"
        )
    where = (
        "in" if site.parts & FORWARD_ONLY else "at"
    )  # only what is kept "at" something outlasts the forward
    name = base = f"{entry.method} {where} all layers of {'+'.join(sorted(site.parts)) or 'the model'}"
    number = 1
    while (found := states.get(name)) is not None:
        if found.owner is entry.owner or _same_patch(found, entry):
            found.owner = entry.owner
            return found
        number += 1  # another patch of this method, on other layers
        name = f"{base}, {number}"
    states[name] = State(entry.owner, keyed=False)
    return states[name]


def _same_patch(found: State, entry: Entry) -> bool:
    """Whether a State is of this patch before its cache went to disk, or of one that was removed and is back."""
    owner, lease = found.owner, entry.owner
    if not (isinstance(owner, Lease) and isinstance(lease, Lease)):
        return False
    return not owner.applied and owner.terms == lease.terms


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
        f'{entry.method}: seam around keeps a State where its scope says so: scope="sequence" or "layers", or "run" on a '
        "denoiser (site.lasting says which)"
    )
    return State(entry.owner, keyed=False, refusal=said)
