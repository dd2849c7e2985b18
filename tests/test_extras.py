"""Without the packages of an extra, patching works and the rest says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pe_patch.compat import EXTRAS

ROOT = Path(__file__).parent.parent

WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
{code}
"""

PATCHES = """
from tests.models import build, tokens
from pe_patch import YaRN, evaluate, export, patch_model, unpatch_model
model = patch_model(build("llama"), YaRN(factor=2))
model(tokens(1, 8))
unpatch_model(model)
"""


def run(code: str, extra: str = "") -> subprocess.CompletedProcess[str]:
    names = EXTRAS[extra] if extra else sorted({name for packages in EXTRAS.values() for name in packages} - {"jinja2"})
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names, code=code)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


def test_patching_needs_no_extra():
    done = run(PATCHES)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("report", "import pe_patch.evaluation.charts"),
        ("report", "from pe_patch.compare import command"),
        ("train", "from pe_patch.training.run import load_recipe"),
        ("train", "from pe_patch.cli.main import main; sys.exit(main(['train', 'tiny_yarn']))"),
        (
            "gguf",
            "import tempfile; from pathlib import Path; from pe_patch.cli.main import main; "
            "file = Path(tempfile.mkdtemp(), 'model.gguf'); file.write_bytes(b'GGUF'); "
            "sys.exit(main(['inspect', str(file), '--scheme', 'rope']))",
        ),
        ("eval", "from pe_patch.evaluation.tasks.ruler.material import word_list; word_list('noun')"),
    ],
)
def test_a_missing_package_is_named_with_what_to_type(extra, code):
    done = run(code, extra)
    assert done.returncode != 0 and f"pip install 'pe_patch[{extra}]'" in done.stderr
    assert EXTRAS[extra][0] in done.stderr


def test_the_extras_of_the_package_hold_what_the_errors_name():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        listed = " ".join(project["optional-dependencies"][extra] + project["optional-dependencies"]["report"])
        assert all(package.replace("_", "-") in listed for package in packages)
