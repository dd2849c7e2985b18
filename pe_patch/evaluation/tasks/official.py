"""The official wording of a benchmark, taken from the installed lm-eval package when it is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ...errors import PePatchError

Render = Callable[[Mapping[str, Any]], str]


class _Loader(yaml.SafeLoader):
    """YAML as lm-eval writes it: `!function module.name` stays a name."""


class _Function(str):
    """The name of a function beside the YAML file: `module.name`."""


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))


@lru_cache(maxsize=64)
def official_prompt(file: str, repair: Callable[[str], str] = str) -> Render:
    """What makes the prompt of a row, as `lm_eval/tasks/<file>` words it.

    `repair` puts white space back that lm-eval's copy has lost, in the template. Without lm-eval, or where it has no
    such file, raises `PePatchError`.
    """
    path = lm_eval_tasks() / file
    if not path.is_file():
        raise PePatchError(f"The installed lm-eval has no wording of this task ({file}). Leave wording= at 'own'.")
    settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    head, body = settings.get("description", ""), settings["doc_to_text"]
    if isinstance(body, _Function):
        function = _function(path.parent, body)
        return lambda row: head + function(row)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(repair(head + body))
    return lambda row: template.render(row)


def lm_eval_tasks() -> Path:
    """Where the installed lm-eval keeps its tasks. Nothing of it is imported. Without it raises `PePatchError`."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise PePatchError(
            "wording='official' takes the prompts from the package lm-eval, which is not installed. "
            "Run: pip install 'pe_patch[lm-eval]'"
        )
    return Path(next(iter(found.submodule_search_locations))) / "tasks"


def _function(folder: Path, name: str) -> Callable[[Any], str]:
    module, _, function = name.rpartition(".")
    # By its path: importing `lm_eval.tasks` would import the whole harness.
    spec = importlib.util.spec_from_file_location(f"_lm_eval_{folder.name}_{module}", folder / f"{module}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)
