"""The protocol of schemes that replace an attention's projections, and predicates that patching uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..core.projections import Projections, Statistics
from ..core.scheme import Scheme


class ProjectionScheme(Scheme):
    """A scheme that replaces the query, key and value projections of an attention by another module.

    It overrides `replace`, which builds the module, and `attend`, which receives the tensors that the module cached.
    """

    converts: ClassVar[bool] = False
    """The weights of the new modules are computed from the trained ones."""
    keep_original = True
    """Keep the replaced weights with the model, so that the patch can be undone."""
    calibration = cast(Any, None)
    """Token ids or texts for `collect_statistics`; None without calibration."""
    seed = 0
    """Random seed that selects rows of calibration if there are too many tokens."""
    restored = False
    """The weights of the new modules come from a checkpoint, so none are computed."""

    def replace(self, projections: Projections, statistics: Statistics | None) -> nn.Module | None:
        """Return a module that replaces one layer's query, key and value projections.

        The module is called as `module(hidden, cos, sin)` with hidden `[batch, length, hidden]` and the rotation of the
        positions `[batch | 1, length, rotary_dim / 2]`. It returns queries `[batch, heads, length, ...]` and two
        tensors `[batch, ..., length, ...]` to cache. `attend` receives these tensors from the cache.

        Args:
            projections: the weights of the layer.
            statistics: what `collect_statistics` returned for the calibration tokens; None without calibration.
        """
        return None

    def collect_statistics(
        self, projections: Projections, hidden: Tensor, statistics: Statistics | None
    ) -> Statistics | None:
        """Add statistics of calibration tokens to `statistics`, and return it.

        Args:
            projections: the weights of the layer.
            hidden: inputs of the attention, `[tokens, hidden]`.
            statistics: the statistics of earlier tokens; None at the first call.
        """
        return None

    def check(self, projections: Projections) -> None:
        """Raise an error if `replace` does not support the projections of a layer."""

    @property
    def needs_calibration(self) -> bool:
        """Return whether `replace` needs calibration tokens."""
        return False

    @property
    def random_init(self) -> bool:
        """Return whether the new modules start from random weights, initialized by the model's own `_init_weights`."""
        return False

    @property
    def keeps_rotation(self) -> bool:
        """Return whether the model keeps its own positions."""
        return False

    @property
    def softmax_rescale(self) -> float:
        """Return the factor on the softmax scale of an attention whose projections are replaced."""
        return 1.0

    @classmethod
    def replaces_rotation(cls, options: Mapping[str, object]) -> bool:
        """Return whether the scheme, with these options, replaces the rotation of the model's config."""
        return True


def converts(scheme: Scheme | type[Scheme]) -> bool:
    """Return whether a scheme computes new weights from the trained ones."""
    cls = scheme if isinstance(scheme, type) else type(scheme)
    return issubclass(cls, ProjectionScheme) and cls.converts


def replaces_projections(scheme: Scheme) -> bool:
    """Return whether a scheme replaces projections, with the options that it has."""
    overridden = isinstance(scheme, ProjectionScheme) and type(scheme).replace is not ProjectionScheme.replace
    return overridden and "replace" not in scheme.unused_hooks


def keeps_rotation(scheme: Scheme) -> bool:
    """Return whether the model keeps its own positions under a scheme."""
    return isinstance(scheme, ProjectionScheme) and scheme.keeps_rotation


def replaces_rotation(scheme: type[Scheme], options: Mapping[str, object]) -> bool:
    """Return whether a scheme, with these options, replaces the rotation of the model's config."""
    return not issubclass(scheme, ProjectionScheme) or scheme.replaces_rotation(options)
