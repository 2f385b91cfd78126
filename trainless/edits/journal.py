"""The undo journal: every edit we make to somebody else's object, and how to take it back.

Four kinds of edit exist: an attribute, a hook, an item of a container, the contents of a tensor.
Each knows whether what stands there now is still ours, and how to undo itself. Ownership is decided by
a marker, not by identity, because other libraries rebuild objects that they find.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, MutableSequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MARKER = "_trainless_made"
HOOKS = "_trainless_hooks"  # on a module: how many hooks of ours it has, and the forward that its instance had before


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    """Another object that does what ``function`` does."""
    return functools.update_wrapper(functools.partial(function), function)


def mark(thing: Any) -> Any:
    """Mark ``thing`` as made by us, so that it is recognised later."""
    setattr(thing, MARKER, True)
    return thing


def is_marked(thing: Any) -> bool:
    return bool(getattr(thing, MARKER, False))


_numbers: dict[str, int] = {}  # kind of hook -> its number


def numbered(handle: Any, kind: str) -> Any:
    """The handle of a hook just registered, which now has the number of its kind on its module.

    Compiled code guards on the numbers of hooks. With the same ones on all blocks of a model, the code that was made
    for one block serves the others. A second hook of a kind on one module keeps its own number.
    """
    number = _numbers.setdefault(kind, RemovableHandle(OrderedDict()).id)
    hooks = handle.hooks_dict_ref()
    if number not in hooks:
        for table in (hooks, *(ref() for ref in handle.extra_dict_ref)):
            if handle.id in table:
                table[number] = table.pop(handle.id)
        handle.id = number
    return handle


class Edit:
    """One change that can be recognised and taken back."""

    where: str

    def is_ours(self) -> bool:
        """Whether what stands there now is what we put there."""
        raise NotImplementedError

    def undo(self) -> None:
        """Restore what was there before. Call only while ``is_ours()``."""
        raise NotImplementedError

    def release(self) -> None:
        """What is left to do for an edit that somebody else has taken back or replaced."""


class AttributeEdit(Edit):
    """Set an attribute on one instance; undo restores the old one, or its absence on the instance."""

    def __init__(self, owner: Any, name: str, value: Any, where: str = ""):
        self.owner, self.name, self.value = owner, name, value
        self.had = name in vars(owner)
        self.old = vars(owner).get(name)
        self.where = where or f"{type(owner).__name__}.{name}"
        setattr(owner, name, value)

    def is_ours(self) -> bool:
        current = vars(self.owner).get(self.name)
        return current is self.value or is_marked(current)

    def undo(self) -> None:
        if self.had:
            setattr(self.owner, self.name, self.old)
        else:
            delattr(self.owner, self.name)


class HookEdit(Edit):
    """A torch hook that we registered; it is gone when somebody else removed it from the module.

    Code that ``torch.compile`` has made guards on a module's ``forward`` and not on its hooks. So that it is made anew
    for this module when a hook comes, and found again when the hook has gone, ``forward`` is set on the instance to
    what it is anyway, for as long as hooks of ours are there.

    kind: hooks of one kind have one number on all modules, see ``numbered``.
    """

    def __init__(self, module: nn.Module, register: Callable[[], Any], where: str, kind: str = ""):
        self.handle = numbered(register(), kind) if kind else register()
        self.module, self.where = module, where
        own = vars(module)
        if HOOKS not in own:
            inherited = own.get("forward")
            own[HOOKS] = [0, inherited]
            own["forward"] = module.forward if inherited is None else _same(inherited)
        own[HOOKS][0] += 1

    def is_ours(self) -> bool:
        hooks = self.handle.hooks_dict_ref()
        return hooks is not None and self.handle.id in hooks

    def undo(self) -> None:
        self.handle.remove()
        self.release()

    def release(self) -> None:
        own = vars(self.module)
        own[HOOKS][0] -= 1
        if own[HOOKS][0]:
            return
        inherited = own.pop(HOOKS)[1]
        current = own.get("forward")
        if inherited is None and current == MethodType(type(self.module).forward, self.module):
            del own["forward"]
        elif inherited is not None and getattr(current, "func", None) is inherited:
            own["forward"] = inherited


class ItemEdit(Edit):
    """Replace an item of a list or a mapping."""

    def __init__(
        self, container: MutableSequence[Any] | MutableMapping[Any, Any], key: Any, value: Any, where: str
    ):
        self.container, self.key, self.value = container, key, value
        self.had = key in container if isinstance(container, MutableMapping) else True
        self.old = container[key] if self.had else None
        self.where = where
        container[key] = value

    def is_ours(self) -> bool:
        try:
            current = self.container[self.key]
        except (KeyError, IndexError):
            return False
        return current is self.value or is_marked(current)

    def undo(self) -> None:
        if self.had:
            self.container[self.key] = self.old
        elif isinstance(self.container, MutableMapping):
            del self.container[self.key]


def stored(owner: nn.Module, name: str) -> Tensor | None:
    """Where the values of a parameter or buffer are; None when they are nowhere in memory.

    Sequential offloading (accelerate) leaves a placeholder on the meta device in the module, and keeps the
    values in a table of the module's hook.
    """
    found = getattr(owner, name, None)
    if not isinstance(found, Tensor):
        return None
    if found.device.type != "meta":
        return found.detach()
    hook = getattr(owner, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        table = getattr(one, "weights_map", None)
        try:
            kept = table[name] if table is not None else None
        except KeyError:
            continue
        if isinstance(kept, Tensor) and kept.device.type != "meta":
            return kept.detach()
    return None


class TensorEdit(Edit):
    """Overwrite a parameter or buffer of a module in place; the old contents wait on the CPU.

    The tensor is looked up each time: offloading and conversion may put another one in its place.
    """

    def __init__(self, owner: nn.Module, name: str, value: Tensor, where: str):
        self.owner, self.name, self.where = owner, name, where
        self.backup = self.tensor.to("cpu", copy=True)
        self._write(value)
        self.installed = self.tensor.to("cpu", copy=True)
        self.shown = True

    @property
    def tensor(self) -> Tensor:
        found = stored(self.owner, self.name)
        assert found is not None, f"{self.where} has no values in memory"
        return found

    def _write(self, value: Tensor) -> None:
        with torch.no_grad():
            self.tensor.copy_(value)

    def show(self, ours: bool) -> None:
        """Put our contents, or those from before, into the tensor; for pausing."""
        if ours != self.shown and self.is_ours():
            self._write(self.installed if ours else self.backup)
            self.shown = ours

    def is_ours(self) -> bool:
        # Contents, not identity: moving a model to another device makes new storage with our values, and
        # converting it rounds them.
        current = stored(self.owner, self.name)
        expected = self.installed if self.shown else self.backup
        if current is None or current.shape != expected.shape:
            return False
        found, expected = current.cpu(), expected.to(current.dtype)
        # NaN is what it was, too: a damaged file must not keep the model from coming back.
        return torch.equal(found, expected) or bool(
            ((found == expected) | (found.isnan() & expected.isnan())).all()
        )

    def undo(self) -> None:
        self._write(self.backup)


class Journal:
    """Edits in the order in which they were made; undone backwards."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []

    def add(self, edit: Edit) -> Edit:
        self.edits.append(edit)
        return edit

    def undo(self, since: int = 0) -> list[str]:
        """Undo the edits from number ``since`` on that are still ours; return where the others are, left alone."""
        foreign = []
        for edit in reversed(self.edits[since:]):
            if edit.is_ours():
                edit.undo()
            else:
                edit.release()
                foreign.append(edit.where)
        del self.edits[since:]
        return foreign
