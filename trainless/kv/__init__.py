"""Cache layers that remember: state that belongs to a sequence, and rules for what is kept.

``stateful(layer)``: a stock layer, plus the tensors that methods attach to a sequence (frozen sinks …).
``CompressingLayer``: a layer that evicts by an ``Evict`` rule after each call.

Both replace stock layers inside the user's own cache while it is empty. They hold tensors and frozen
parameters only, never a model or a patch, so copying, reordering, repeating, cropping and resetting a
cache do the right thing.
"""

from .carrier import StatefulMixin, stateful
from .layer import CompressingLayer

__all__ = ["CompressingLayer", "StatefulMixin", "stateful"]
