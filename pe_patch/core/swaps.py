"""Replaced attributes as data, so that they can be undone, copied and pickled.

A swap writes its value whatever the attribute holds. Applying or undoing a swap twice is safe, so an interrupted list
can be run again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from torch import nn

from .. import compat

Result = TypeVar("Result")


class Absent(Enum):
    """Mark an attribute that did not exist, or whose original was released.

    Enum members survive copying, so `is` works.
    """

    ABSENT = "absent"
    RELEASED = "released"


ABSENT, RELEASED = Absent.ABSENT, Absent.RELEASED


@dataclass
class Swap:
    """One replaced attribute of one object. `direct` bypasses nn.Module's registration of submodules."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any
    direct: bool = False
    names: tuple[str, ...] = ()
    """Names of the owner's submodules in order, if the original is one of them. An undo must restore the order of
    parameters."""

    @classmethod
    def of(cls, owner: Any, attribute: str, replacement: Any, direct: bool = False) -> Swap:
        """Return the swap of an attribute of the instance `owner`, not of its class; it need not exist."""
        swap = cls(owner, attribute, ABSENT, replacement, direct)
        swap.original = swap.current()
        if swap._registered():
            swap.names = tuple(compat.submodules(owner))
        return swap

    def current(self) -> Any:
        """Return the value of the instance attribute now, or ABSENT."""
        if self._registered():
            return compat.submodules(self.owner)[self.attribute]
        return vars(self.owner).get(self.key, ABSENT)

    def apply(self) -> None:
        """Put the replacement in place."""
        self.put(self.replacement)

    def undo(self) -> None:
        """Put the original back."""
        self.put(self.original)

    def put(self, value: Any) -> None:
        """Write `value`; delete the attribute if it is ABSENT."""
        held = vars(self.owner)
        if isinstance(value, nn.Module) and isinstance(self.owner, nn.Module) and not self.direct:
            self._register(value)
            held.pop(self.attribute, None)
            return
        if self._registered():
            del compat.submodules(self.owner)[self.attribute]
        if value is ABSENT:
            held.pop(self.key, None)
        else:
            held[self.key] = value

    def _registered(self) -> bool:
        return not self.direct and isinstance(self.owner, nn.Module) and self.attribute in compat.submodules(self.owner)

    @property
    def key(self) -> str:
        """Return the name under which the owner stores the attribute; configs map standard names to others."""
        renamed = {} if isinstance(self.owner, nn.Module) else getattr(self.owner, "attribute_map", {})
        return renamed.get(self.attribute, self.attribute)

    def _register(self, module: nn.Module) -> None:
        """Register a submodule at the position that its name had when the swap was made."""
        modules = compat.submodules(self.owner)
        if self.attribute in modules or self.attribute not in self.names:
            modules[self.attribute] = module
            return
        known = {**modules, self.attribute: module}
        ordered = [name for name in self.names if name in known]
        ordered += [name for name in known if name not in self.names]
        # Build the dict first, then write it in one step: an interrupt cannot lose a module.
        compat.replace_submodules(self.owner, type(modules)((name, known[name]) for name in ordered))


@dataclass
class Removal(Swap):
    """One removed submodule."""

    @classmethod
    def of(cls, owner: Any, attribute: str, replacement: Any = ABSENT, direct: bool = False) -> Removal:
        swap = super().of(owner, attribute, replacement, direct)
        assert isinstance(swap, Removal)
        return swap


def apply_all(swaps: Sequence[Swap]) -> None:
    """Apply every swap, or none of them if one fails."""
    try:
        for swap in swaps:
            swap.apply()
    except BaseException:
        undo_all(swaps)
        raise


def undo_all(swaps: Sequence[Swap]) -> None:
    """Undo every swap, the last first; raise the first failure after all others are undone."""
    do_or_repeat(lambda: do_all([swap.undo for swap in reversed(swaps)]))


def do_all(steps: Sequence[Callable[[], Any]]) -> None:
    """Run every step even if one fails; then raise the first failure."""
    failures = []
    for step in steps:
        try:
            step()
        except Exception as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


def do_or_repeat(work: Callable[[], Any]) -> None:
    """Run `work`, and run it again from the start if an exception interrupted it. `work` must be repeatable."""
    try:
        work()
    except BaseException:
        work()
        raise


def finally_do(last: Callable[[], Any], work: Callable[[], Result]) -> Result:
    """Return `work()` and call `last` whatever happens; `last` may be called twice.

    A plain `try ... finally` skips `last` if an interrupt arrives on its own line.
    """
    try:
        try:
            return work()
        finally:
            last()
    except BaseException:
        last()
        raise


def with_swaps(swaps: Sequence[Swap], work: Callable[[], Result]) -> Result:
    """Return `work()` with all swaps applied, and undo them whatever happens."""

    def swapped() -> Result:
        apply_all(swaps)
        return work()

    return finally_do(lambda: undo_all(swaps), swapped)


class Bound:
    """A function bound to one module. Unlike a method object, it can be pickled with the module that holds it.

    A call becomes `function(module, inner, *args, **kwargs)`, where `inner` is the replaced method.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any], previous: Any = ABSENT) -> None:
        self.module, self.name, self.function, self.previous = module, name, function, previous

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replaced method: that of the instance if it had one, else that of its class."""
        if self.previous is ABSENT:
            return getattr(type(self.module), self.name)(self.module, *args, **kwargs)
        return self.previous(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, self.inner, *args, **kwargs)

    @property
    def __code__(self) -> Any:
        """Return the code of the replaced method; torch.export reads it to name the inputs."""
        return getattr(type(self.module), self.name).__code__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(getattr(type(self.module), self.name))
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Chain:
    """Several functions around one method, the first outermost."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self.functions = functions
        self.__name__ = ", ".join(function.__name__ for function in functions)

    def __call__(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for function in reversed(self.functions):
            inner = partial(function, module, inner)
        return inner(*args, **kwargs)


def bind(module: nn.Module, name: str, function: Callable[..., Any]) -> Swap:
    """Return the swap that binds a function to one instance, beneath a wrapper that accelerate may have added."""
    attribute = compat.stored_method(module, name)
    previous = module.__dict__.get(attribute, ABSENT)
    return Swap.of(module, attribute, Bound(module, name, function, previous))
