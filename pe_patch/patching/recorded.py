"""Record the operations on a tensor, to replay them on another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import compat


class Recorded(Tensor):
    """A tensor that records the operations applied to it.

    `replay(other)` applies them to `other`. In-place operations are recorded too. Values that are read without
    producing a tensor (shape, dtype) are not recorded.
    """

    replay: Callable[[Tensor], Tensor]
    constants: list[Tensor]
    """Other tensors that took part in the operations."""

    @classmethod
    def of(cls, tensor: Tensor) -> Recorded:
        """Start recording on `tensor`."""
        return cls._with(tensor, lambda other: other, [])

    @classmethod
    def _with(cls, tensor: Tensor, replay: Callable[[Tensor], Tensor], constants: list[Tensor]) -> Recorded:
        recorded = tensor.as_subclass(cls)
        recorded.replay, recorded.constants = replay, constants
        return recorded

    @property
    def plain(self) -> Tensor:
        """The same tensor without the recording."""
        with compat.without_torch_function():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with compat.without_torch_function():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        arguments = compat.tree_leaves((args, kwargs))
        sources = [value for value in arguments if isinstance(value, Recorded)]
        constants = [value for value in arguments if isinstance(value, Tensor) and not isinstance(value, Recorded)]
        constants += [constant for source in sources for constant in source.constants]
        before = {id(source): source.replay for source in sources}  # an in-place operation replaces them below
        written = isinstance(result, Recorded) and id(result) in before

        def replay(other: Tensor) -> Tensor:
            def substitute(value: Any) -> Any:
                if not isinstance(value, Recorded):
                    return value
                replayed = before[id(value)](other)
                # `other` may be needed again, so do not write into it.
                return replayed.clone() if written and value is result else replayed

            return func(*compat.tree_map(substitute, args), **compat.tree_map(substitute, kwargs))

        if isinstance(result, Recorded) and written:
            result.replay, result.constants = replay, constants
            return result
        return cls._with(result, replay, constants)
