"""Replace the positional logic of a loaded Transformers model, extend its context, and measure that it reads it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

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
    "TransformerXL",
    "UnknownNameError",
    "UnsupportedError",
    "XPos",
    "YaRN",
    "__version__",
    "describe",
    "evaluate",
    "export",
    "extend",
    "load_adapter",
    "load_patched",
    "patch_model",
    "patched",
    "register_adapter",
    "register_scheme",
    "unpatch_model",
]


def _is_command() -> bool:
    """Return whether this process was started as `pe-patch` or `python -m pe_patch`.

    The command loads the rest of the library when it runs something: `pe-patch --help` needs no torch.
    """
    program, words = sys.argv[0] if getattr(sys, "argv", None) else "", sys.orig_argv
    if program == "-m":
        return words[words.index("-m") + 1 :][:1] == ["pe_patch"] if "-m" in words else False
    # multiprocessing copies the parent's sys.argv into a child, but sys.orig_argv shows how the child was started.
    return PurePath(program).name in ("pe-patch", "pe-patch.exe") and program in words


if TYPE_CHECKING:
    from .checkpoints.library import *  # noqa: F403
    from .evaluation import evaluate
    from .extension import extend
elif not _is_command():
    from .checkpoints.library import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # Evaluation brings datasets and evaluate with it, which patching does not need.
    rooms = {"evaluate": ".evaluation", "extend": ".extension"}
    if name in __all__:
        return getattr(import_module(rooms.get(name, ".checkpoints.library"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
