"""Replace the positional logic of a loaded Transformers model, extend its context, and measure that it reads it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import compat
from .adapters import ADAPTERS as ADAPTERS
from .adapters import Adapter as Adapter
from .checkpoints.auto import register
from .describe import Description as Description
from .describe import describe as describe
from .errors import AlreadyPatchedError as AlreadyPatchedError
from .errors import CacheError as CacheError
from .errors import NoEffectError as NoEffectError
from .errors import PePatchError as PePatchError
from .errors import PrintableFilter
from .errors import UnsupportedError as UnsupportedError
from .export import export as export
from .patch import patch_model as patch_model
from .patch import patched as patched
from .patch import unpatch_model as unpatch_model
from .peft_hooks import listen
from .positions import Positions as Positions
from .scheme import AttentionShape as AttentionShape
from .scheme import Scheme as Scheme
from .schemes import ALIASES as ALIASES
from .schemes import SCHEMES as SCHEMES
from .storage import load_patched as load_patched

if TYPE_CHECKING:
    from .evaluation import evaluate as evaluate

__version__ = "0.1.0"

listen()
compat.warn_if_untested()
register()
logging.getLogger(__name__).addFilter(PrintableFilter())


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # evaluation brings datasets and evaluate with it, which patching does not need
        from .evaluation import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
