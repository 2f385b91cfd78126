"""The kinds of contribution, the statistics and the facts: the words that everything else uses."""

from __future__ import annotations

# What a contribution may be, in the order in which the engine applies them.
KINDS = (
    "position",  # positions that keys carry: value -> rotation steps to add to each key (B, Hkv, Lk)
    "keys",  # extra keys and values: value -> ExtraKeys
    "scale",  # factor on the logits: value -> float or tensor broadcastable to (B, H, Lq, 1)
    "pattern",  # which pairs exist: value -> Pairs, Blocks or Spans; static: or Window2d; dynamic: or Tokens
    "observe",  # look at the statistics; value is ignored
    "form",  # another operator: value -> output (B, Lq, H, D), or Formed
    "mass",  # move probability between key groups: value -> MassMove
    "gain",  # factor on a head's output: value -> tensor broadcastable to (B, Lq, H, 1)
    "kv",  # what the cache keeps and how precisely: policy, an Evict or a Quantise; value: what it chooses
    "around",  # wrap the call of a module: value(proceed, call, state) -> result
    "input",  # what a module inside the site is given: value(args, kwargs, tensors) -> (args, kwargs)
    "weights",  # replace tensors: tensors
    "logits",  # the scores of the next token in generate: value(input_ids, scores) -> scores
)
STATISTICS = (
    "lse", "column_mass", "probe_mass", "group_mass", "row_entropy", "row_max", "column_max", "column_entropy",
)  # fmt: skip
# How long a State lasts, and whose it is: of one site of one method, but for "layers".
#   call: for one call, and what the contributions of a method hand each other in it.
#   sequence: as long as there is a cache for it, with which it moves; without a cache a call is a whole sequence.
#   layers: as long as a sequence, and one for all sites of the method in a part of the model (text, vision, …); without a
#     cache a forward is a whole sequence. What vision towers and encoders keep in it ends with the forward.
#   run: of a denoiser, from its first step to the next rise of the timestep; one for each thread and latent size.
SCOPES = ("call", "sequence", "layers", "run")
# Facts that a host finds out only for those who ask, in ``call.facts``:
#   step: the number of the denoising step within its run, from 0; None where no timestep says it.
#   images: bool (B, 1|Hkv, Lk), the keys that are image tokens, and image_rows: bool (B, Lq), the rows that are;
#     both None while the sequence has none. Sites where they cannot be known say why in ``facts["no_images"]``.
#   residual: (B, Lq, D), the hidden states that enter the layer around the site, before its norm.
FACTS = ("step", "images", "residual")
# Kinds of which one site takes a single contribution (mass: one per head).
EXCLUSIVE = {"position", "form"}
# Kinds that act on modules and not on the attention itself.
BESIDE = {"around", "input", "weights", "logits"}
