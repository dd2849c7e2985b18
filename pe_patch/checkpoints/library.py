"""Import everything that patching needs, and register it with Transformers."""

from __future__ import annotations

import logging

from .. import compat
from ..adapters import ADAPTERS, Adapter, register_adapter
from ..core.engine import AttentionEngine
from ..core.positions import Positions
from ..core.scheme import AttentionShape, DistanceBias, Scheme
from ..data.packaged import __version__
from ..errors import (
    AlreadyPatchedError,
    BeyondWindowError,
    CacheError,
    CheckpointError,
    MismatchError,
    MissingPackageError,
    NoEffectError,
    OptionError,
    OptionValueError,
    OutputError,
    PePatchError,
    PrintableFilter,
    UnknownNameError,
    UnsupportedError,
)
from ..mla.scheme import MLA
from ..patching.api import patch_model, patched, unpatch_model
from ..patching.description import Description, describe
from ..patching.peft import load_adapter
from ..schemes.absolute import DroPE, Integer, Learned, NoPE, OneHot, Sinusoidal
from ..schemes.bias import T5, ALiBi, Kerple, Sandwich
from ..schemes.decay import RoPEALiBi, XPos
from ..schemes.fire import FIRE
from ..schemes.fourier import FoPE
from ..schemes.frequency_wrappers import ClippedRoPE, Resonance
from ..schemes.grid import ALiBi2D, RoPE2D
from ..schemes.registry import ALIASES, SCHEMES, register_scheme
from ..schemes.relative import CoPE, Shaw, TransformerXL
from ..schemes.remap import DCA, STRING, LeakyReRoPE, LMInfinite, ReRoPE, SelfExtend
from ..schemes.remapped_base import Remapped
from ..schemes.rotary import Rotary
from ..schemes.scalings import NTK, DynamicNTK, Linear, Llama3, LongRoPE, NTKByParts, Proportional, RoPE
from ..schemes.softmax import SoftmaxScaling
from ..schemes.yarn import DynamicYaRN, YaRN
from .auto import register
from .exporters.export import export
from .load import load_patched

__all__ = [
    "ADAPTERS",
    "ALIASES",
    "DCA",
    "FIRE",
    "MLA",
    "NTK",
    "SCHEMES",
    "STRING",
    "T5",
    "ALiBi",
    "ALiBi2D",
    "Adapter",
    "AlreadyPatchedError",
    "AttentionEngine",
    "AttentionShape",
    "BeyondWindowError",
    "CacheError",
    "CheckpointError",
    "ClippedRoPE",
    "CoPE",
    "Description",
    "DistanceBias",
    "DroPE",
    "DynamicNTK",
    "DynamicYaRN",
    "FoPE",
    "Integer",
    "Kerple",
    "LMInfinite",
    "LeakyReRoPE",
    "Learned",
    "Linear",
    "Llama3",
    "LongRoPE",
    "MismatchError",
    "MissingPackageError",
    "NTKByParts",
    "NoEffectError",
    "NoPE",
    "OneHot",
    "OptionError",
    "OptionValueError",
    "OutputError",
    "PePatchError",
    "Positions",
    "Proportional",
    "ReRoPE",
    "Remapped",
    "Resonance",
    "RoPE",
    "RoPE2D",
    "RoPEALiBi",
    "Rotary",
    "Sandwich",
    "Scheme",
    "SelfExtend",
    "Shaw",
    "Sinusoidal",
    "SoftmaxScaling",
    "TransformerXL",
    "UnknownNameError",
    "UnsupportedError",
    "XPos",
    "YaRN",
    "__version__",
    "describe",
    "export",
    "load_adapter",
    "load_patched",
    "patch_model",
    "patched",
    "register_adapter",
    "register_scheme",
    "unpatch_model",
]

SCHEMES.seal()
compat.warn_if_untested()
register()
logging.getLogger("pe_patch").addFilter(PrintableFilter())
