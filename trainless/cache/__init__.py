"""Cache layers that remember: state that belongs to a sequence, and rules for what is kept.

``stateful(layer)``: a stock layer, plus the tensors that methods attach to a sequence (frozen sinks …).
``in_place(layer)``: a stock layer that grows, in place; ``plain(layer)``: the stock one.
``CompressingLayer``: a layer that evicts by an ``Evict`` rule after each call.
``PackedLayer``: one that packs what it holds by a ``Quantise`` rule, and may evict as well.
``ExpandedLayer``: one that packs, for modules that work on what the cache returns.
``FixedLayer``, ``FixedPackedLayer``, ``FixedEvictingLayer``: those of them that settle into buffers of fixed size
(``Freezing``), for the one rule, the other, and both.
``beside_recurrence(made, layer)``: one of these, which also holds the recurrent state of a hybrid block.

They replace stock layers inside the user's own cache while it is empty. They hold tensors and frozen
parameters only, never a model or a patch, so copying, reordering, repeating, cropping and resetting a
cache do the right thing.
"""

from .appending import AppendingLayer, AppendingMixin, in_place, plain
from .carrier import StatefulMixin, stateful
from .compressing import CompressingLayer
from .expanded import ExpandedLayer
from .fixed import FixedLayer
from .fixed_evicting import FixedEvictingLayer
from .fixed_packed import FixedPackedLayer
from .fixed_tiers import FixedTiersLayer
from .freezing import Freezing
from .hybrid import beside_recurrence
from .packed import PackedLayer
from .pairs import chosen_pairs
from .ragged import RaggedLayer
from .standing import StaticStatefulMixin

__all__ = [
    "AppendingLayer",
    "AppendingMixin",
    "CompressingLayer",
    "ExpandedLayer",
    "FixedEvictingLayer",
    "FixedLayer",
    "FixedPackedLayer",
    "FixedTiersLayer",
    "Freezing",
    "PackedLayer",
    "RaggedLayer",
    "StatefulMixin",
    "StaticStatefulMixin",
    "beside_recurrence",
    "chosen_pairs",
    "in_place",
    "plain",
    "stateful",
]  # fmt: skip
