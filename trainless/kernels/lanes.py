# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""Sixteen float32 numbers side by side, as one value of a loop that Numba compiles.

A plain loop over an array keeps its sums in memory; a dozen such values stay in registers, and a product then runs
at the speed of a matrix library. The compiler cuts sixteen numbers into as many registers as the processor needs for
them: one, two or four. Addresses are int64 and count bytes; nothing checks them.

Numba keeps machine code by the file that a loop stands in. After a change here, delete ``__pycache__`` beside it.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
BYTES = 4 * LANES
FUSED = ("contract",)  # a product and a sum round once where the processor can do that
# 2 ** f = 1 + c1 f + … + c6 f ** 6 for |f| <= 1/2: the largest relative error, 2e-9, is as small as it gets.
POWERS = (
    1.0, 0.6931472028559327, 0.24022647913441367, 0.05550332469411255, 0.0096184373722299,
    0.0013398875050919905, 0.00015353359565540257,
)  # fmt: skip
ROUND = 12582912.0  # 1.5 * 2**23: what is left of a sum with it is a whole number, which its lowest bits hold
LEAST = -127.0  # the exponent that stands for zero

_number, _whole, _address = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_all, _whole_all, _half = (
    ir.VectorType(*kind) for kind in ((_number, LANES), (_whole, LANES), (_number, LANES // 2))
)


class Lanes(types.Type):
    """The type of such a value."""

    def __init__(self):
        super().__init__("trainless.lanes")


lanes = Lanes()


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _all)


def _at(builder, address, kind, more=0):
    return builder.inttoptr(builder.add(address, ir.Constant(_address, more)), kind.as_pointer())


def _load(builder, address, kind, more=0):
    return builder.load(_at(builder, address, kind, more), align=4)


def _spread(builder, x, kind):
    none = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(none, x, ir.Constant(_whole, 0))
    order = ir.Constant(ir.VectorType(_whole, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, none, order)


def _same(x, kind=_all):
    return ir.Constant(kind, [x] * kind.count)


def _fma(builder, x, y, z):
    return builder.fadd(builder.fmul(x, y, flags=FUSED), z, flags=FUSED)


@intrinsic
def load(context, address):
    """The sixteen numbers at an address."""
    return lanes(types.int64), lambda context, builder, signature, given: _load(builder, given[0], _all)


@intrinsic
def store(context, address, x):
    def code(context, builder, signature, given):
        builder.store(given[1], _at(builder, given[0], _all), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, lanes), code


@intrinsic
def zero(context):
    return lanes(), lambda context, builder, signature, given: _same(0.0)


@intrinsic
def same(context, x):
    """One number, sixteen times."""
    return lanes(types.float32), lambda context, builder, signature, given: _spread(builder, given[0], _all)


@intrinsic
def fma(context, x, y, z):
    """x · y + z."""
    return lanes(lanes, lanes, lanes), lambda context, builder, signature, given: _fma(builder, *given)


@intrinsic
def add(context, x, y):
    return lanes(lanes, lanes), lambda context, builder, signature, given: builder.fadd(*given)


@intrinsic
def inverse(context, x):
    """1 / x; of zero infinity, and no exception as in a loop's own division."""
    return lanes(lanes), lambda context, builder, signature, given: builder.fdiv(_same(1.0), given[0])


# ---------------------------------------------------------------- some of them, as a tuple


@intrinsic
def zeros(context, like):
    """As many zeros as there are numbers in a tuple."""
    kind = types.UniTuple(lanes, len(like))

    def code(context, builder, signature, given):
        return context.make_tuple(builder, kind, [_same(0.0)] * kind.count)

    return kind(like), code


def _each(function):
    """Code for a tuple: what ``function(builder, …)`` gives for each place of the tuples among the arguments."""

    def code(context, builder, signature, given):
        tuples = [cgutils.unpack_tuple(builder, x) if isinstance(kind, types.UniTuple) else x
                  for x, kind in zip(given, signature.args, strict=True)]  # fmt: skip
        own = [
            function(builder, *(x[i] if isinstance(x, list) else x for x in tuples))
            for i in range(signature.return_type.count)
        ]
        return context.make_tuple(builder, signature.return_type, own)

    return code


@intrinsic
def fma_each(context, addresses, start, x, sums):
    """sums[i] + x · (the number ``start`` bytes behind addresses[i])."""

    def code(builder, address, start, x, total):
        number = _load(builder, builder.add(address, start), _number)
        return _fma(builder, _spread(builder, number, _all), x, total)

    return sums(addresses, types.int64, lanes, sums), _each(code)


@intrinsic
def add_each(context, some, more):
    return some(some, some), _each(lambda builder, x, y: builder.fadd(x, y))


@intrinsic
def shown_each(context, some, bits):
    """Each where its int32 has the bit of a lane set, and -inf elsewhere."""

    def code(builder, x, bits):
        own = ir.Constant(_whole_all, [1 << i for i in range(LANES)])
        found = builder.and_(_spread(builder, bits, _whole_all), own)
        kept = builder.icmp_signed("!=", found, _same(0, _whole_all))
        return builder.select(kept, x, _same(float("-inf")))

    return some(some, bits), _each(code)


@intrinsic
def highest(context, some, least):
    """The largest of all of them, lane by lane; NaN may be passed over."""

    def code(context, builder, signature, given):
        best = given[1]
        for x in cgutils.unpack_tuple(builder, given[0]):
            best = builder.select(builder.fcmp_ordered(">", x, best), x, best)
        return best

    return lanes(some, lanes), code


@intrinsic
def store_each(context, address, some):
    """One behind the other."""

    def code(context, builder, signature, given):
        for i, x in enumerate(cgutils.unpack_tuple(builder, given[1])):
            builder.store(x, _at(builder, given[0], _all, BYTES * i), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, some), code


@intrinsic
def renew_each(context, address, factor, some):
    """What stands there, one behind the other, times a factor, plus each of ``some``."""

    def code(context, builder, signature, given):
        address, factor, some = given
        for i, x in enumerate(cgutils.unpack_tuple(builder, some)):
            at = _at(builder, address, _all, BYTES * i)
            builder.store(_fma(builder, builder.load(at, align=4), factor, x), at, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, lanes, some), code


# ---------------------------------------------------------------- powers, and rows turned into lanes


@intrinsic
def power(context, x, y):
    """2 ** (x - y), where x - y <= 0: within 1.5 · 2**-24 of it; 0 from -127 on downwards; NaN stays NaN."""

    def code(context, builder, signature, given):
        x = builder.fsub(*given)
        x = builder.select(builder.fcmp_ordered("<", x, _same(LEAST)), _same(LEAST), x)
        shifted = builder.fadd(x, _same(ROUND))
        rest = builder.fsub(x, builder.fsub(shifted, _same(ROUND)))
        found = _same(POWERS[-1])
        for c in POWERS[-2::-1]:
            found = _fma(builder, found, rest, _same(c))
        exponent = builder.shl(builder.bitcast(shifted, _whole_all), _same(23, _whole_all))
        scale = builder.add(exponent, _same(127 << 23, _whole_all))
        return builder.fmul(found, builder.bitcast(scale, _all))

    return lanes(lanes, lanes), code


def _turned(builder, rows):
    """The columns of eight rows of eight numbers: blocks of 4, 2 and 1 change places across the diagonal."""
    rows = list(rows)
    for size in (4, 2, 1):
        for i in range(8):
            if not i & size:
                pair = rows[i], rows[i + size]
                for n, move in ((i, 0), (i + size, size)):
                    order = [j + move if not j & size else 8 + j - size + move for j in range(8)]
                    rows[n] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_whole, 8), order))
    return rows


@intrinsic
def turn_in(context, rows, start, factor, target):
    """Eight numbers of eight rows into eight lanes of eight values at ``target``, times a factor.

    rows: where the addresses of the rows stand; start: bytes from there to the first number.
    """

    def code(context, builder, signature, given):
        rows, start, factor, target = given
        found = []
        for i in range(8):
            row = builder.add(_load(builder, rows, _address, 8 * i), start)
            found.append(_load(builder, row, _half))
        factor = _spread(builder, factor, _half)
        for j, x in enumerate(_turned(builder, found)):
            builder.store(builder.fmul(x, factor), _at(builder, target, _half, BYTES * j), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), code


@intrinsic
def turn_out(context, source, factors, rows, start):
    """Eight lanes of eight values at ``source``, times the lanes at ``factors``, into eight numbers of eight rows."""

    def code(context, builder, signature, given):
        source, factors, rows, start = given
        factor = _load(builder, factors, _half)
        found = [builder.fmul(_load(builder, source, _half, BYTES * j), factor) for j in range(8)]
        for i, x in enumerate(_turned(builder, found)):
            row = builder.add(_load(builder, rows, _address, 8 * i), start)
            builder.store(x, _at(builder, row, _half), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), code
