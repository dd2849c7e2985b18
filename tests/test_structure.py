"""Every module lives in a room, imports go down one order, and importing the library costs little."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pe_patch"

ORDER: tuple[tuple[str, ...], ...] = (
    ("__init__", "__main__"),
    ("cli",),
    ("extension",),
    ("compare", "convert", "advice", "doctor", "search"),
    ("training",),
    ("evaluation",),
    ("checkpoints",),
    ("patching",),
    ("mla",),
    ("adapters",),
    ("schemes",),
    ("attention",),
    ("core",),
    ("data",),
    ("compat",),
    ("errors",),
)
"""The rooms from top to bottom. A module imports from its own room and from rooms below it; rooms of one row are
neighbours that do not know each other, but for those in `NEIGHBOURS`."""

NEIGHBOURS = {("advice", "doctor"), ("advice", "search"), ("convert", "compare"), ("doctor", "compare")}
"""Which room may import from which other in the same row."""

LOOSE = {"__init__", "__main__", "errors", "compat"}
"""Modules directly under `pe_patch/`."""

NO_TRANSFORMERS = ("core", "schemes", "attention/kernels", "data", "errors")
"""Rooms that never see Transformers, so that a scheme can be read and tested without it."""

ROW = {room: row for row, rooms in enumerate(ORDER) for room in rooms}


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """Dotted names of all modules of a package, with their files."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def room_of(module: str) -> str:
    """The first component below the package; the package itself is `__init__`."""
    _, _, inner = module.partition(".")
    return inner.split(".")[0] or "__init__"


def imported(module: str, path: Path, known: set[str]) -> Iterator[str]:
    """Modules of the same package that a file imports, in whatever form and wherever in the file."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    top = module.split(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == top)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *(node.module.split(".") if node.module else [])])
            if source.split(".")[0] != top:
                continue
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in known else source


def faults(package: Path) -> list[str]:
    """Modules without a room, and imports that go up, each in one line."""
    files = dict(modules(package))
    found = []
    for module, path in files.items():
        room = room_of(module)
        if room not in ROW:
            found.append(f"{module} has no room")
            continue
        for target in imported(module, path, set(files)):
            other = room_of(target)
            if other == room or (room, other) in NEIGHBOURS:
                continue
            if other not in ROW or ROW[other] <= ROW[room]:
                found.append(f"{module} imports {target}")
    return found


def test_every_module_has_a_room_and_imports_go_down():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("import torch, pe_patch.patching.api", "pe_patch.core.wrong imports pe_patch.patching.api"),
        ("from pe_patch import patching", "pe_patch.core.wrong imports pe_patch.patching"),
        ("import pe_patch.schemes as s", "pe_patch.core.wrong imports pe_patch.schemes"),
        ("def f():\n    from ..schemes import rotary", "pe_patch.core.wrong imports pe_patch.schemes.rotary"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..attention.engine import Engine",
            "pe_patch.core.wrong imports pe_patch.attention.engine",
        ),
        ("import pe_patch", "pe_patch.core.wrong imports pe_patch"),
        ("from .. import patch_model", "pe_patch.core.wrong imports pe_patch"),
    ],
)
def test_a_wrong_import_is_found_in_every_form(tmp_path, line, fault):
    package = tmp_path / "pe_patch"
    for name in ("__init__", "core/wrong", "core/__init__", "patching/__init__", "patching/api", "schemes/__init__",
                 "schemes/rotary", "attention/__init__", "attention/engine"):  # fmt: skip
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("")
    assert faults(package) == []
    (package / "core" / "wrong.py").write_text(line)
    assert faults(package) == [fault]


def test_a_module_without_a_room_is_found(tmp_path):
    (tmp_path / "pe_patch" / "attic").mkdir(parents=True)
    (tmp_path / "pe_patch" / "attic" / "chest.py").write_text("")
    assert faults(tmp_path / "pe_patch") == ["pe_patch.attic.chest has no room"]


def test_only_four_modules_are_loose():
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


def test_every_room_says_its_job_in_one_line():
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        line = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert line, f"{folder.relative_to(ROOT)}/__init__.py has no docstring"


def test_no_function_shadows_a_module():
    import pe_patch

    for module, _ in modules(PACKAGE):
        parent, _, name = module.rpartition(".")
        if parent == "pe_patch" and name not in LOOSE:
            assert not callable(getattr(pe_patch, name, None)), name


def test_schemes_never_see_transformers():
    for folder in NO_TRANSFORMERS:
        for path in [*(PACKAGE / folder).rglob("*.py"), *PACKAGE.glob(f"{folder}.py")]:
            names = set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add((node.module or "").split(".")[0])
            assert "transformers" not in names, path.relative_to(ROOT)


def test_there_is_one_import_path_for_training():
    assert importlib.util.find_spec("pe_patch.recipes") is None or not list((PACKAGE / "recipes").rglob("__init__.py"))
    assert {path.name for path in (ROOT / "recipes").glob("*.py")} == {"finetune.py"}
    assert len((ROOT / "recipes" / "finetune.py").read_text(encoding="utf-8").splitlines()) <= 12


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_brings_no_heavy_library():
    heavy = "datasets matplotlib evaluate lm_eval pandas peft jinja2 typer rich".split()
    code = f"import sys, pe_patch; print([name for name in {heavy!r} if name in sys.modules])"
    before = f"import sys, transformers; print([n for n in {heavy!r} if n in sys.modules])"
    assert set(ast.literal_eval(run(code))) <= set(ast.literal_eval(run(before)))


def test_importing_adds_only_our_own_names_to_the_registries():
    code = """
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
tables = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping, ROPE_INIT_FUNCTIONS]
before = [dict(table) for table in tables]
import pe_patch
for table, old in zip(tables, before):
    assert all(table[name] is value for name, value in old.items())
    assert all(name.startswith("pe_") for name in set(table) - set(old)), set(table) - set(old)
print("clean")
"""
    assert run(code) == "clean"


def test_the_public_names_are_there():
    import pe_patch

    for name in (
        "patch_model unpatch_model patched describe load_patched load_adapter export evaluate Scheme AttentionShape "
        "Positions Adapter SCHEMES ALIASES ADAPTERS PePatchError NoEffectError AlreadyPatchedError UnsupportedError"
    ).split():
        assert getattr(pe_patch, name) is not None
    with pytest.raises(AttributeError):
        _ = pe_patch.no_such_name
