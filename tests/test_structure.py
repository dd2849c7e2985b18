"""Dependencies point one way, files stay small, and importing the library costs little and changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pe_patch"

LAYERS: dict[str, set[str]] = {  # module: what it may import of ours
    "errors": set(),
    "checks": {"errors"},
    "heads": {"errors"},
    "compat": {"errors"},
    "patching": {
        "adapters",
        "attention",
        "dialects",
        "errors",
        "join",
        "patching",
        "rotation",
        "scheme",
        "schemes",
        "swaps",
    },
    "parallel": {"compat", "errors", "heads"},
    "positions": {"errors"},
    "shape": set(),
    "scheme": {"errors", "heads", "positions", "shape", "attention", "latent"},  # the last two for types only
    "rotation": {"checks", "errors", "heads", "positions", "scheme", "attention"},
    "stacked": {"positions", "scheme", "attention"},  # attention for a type only
    "dialects": {"checks", "errors"},
    "schemes": {
        "checks",
        "errors",
        "heads",
        "positions",
        "ranges",
        "scheme",
        "rotation",
        "dialects",
        "schemes",
        "attention",
        "latent",
    },
    "ranges": {"positions"},
    "kernels": {"kernels", "positions", "ranges"},
    "latent": {"errors", "swaps", "latent"},
    "backends": {"errors", "scheme"},
    "core": {"backends", "errors", "heads", "kernels", "positions", "ranges", "scheme"},
    "attention": {"backends", "core", "errors", "parallel", "positions"},
    "adapters": {"compat", "errors", "patching", "scheme", "rotation", "attention", "latent", "adapters"},
    "swaps": set(),
    "forward": {"compat", "errors", "parallel", "patching", "positions", "scheme", "attention"},
}
"""The lower floors; `patch` joins them, and storage, export, describe, evaluation and the command line stand above."""

ABOVE = {"cli", "evaluation", "demo", "catalogue", "loading", "advice", "search"}


def modules() -> dict[Path, str]:
    return {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}


def ours_imported_by(path: Path) -> set[str]:
    """First components, below pe_patch, of what a file imports."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            names = (node.module or "").split(".") if node.module else [alias.name for alias in node.names]
            found.add([*above, *names][0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pe_patch."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize("floor", sorted(LAYERS))
def test_imports_go_one_way(floor):
    for path, name in modules().items():
        if name == floor:
            assert ours_imported_by(path) <= LAYERS[floor], path.relative_to(ROOT)


def test_nothing_below_knows_the_tools_above():
    for path, name in modules().items():
        if name not in ABOVE | {"__init__", "__main__"}:
            assert not ours_imported_by(path) & ABOVE, path.relative_to(ROOT)


TORCH_ONLY = {
    "checks",
    "errors",
    "heads",
    "positions",
    "ranges",
    "kernels",
    "scheme",
    "shape",
    "rotation",
    "schemes",
    "dialects",
    "swaps",
    "latent",
}


def test_schemes_never_see_transformers():
    for path, name in modules().items():
        if name in TORCH_ONLY:
            text = path.read_text(encoding="utf-8")
            imported = {
                (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.ImportFrom | ast.Import)
            }
            assert not any(module.split(".")[0] == "transformers" for module in imported), path


def python_files() -> list[Path]:
    folders = ("pe_patch", "recipes", "tests", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_files_stay_readable():
    """One idea, one file: a file may be long if it reads from top to bottom, but not endless."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {str(path): n for path, n in lengths.items() if n > 700} == {}


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
        "patch_model unpatch_model patched describe load_patched export evaluate Scheme AttentionShape Positions "
        "Adapter SCHEMES ALIASES ADAPTERS PePatchError NoEffectError AlreadyPatchedError UnsupportedError"
    ).split():
        assert getattr(pe_patch, name) is not None
    with pytest.raises(AttributeError):
        _ = pe_patch.no_such_name
