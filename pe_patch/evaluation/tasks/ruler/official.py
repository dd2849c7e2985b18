"""RULER's own words, read from the source of the installed lm-eval; nothing of them is kept here.

The files are parsed and not imported, since importing them starts a download.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ....errors import PePatchError
from ..official import lm_eval_tasks
from .wording import OFFICIAL, Asking, Wording

_CORRECTED = {"assgined": "assigned"}
"""A slip that NVIDIA has corrected in RULER and lm-eval has not."""
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))
"""What RULER replaces, in this order, in a question for one value."""


@cache
def official() -> Wording:
    """RULER's wording.

    Raises:
        PePatchError: lm-eval is not installed, or its files have changed.
    """
    folder = lm_eval_tasks() / "ruler"
    installed = version("lm_eval")
    try:
        return _read(folder, f"{OFFICIAL} (lm-eval {installed})")
    except (OSError, SyntaxError, LookupError, ValueError, StopIteration) as error:
        raise PePatchError(
            f"RULER's words are not where they were in lm-eval 0.4.13; {installed} is installed ({error!r}). lm-eval "
            "0.4.13 has them; install it, or leave the wording out."
        ) from error


def _read(folder: Path, name: str) -> Wording:
    niah, vt, cwe, fwe, qa, needles = (
        _Source(folder / f"{file}.py")
        for file in ("niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils", "prepare_niah")
    )
    several = Asking(niah.strings("TEMPLATE")[0], " " + needles.formats("are")[0])
    one = Asking(*(_singular(text) for text in (several.template, several.answer_prefix)))
    assignment, link = (text for text in vt.formats("=", places=True, within="generate_chains")[:2])
    return Wording(
        name=name,
        needle=needles.strings("NEEDLE")[0],
        noise=next(text for text in needles.strings("haystack") if "{" not in text),
        one_value=one,
        all_values=several,
        variables=_asking(vt),
        assignment=assignment,
        link=link,
        common_words=_asking(cwe),
        frequent_words=_asking(fwe),
        answer_from_documents=_asking(qa),
        document=qa.strings("DOCUMENT_PROMPT")[0],
    )


def _asking(source: _Source) -> Asking:
    """Template and answer prefix of a CONFIG; the prefix begins with one space, which lm-eval sometimes leaves out."""
    template, prefix = source.entry("template"), source.entry("answer_prefix")
    return Asking(template, " " + prefix.removeprefix(" "))


def _singular(text: str) -> str:
    for plural, singular in _SINGULAR:
        text = text.replace(plural, singular)
    return text


class _Source:
    """The strings of a Python file."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"), str(path))

    def strings(self, name: str) -> list[str]:
        """Every string that is assigned to a variable of this name."""
        found = [
            node.value.value
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and _is(node.targets[0], name)
        ]
        return [text for text in found if isinstance(text, str)]

    def entry(self, key: str) -> str:
        """The string under a key of a dictionary that is written out."""
        for keys, values in ((node.keys, node.values) for node in ast.walk(self.tree) if isinstance(node, ast.Dict)):
            for each, value in zip(keys, values, strict=True):
                if isinstance(each, ast.Constant) and each.value == key and isinstance(value, ast.Constant):
                    return _corrected(str(value.value))
        raise KeyError(key)

    def formats(self, ends: str, *, places: bool = False, within: str | None = None) -> list[str]:
        """Every f-string that ends with (`places`: holds) these words, as a template with its variables' names, or
        with empty places."""
        texts = (_template(node, places) for node in self._f_strings(within))
        return [text for text in texts if (ends in text if places else text.endswith(ends))]

    def _f_strings(self, within: str | None) -> Iterator[ast.JoinedStr]:
        scope: ast.AST = self.tree
        if within is not None:
            scope = next(
                node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef) and node.name == within
            )
        found = [node for node in ast.walk(scope) if isinstance(node, ast.JoinedStr)]
        return iter(sorted(found, key=lambda node: (node.lineno, node.col_offset)))


def _template(node: ast.JoinedStr, places: bool) -> str:
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            parts.append("{}" if places else "{" + ast.unparse(part.value) + "}")
        elif isinstance(part, ast.Constant):
            parts.append(str(part.value))
    return "".join(parts)


def _is(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Name) and target.id == name


def _corrected(text: str) -> str:
    for wrong, right in _CORRECTED.items():
        text = text.replace(wrong, right)
    return text
