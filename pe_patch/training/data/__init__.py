"""Turn documents into training sequences: tokenise once, pack, hide facts, and batch."""

from .batches import first_tokens, micro_batches
from .checks import check_ids, check_unchanged, data_notes, refuse_ids
from .corpus import Corpus
from .mixture import mix_notes, mix_table
from .packing import pack
from .phase import PhaseData
from .sequences import IGNORED
from .store import load_corpora, open_store

__all__ = [
    "IGNORED",
    "Corpus",
    "PhaseData",
    "check_ids",
    "check_unchanged",
    "data_notes",
    "first_tokens",
    "load_corpora",
    "micro_batches",
    "mix_notes",
    "mix_table",
    "open_store",
    "pack",
    "refuse_ids",
]
