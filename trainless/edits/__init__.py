"""Edits to other people's objects: the undo journal, and tensors put into a model or beside its modules."""
