"""A cache belongs to one call at a time: two threads that append to one would mix their tokens up, in silence.

Who uses a cache is known by the thread and by torch's own frame of the call, so that a call that Ctrl-C ended, whose
hooks never ran, does not keep its cache for good.
"""

from __future__ import annotations

import threading
from types import FrameType

from transformers.cache_utils import Cache

from ...errors import InputError
from ..gate import module_frame, on_stack

_lock = threading.Lock()
_claims: dict[
    int, tuple[Cache, int, FrameType]
] = {}  # by the cache's id: its thread and the frame of the call


def claim(cache: Cache) -> bool:
    """For the call under way: False where one around it has it; InputError where another thread's call is using it."""
    frame, me = module_frame(), threading.get_ident()
    if frame is None:
        return False
    with _lock:
        held = _claims.get(id(cache))
        if held is not None and held[1] != me and on_stack(held[2], held[1]):
            raise InputError(
                "this cache is in use by a call in another thread, and the tokens of two calls would be mixed up in it; "
                "give each thread a cache of its own"
            )
        for stale in [
            key for key, (_, thread, at) in _claims.items() if thread == me and not on_stack(at, me)
        ]:
            del _claims[stale]
        if id(cache) in _claims and _claims[id(cache)][1] == me:
            return False
        _claims[id(cache)] = cache, me, frame
        return True


def release(cache: Cache) -> None:
    """At the end of the call that claimed it."""
    with _lock:
        _claims.pop(id(cache), None)
