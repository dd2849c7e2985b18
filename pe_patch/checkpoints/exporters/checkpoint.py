"""Write the files of an exported checkpoint."""

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
"""Writes an export to the first folder. The second is its final folder, for paths in the files."""

SERVING_FILES = ("serve.json", "SERVE.md")

FOLDER = "FOLDER"
ORIGINAL = "ORIGINAL"
"""Placeholders in a command: the exported folder, and the checkpoint before the patch."""


def save_model(model: PreTrainedModel, config: Any, folder: Path) -> None:
    """Save weights, generation config, and the config for the target."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if "position_schemes." not in name}
    model.save_pretrained(folder, state_dict=weights)
    config.architectures = [type(model).__name__]  # servers choose their class by this
    config.dtype = model.dtype
    config.save_pretrained(folder)


def write_record(folder: Path, target: str) -> None:
    """List the files of an export, so that the next export to this folder knows what it may replace."""
    files = sorted(file.name for file in folder.iterdir() if file.name != EXPORT_RECORD)
    write_json(folder / EXPORT_RECORD, {"written_by": "pe_patch.export", "target": target, "files": files})


@dataclass(frozen=True)
class Serving:
    """Content of `serve.json` and `SERVE.md`: how a tool serves the folder."""

    tool: str
    version: str
    """Version of the tool whose source was read."""
    scheme: str
    trained_window: int
    window: int
    commands: list[list[str]]
    """Commands in order, with FOLDER for the exported folder."""
    original: list[str] = field(default_factory=list)
    """Command that serves the original checkpoint (ORIGINAL) with the same positions; empty if flags cannot."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """GGUF keys that carry the scheme (llama.cpp only)."""
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path, final: Path) -> None:
        """Write `serve.json` and `SERVE.md` to `folder`, with commands that name `final`."""
        content = asdict(self)
        content["commands"] = [_fill_folder(command, final) for command in self.commands]
        write_json(folder / SERVING_FILES[0], {name: value for name, value in content.items() if value})
        (folder / SERVING_FILES[1]).write_text(self._markdown(content["commands"]), encoding="utf-8")

    def _markdown(self, commands: list[list[str]]) -> str:
        paragraphs = [
            f"# Serving with {self.tool}",
            f"Positions: `{self.scheme}`, {self.trained_window} tokens trained, {self.window} reached. "
            f"Flags and keys as read in {self.tool} {self.version}.",
            _block(commands),
        ]
        if self.original:
            paragraphs += [
                "The same positions with the original checkpoint (its weights, not those of this folder):",
                _block([self.original]),
            ]
        if self.metadata:
            paragraphs += ["The GGUF file's keys:", f"```json\n{json.dumps(self.metadata, indent=2)}\n```"]
        paragraphs += [f"- {note}" for note in self.notes]
        return "\n\n".join(paragraphs) + "\n"


def read_commands(folder: Path) -> list[str]:
    """Return the shell commands that serve an exported folder; empty if it needs no server."""
    file = folder / SERVING_FILES[0]
    if not file.is_file():
        return []
    return [shlex.join(command) for command in json.loads(file.read_text(encoding="utf-8"))["commands"]]


def _fill_folder(command: list[str], folder: Path) -> list[str]:
    return [word.replace(FOLDER, str(folder)) for word in command]


def _block(commands: list[list[str]]) -> str:
    return "```sh\n" + "\n".join(shlex.join(command) for command in commands) + "\n```"
