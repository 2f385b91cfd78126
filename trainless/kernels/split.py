# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Device code for a softmax whose keys are shared among many programs: the last one to finish merges the parts.

Importing this imports Triton; only Triton forms do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tickets import CLUSTER, MOST

CLUSTER, MOST = tl.constexpr(CLUSTER), tl.constexpr(MOST)


@triton.jit
def merged(out, lse, lane, parts, first, step, many, row, r, dv, BP: tl.constexpr, BV: tl.constexpr):
    """(weighted mean, log-sum-exp to base 2) of one row over the parts first, first + step, … of a lane.

    out (lanes, parts, r, dv), lse (lanes, parts, r); where lse is -inf, out may be anything.
    """
    part = tl.arange(0, BP)
    wide = tl.arange(0, BV)
    here = part < many
    at = (lane * parts + first + part * step) * r + row
    weight = tl.load(lse + at, mask=here, other=float("-inf"))
    top = tl.max(weight, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(weight - safe)
    total = tl.sum(share, 0)
    asked = here[:, None] & (share > 0)[:, None] & (wide < dv)[None, :]
    found = tl.load(out + at[:, None] * dv + wide[None, :], mask=asked, other=0.0)
    norm = tl.where(total > 0, total, 1.0)
    found = tl.sum(found * share[:, None], 0) / norm
    return found, tl.where(total > 0, safe + tl.log2(norm), float("-inf"))


@triton.jit
def merge_parts(
    part_out, part_lse, out, lse, sinks, tickets, lane, part, parts, clusters, hkv, r, dv,
    SINKS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Called by every part once its results are stored; returns 1 in the program that has finished its lane, else 0.

    The last part of a cluster merges it, the last cluster of a lane merges those into out (lanes, r, dv) and
    lse (lanes, r), to base e.
    """
    done = 0
    tl.debug_barrier()  # the results of all threads are stored before one of them says so
    own = tickets + lane * (MOST + 2)
    cluster = part // CLUSTER
    many = tl.minimum(parts - cluster * CLUSTER, CLUSTER)
    if tl.atomic_add(own + 1 + cluster, 1) == many - 1:
        tl.store(own + 1 + cluster, 0)
        wide = tl.arange(0, BV)
        lead = cluster * CLUSTER
        for row in range(r):
            found, sum2 = merged(part_out, part_lse, lane, parts, lead, 1, many, row, r, dv, CLUSTER, BV)
            tl.debug_barrier()
            at = (lane * parts + lead) * r + row
            tl.store(part_out + at * dv + wide, found, mask=wide < dv)
            tl.store(part_lse + at, sum2)
        tl.debug_barrier()
        if tl.atomic_add(own, 1) == clusters - 1:
            tl.store(own, 0)
            for row in range(r):
                found, sum2 = merged(
                    part_out, part_lse, lane, parts, 0, CLUSTER, clusters, row, r, dv, MOST, BV
                )
                if SINKS:
                    sink = tl.load(sinks + (lane % hkv) * r + row).to(tl.float32) * 1.4426950408889634
                    top = tl.maximum(sum2, sink)
                    more = top + tl.log2(tl.exp2(sum2 - top) + tl.exp2(sink - top))
                    empty = sum2 == float("-inf")
                    found = found * tl.exp2(sum2 - tl.where(empty, 0.0, more))
                    sum2 = tl.where(empty, sum2, more)
                tl.store(out + (lane * r + row) * dv + wide, found, mask=wide < dv)
                tl.store(lse + lane * r + row, sum2 * 0.6931471805599453)
            done = 1
    return done


@triton.jit
def last_lane(tickets, batch, hkv):
    """Called by the program that has finished a lane; true in the one that is the last of its batch row."""
    tl.debug_barrier()
    ticket = tickets + batch * hkv * (MOST + 2) + MOST + 1
    last = tl.atomic_add(ticket, 1) == hkv - 1
    if last:
        tl.store(ticket, 0)
    return last
