"""Read the official wording of a benchmark from the installed lm-eval package, which makes it the default."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ...errors import PePatchError

logger = logging.getLogger(__name__)

Render = Callable[[Mapping[str, Any]], str]


@lru_cache(maxsize=1)
def default_wording() -> str:
    """Return "official" if lm-eval is installed, else "own" with a warning: such scores cannot be compared."""
    if importlib.util.find_spec("lm_eval") is not None:
        return "official"
    logger.warning(
        "lm-eval is not installed, so RULER, LongBench and InfiniteBench are asked in our own words, and the scores "
        "are not comparable with published ones. Run: pip install 'pe_patch[eval]'"
    )
    return "own"


def lm_eval_version() -> str:
    """Return the version of the installed lm-eval, or an empty string."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        return ""


class _Loader(yaml.SafeLoader):
    """A YAML loader for lm-eval's files, which returns `!function module.name` as a name."""


class _Function(str):
    """The name of a function in a module next to the YAML file: `module.name`."""


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))


@lru_cache(maxsize=64)
def official_prompt(file: str, repair: Callable[[str], str] = str) -> Render:
    """Return a function from a row to its prompt, with the wording of `lm_eval/tasks/<file>`.

    Args:
        file: the path of a task's YAML file below lm-eval's tasks.
        repair: restores white space in the template that lm-eval's copy has lost.

    Raises:
        PePatchError: if lm-eval is not installed or has no such file.
    """
    path = lm_eval_tasks() / file
    if not path.is_file():
        raise PePatchError(f"The installed lm-eval has no wording of this task ({file}). Give wording='own'.")
    settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    head, body = settings.get("description", ""), settings["doc_to_text"]
    if isinstance(body, _Function):
        function = _function(path.parent, body)
        return lambda row: head + function(row)
    import jinja2  # lm-eval needs it too

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(repair(head + body))
    return lambda row: template.render(row)


def lm_eval_tasks() -> Path:
    """Return the folder of the installed lm-eval's tasks, without importing lm-eval.

    Raises:
        PePatchError: if lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise PePatchError(
            "wording='official' takes the prompts from the package lm-eval, which is not installed. "
            "Run: pip install 'pe_patch[eval]'"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def _function(folder: Path, name: str) -> Callable[[Any], str]:
    module, _, function = name.rpartition(".")
    # By its path: importing `lm_eval.tasks` would import the whole harness.
    spec = importlib.util.spec_from_file_location(f"_lm_eval_{folder.name}_{module}", folder / f"{module}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)
