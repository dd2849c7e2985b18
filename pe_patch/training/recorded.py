"""A tensor that remembers what was done to it, so that it can be done to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map


class Recorded(Tensor):
    """`replay(other)` is what came of `other` in the place of the tensor that `of` was given.

    Operations that write into the tensor are remembered too; what is read from it without a tensor coming of it (its
    shape, its dtype) is not.
    """

    replay: Callable[[Tensor], Tensor]
    constants: list[Tensor]
    """Other tensors that took part."""

    @classmethod
    def of(cls, tensor: Tensor) -> Recorded:
        return cls._with(tensor, lambda other: other, [])

    @classmethod
    def _with(cls, tensor: Tensor, replay: Callable[[Tensor], Tensor], constants: list[Tensor]) -> Recorded:
        made = tensor.as_subclass(cls)
        made.replay, made.constants = replay, constants
        return made

    @property
    def plain(self) -> Tensor:
        """The same without a memory."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        given = list(tree_iter((args, kwargs)))
        sources = [one for one in given if isinstance(one, Recorded)]
        constants = [one for one in given if isinstance(one, Tensor) and not isinstance(one, Recorded)]
        constants += [constant for one in sources for constant in one.constants]
        before = {id(one): one.replay for one in sources}  # as it is now: an operation may write into its argument
        written = isinstance(result, Recorded) and id(result) in before

        def replay(other: Tensor) -> Tensor:
            def again(one: Any) -> Any:
                if not isinstance(one, Recorded):
                    return one
                made = before[id(one)](other)
                return made.clone() if written and one is result else made  # `other` may be needed once more

            return func(*tree_map(again, args), **tree_map(again, kwargs))

        if isinstance(result, Recorded) and written:
            result.replay, result.constants = replay, constants
            return result
        return cls._with(result, replay, constants)
