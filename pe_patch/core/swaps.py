"""What was replaced, as data, so that it can be put back, copied and pickled.

A swap writes what it is asked to write, whatever is there: it may be applied or undone twice, after it was interrupted,
or after somebody deleted the attribute. A list of swaps is therefore always finished by one more call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from torch import nn

Result = TypeVar("Result")


class Absent(Enum):
    """An attribute that was not there, or was given up; enum members, so that copies of them stay the same object."""

    ABSENT = "absent"
    GIVEN_UP = "given up"


ABSENT, GIVEN_UP = Absent.ABSENT, Absent.GIVEN_UP


@dataclass
class Swap:
    """One attribute of one object, replaced. `direct` writes beneath nn.Module's registration of submodules."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any
    direct: bool = False
    names: tuple[str, ...] = ()
    """All submodules of the owner, in their order, where the original is one of them: the order of parameters must
    survive the undo."""

    @classmethod
    def of(cls, owner: Any, attribute: str, replacement: Any, direct: bool = False) -> Swap:
        """Return the swap of what `owner` itself holds under this name (not its class), or of nothing."""
        swap = cls(owner, attribute, ABSENT, replacement, direct)
        swap.original = swap.current()
        if swap._registered():
            swap.names = tuple(owner._modules)
        return swap

    def current(self) -> Any:
        """Return what the owner itself holds under this name now, or ABSENT."""
        if self._registered():
            return self.owner._modules[self.attribute]
        return vars(self.owner).get(self._key(), ABSENT)

    def apply(self) -> None:
        """Put the replacement in place."""
        self.put(self.replacement)

    def undo(self) -> None:
        """Put the original back in its place."""
        self.put(self.original)

    def put(self, value: Any) -> None:
        """Write `value`, or delete what is there for ABSENT."""
        held = vars(self.owner)
        if isinstance(value, nn.Module) and isinstance(self.owner, nn.Module) and not self.direct:
            self._register(value)
            held.pop(self.attribute, None)
            return
        if self._registered():
            del self.owner._modules[self.attribute]
        if value is ABSENT:
            held.pop(self._key(), None)
        else:
            held[self._key()] = value

    def _registered(self) -> bool:
        return not self.direct and isinstance(self.owner, nn.Module) and self.attribute in self.owner._modules

    def _key(self) -> str:
        """The name under which the owner stores the attribute: configs have standard names for their own."""
        renamed = {} if isinstance(self.owner, nn.Module) else getattr(self.owner, "attribute_map", {})
        return renamed.get(self.attribute, self.attribute)

    def _register(self, module: nn.Module) -> None:
        """Register a submodule in the place that its name had when the swap was made."""
        modules = self.owner._modules
        if self.attribute in modules or self.attribute not in self.names:
            modules[self.attribute] = module
            return
        known = {**modules, self.attribute: module}
        ordered = [name for name in self.names if name in known]
        ordered += [name for name in known if name not in self.names]
        # A dict that is built first and then put in place: no interrupt can lose a module on the way.
        vars(self.owner)["_modules"] = type(modules)((name, known[name]) for name in ordered)


@dataclass
class Removal(Swap):
    """One submodule taken away."""

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
    """Put everything back, the last first; a swap that fails is reported once all others are back."""
    do_or_repeat(lambda: do_all([swap.undo for swap in reversed(swaps)]))


def do_all(steps: Sequence[Callable[[], Any]]) -> None:
    """Take every step, also after one has failed; then raise the first failure."""
    failures = []
    for step in steps:
        try:
            step()
        except Exception as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


def do_or_repeat(work: Callable[[], Any]) -> None:
    """Do `work`, which may be repeated, and do it again from its start where something cut it short."""
    try:
        work()
    except BaseException:
        work()
        raise


def finally_do(last: Callable[[], Any], work: Callable[[], Result]) -> Result:
    """Return `work()`, and call `last` whatever happens in it; `last` may be called twice.

    A plain `try ... finally` loses `last` where an interrupt arrives on its own line.
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
    """Return `work()` with all swaps applied, which are undone whatever happens."""

    def swapped() -> Result:
        apply_all(swaps)
        return work()

    return finally_do(lambda: undo_all(swaps), swapped)


class Bound:
    """A function bound to one module. Unlike a method object it survives pickling with the module it is stored on.

    `function(module, inner, *args, **kwargs)` is called, where `inner` is what stood here before.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any], previous: Any = ABSENT) -> None:
        self.module, self.name, self.function, self.previous = module, name, function, previous

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The call that this one replaces: the instance's own, or else its class's."""
        if self.previous is ABSENT:
            return getattr(type(self.module), self.name)(self.module, *args, **kwargs)
        return self.previous(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, self.inner, *args, **kwargs)

    @property
    def __code__(self) -> Any:
        """The code of what it replaces, which torch.export reads to name the inputs."""
        return getattr(type(self.module), self.name).__code__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(getattr(type(self.module), self.name))
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Chain:
    """Several functions on one joint, the first outermost."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self.functions = functions
        self.__name__ = ", ".join(function.__name__ for function in functions)

    def __call__(self, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for function in reversed(self.functions):
            inner = partial(function, module, inner)
        return inner(*args, **kwargs)


def bind(module: nn.Module, name: str, function: Callable[..., Any]) -> Swap:
    """The swap that binds a function to one instance, beneath the wrapper that accelerate may have put there."""
    beneath = name == "forward" and hasattr(module, "_hf_hook")
    attribute = "_old_forward" if beneath else name
    previous = module.__dict__.get(attribute, ABSENT)
    return Swap.of(module, attribute, Bound(module, name, function, previous))
