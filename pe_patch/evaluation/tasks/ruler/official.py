"""Read RULER's wording from the source of the installed lm-eval; this package contains none of it.

The files are parsed instead of imported, because importing them starts a download.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ....errors import PePatchError
from ..official import lm_eval_tasks
from .wording import OFFICIAL, QuestionTemplate, Wording

_CORRECTED = {"assgined": "assigned"}
"""A typo that NVIDIA has corrected in RULER and lm-eval has not."""
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))
"""RULER's replacements, in this order, in a question for one value."""


@cache
def official() -> Wording:
    """Return RULER's wording.

    Raises:
        PePatchError: if lm-eval is not installed, or its files have changed.
    """
    folder = lm_eval_tasks() / "ruler"
    installed = version("lm_eval")
    try:
        return _read(folder, f"{OFFICIAL} (lm-eval {installed})")
    except (OSError, SyntaxError, LookupError, ValueError, StopIteration) as error:
        raise PePatchError(
            f"Cannot find RULER's wording in the installed lm-eval {installed} ({error!r}). Install lm-eval 0.4.13, or "
            "give wording='own'."
        ) from error


def _read(folder: Path, name: str) -> Wording:
    niah, vt, cwe, fwe, qa, needles = (
        _Source(folder / f"{file}.py")
        for file in ("niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils", "prepare_niah")
    )
    plural = QuestionTemplate(niah.strings("TEMPLATE")[0], " " + needles.formats("are")[0])
    singular = QuestionTemplate(*(_singular(text) for text in (plural.template, plural.answer_prefix)))
    assignment, link = (text for text in vt.formats("=", places=True, within="generate_chains")[:2])
    return Wording(
        name=name,
        needle=needles.strings("NEEDLE")[0],
        noise=next(text for text in needles.strings("haystack") if "{" not in text),
        one_value=singular,
        all_values=plural,
        variables=_template_of(vt),
        assignment=assignment,
        link=link,
        common_words=_template_of(cwe),
        frequent_words=_template_of(fwe),
        answer_from_documents=_template_of(qa),
        document=qa.strings("DOCUMENT_PROMPT")[0],
    )


def _template_of(source: _Source) -> QuestionTemplate:
    """Return template and answer prefix of a CONFIG; add the space before the prefix that lm-eval sometimes omits."""
    template, prefix = source.entry("template"), source.entry("answer_prefix")
    return QuestionTemplate(template, " " + prefix.removeprefix(" "))


def _singular(text: str) -> str:
    for plural, singular in _SINGULAR:
        text = text.replace(plural, singular)
    return text


class _Source:
    """The strings of a Python file."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"), str(path))

    def strings(self, name: str) -> list[str]:
        """Return every string that is assigned to a variable of this name."""
        values = [
            node.value.value
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and _is(node.targets[0], name)
        ]
        return [text for text in values if isinstance(text, str)]

    def entry(self, name: str) -> str:
        """Return the string under a key of a dictionary literal."""
        for keys, values in ((node.keys, node.values) for node in ast.walk(self.tree) if isinstance(node, ast.Dict)):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                    return _corrected(str(value.value))
        raise KeyError(name)

    def formats(self, words: str, *, places: bool = False, within: str | None = None) -> list[str]:
        """Return the f-strings that end with `words` as templates with the names of their variables.

        Args:
            words: the words to find.
            places: True for templates with empty braces, of the f-strings that contain `words`.
            within: the function to search; None searches the whole file.
        """
        texts = (_template(node, places) for node in self._f_strings(within))
        return [text for text in texts if (words in text if places else text.endswith(words))]

    def _f_strings(self, within: str | None) -> Iterator[ast.JoinedStr]:
        scope: ast.AST = self.tree
        if within is not None:
            scope = next(
                node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef) and node.name == within
            )
        nodes = [node for node in ast.walk(scope) if isinstance(node, ast.JoinedStr)]
        return iter(sorted(nodes, key=lambda node: (node.lineno, node.col_offset)))


def _template(node: ast.JoinedStr, places: bool) -> str:
    segments = []
    for value in node.values:
        if isinstance(value, ast.FormattedValue):
            segments.append("{}" if places else "{" + ast.unparse(value.value) + "}")
        elif isinstance(value, ast.Constant):
            segments.append(str(value.value))
    return "".join(segments)


def _is(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Name) and target.id == name


def _corrected(text: str) -> str:
    for wrong, right in _CORRECTED.items():
        text = text.replace(wrong, right)
    return text
