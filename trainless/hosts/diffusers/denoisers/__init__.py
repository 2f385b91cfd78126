"""What is declared about each denoiser class of diffusers: which tokens its attention layers hold, and in what order.

``words`` has the vocabulary, ``latents``, ``packed``, ``sequences`` and ``unets`` read the arguments of a call,
``table`` says which class is read how, ``roles_only`` those of which no more is known than whose keys their layers read,
``whose`` what attention classes say of that themselves, ``listing`` what follows from the table for each method.
"""

from __future__ import annotations

from .table import TABLE, layout_of
from .words import Geometry, Layout, Part, Sequence, Size, Unknown, Unseen

__all__ = ["TABLE", "Geometry", "Layout", "Part", "Sequence", "Size", "Unknown", "Unseen", "layout_of"]
