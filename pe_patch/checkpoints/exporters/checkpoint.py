"""The files of an exported checkpoint."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...patching.config import write_json
from ..folders import EXPORT_RECORD

Writer = Callable[[Path, Path], None]
"""Writes an export to the first folder, for the second, to which its files are moved when all are there."""

SERVING_FILES = ("serve.json", "SERVE.md")

FOLDER = "FOLDER"
ORIGINAL = "ORIGINAL"
"""Stand in a command for the exported folder, and for the checkpoint as it was before the patch."""


def save_model(model: PreTrainedModel, config: Any, folder: Path) -> None:
    """Weights, generation config, and the config that the target reads."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if "position_schemes." not in name}
    model.save_pretrained(folder, state_dict=weights)
    config.architectures = [type(model).__name__]  # servers choose their class by it
    config.dtype = model.dtype
    config.save_pretrained(folder)


def write_record(folder: Path, target: str) -> None:
    """List the files of an export, so that the next one to the same folder knows which it may replace."""
    files = sorted(file.name for file in folder.iterdir() if file.name != EXPORT_RECORD)
    write_json(folder / EXPORT_RECORD, {"written_by": "pe_patch.export", "target": target, "files": files})


@dataclass(frozen=True)
class Serving:
    """How a tool serves the folder: what `serve.json` and `SERVE.md` say."""

    tool: str
    version: str
    """The version in whose source the facts were read."""
    scheme: str
    trained_window: int
    window: int
    commands: list[list[str]]
    """In order; FOLDER stands for the exported folder."""
    original: list[str] = field(default_factory=list)
    """The same positions for the checkpoint as it was before (ORIGINAL), where flags can say them."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """llama.cpp: the GGUF keys that carry the scheme."""
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path, final: Path) -> None:
        content = asdict(self)
        content["commands"] = [_placed(command, final) for command in self.commands]
        write_json(folder / SERVING_FILES[0], {name: value for name, value in content.items() if value})
        (folder / SERVING_FILES[1]).write_text(self._markdown(content["commands"]), encoding="utf-8")

    def _markdown(self, commands: list[list[str]]) -> str:
        parts = [
            f"# Serving with {self.tool}",
            f"Positions: `{self.scheme}`, {self.trained_window} tokens trained, {self.window} reached. "
            f"Flags and keys as read in {self.tool} {self.version}.",
            _block(commands),
        ]
        if self.original:
            parts += [
                "The same positions with the original checkpoint (its weights, not those of this folder):",
                _block([self.original]),
            ]
        if self.metadata:
            parts += ["The GGUF file's keys:", f"```json\n{json.dumps(self.metadata, indent=2)}\n```"]
        parts += [f"- {note}" for note in self.notes]
        return "\n\n".join(parts) + "\n"


def read_commands(folder: Path) -> list[str]:
    """The commands that serve an exported folder, as lines for a shell; none where it needs no server."""
    file = folder / SERVING_FILES[0]
    if not file.is_file():
        return []
    return [shlex.join(command) for command in json.loads(file.read_text(encoding="utf-8"))["commands"]]


def _placed(command: list[str], folder: Path) -> list[str]:
    return [word.replace(FOLDER, str(folder)) for word in command]


def _block(commands: list[list[str]]) -> str:
    return "```sh\n" + "\n".join(shlex.join(command) for command in commands) + "\n```"
