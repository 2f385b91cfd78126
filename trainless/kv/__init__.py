"""Cache layers that remember: state that belongs to a sequence, and rules for what is kept.

``stateful(layer)``: a stock layer, plus the tensors that methods attach to a sequence (frozen sinks …).
``CompressingLayer``: a layer that evicts by an ``Evict`` rule after each call.
``PackedLayer``: one that packs what it holds by a ``Quantise`` rule, and may evict as well.

Both replace stock layers inside the user's own cache while it is empty. They hold tensors and frozen
parameters only, never a model or a patch, so copying, reordering, repeating, cropping and resetting a
cache do the right thing.
"""

from .carrier import StatefulMixin, stateful
from .layer import CompressingLayer
from .packed import PackedLayer

__all__ = ["CompressingLayer", "PackedLayer", "StatefulMixin", "stateful"]
