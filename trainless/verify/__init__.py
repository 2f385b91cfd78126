"""Does a patch do what it says? ``Patch.verify`` tries it on a probe and answers with a ``Verification``.

``trial.py`` runs the checks and ``checks.py`` holds those that compare runs with each other; ``watch.py`` sees each
attention call as the model made it, ``dense.py`` computes it anew in one readable function, ``caches.py`` replays
what cache layers keep, ``layout.py`` finds out by experiment where a denoiser's tokens stand. ``probing.py`` runs
probes and ``standing.py`` puts everything back.
"""

from __future__ import annotations

from .outcome import Check, Verification
from .trial import verify

__all__ = ["Check", "Verification", "verify"]
