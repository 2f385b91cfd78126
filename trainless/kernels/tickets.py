"""Counters by which the programs of one kernel find out which of them is the last, and how its parts are grouped."""

from __future__ import annotations

CLUSTER = 8  # parts of a lane that are merged into one
MOST = 16  # clusters of a lane, at most
# Of a lane: clusters that are done, parts of each cluster that are done, lanes of a batch row that are done (the first
# lane's is used). Zero between calls.
TICKETS = MOST + 2
