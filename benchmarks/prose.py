"""Natural text of any length that every Python brings along: its own language reference."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

SAID = "text: Python's language reference, as `pydoc_data.topics` carries it"


def reference_text() -> str:
    """Some 700,000 characters of technical English, without the padding of its tables."""
    return re.sub(r"[ \t]+", " ", "\n\n".join(topics[name] for name in sorted(topics)))
