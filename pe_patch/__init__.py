"""Replace the positional logic of a loaded Transformers model, extend its context, and measure that it reads it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import compat, schemes  # noqa: F401 - importing the schemes registers them
from .adapters import ADAPTERS as ADAPTERS
from .adapters import Adapter as Adapter
from .checkpoints.auto import register
from .checkpoints.exporters.export import export as export
from .checkpoints.load import load_patched as load_patched
from .core.positions import Positions as Positions
from .core.scheme import AttentionShape as AttentionShape
from .core.scheme import Scheme as Scheme
from .data.packaged import __version__ as __version__
from .errors import AlreadyPatchedError as AlreadyPatchedError
from .errors import CacheError as CacheError
from .errors import NoEffectError as NoEffectError
from .errors import PePatchError as PePatchError
from .errors import PrintableFilter
from .errors import UnsupportedError as UnsupportedError
from .mla import scheme as _mla  # noqa: F401 - registers itself
from .patching.api import patch_model as patch_model
from .patching.api import patched as patched
from .patching.api import unpatch_model as unpatch_model
from .patching.description import Description as Description
from .patching.description import describe as describe
from .patching.peft import listen
from .schemes.registry import ALIASES as ALIASES
from .schemes.registry import SCHEMES as SCHEMES

if TYPE_CHECKING:
    from .evaluation import evaluate as evaluate

listen()
compat.warn_if_untested()
register()
logging.getLogger(__name__).addFilter(PrintableFilter())


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # evaluation brings datasets and evaluate with it, which patching does not need
        from .evaluation import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
