"""Does a patch do what it says? ``Patch.verify`` tries it on a probe and answers with a ``Verification``.

``trial`` runs the checks. ``comparing`` has those that compare runs with each other. ``watch`` sees each attention call
as the model made it, ``judging`` holds it against ``dense``, the whole call in one readable function, and against what
methods were told; ``caches`` follows what cache layers keep; ``dense_checks`` says what came of it. ``settled``
reads sequences as when nobody looks, on caches that have settled: ``settled_watch`` sees them twice, ``step_judge``
holds their steps against ``dense``. ``layout`` finds out by experiment where a denoiser's tokens stand, ``beside`` looks
at tensors and inputs that were changed. ``probing`` runs probes and ``standing`` puts everything back.
"""

from __future__ import annotations

from .outcome import Check, Verification
from .trial import verify

__all__ = ["Check", "Verification", "verify"]
