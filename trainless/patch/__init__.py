"""The walk of a patch: a recipe is bound to sites, checked for conflicts, committed, and comes off again."""
