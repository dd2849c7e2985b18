"""What was replaced, as data, so that it can be put back, copied and pickled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from torch import nn


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

    @classmethod
    def of(cls, owner: Any, attribute: str, replacement: Any, direct: bool = False) -> Swap:
        """A swap of what `owner` itself holds under this name (not its class), or of nothing."""
        if isinstance(owner, nn.Module) and attribute in owner._modules:
            original = owner._modules[attribute]
        elif isinstance(owner, nn.Module):
            original = owner.__dict__.get(attribute, ABSENT)
        else:
            original = getattr(owner, attribute, ABSENT)
        return cls(owner, attribute, original, replacement, direct)

    def apply(self) -> None:
        self._set(self.replacement)

    def undo(self) -> None:
        self._set(self.original)

    def _set(self, value: Any) -> None:
        if self.direct and value is ABSENT:
            self.owner.__dict__.pop(self.attribute, None)
        elif self.direct:
            self.owner.__dict__[self.attribute] = value
        elif value is ABSENT:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, value)


@dataclass
class Removal(Swap):
    """One submodule taken away; it comes back to its place, since the order of parameters must not change."""

    names: tuple[str, ...] = ()
    """Of all submodules, in their order."""

    @classmethod
    def of(cls, owner: Any, attribute: str, replacement: Any = ABSENT, direct: bool = False) -> Removal:
        return cls(owner, attribute, owner._modules[attribute], replacement, direct, tuple(owner._modules))

    def undo(self) -> None:
        self._set(self.original)
        modules = self.owner._modules
        for name in (*self.names, *(name for name in tuple(modules) if name not in self.names)):
            if name in modules:
                modules[name] = modules.pop(name)


def apply_all(swaps: list[Swap]) -> None:
    """Apply every swap, or none of them if one fails."""
    done: list[Swap] = []
    try:
        for swap in swaps:
            swap.apply()
            done.append(swap)
    except BaseException:
        undo_all(done)
        raise


def undo_all(swaps: list[Swap]) -> None:
    """Put everything back, the last first."""
    for swap in reversed(swaps):
        swap.undo()


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
