"""Nothing out of a checkpoint acts on the terminal: every command and every error shows control characters escaped."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from pe_patch import load_patched
from pe_patch.checkpoints.generation import Generated
from pe_patch.cli.main import main
from pe_patch.cli.output import PrintableFormatter, console
from pe_patch.errors import CheckpointError, PePatchError, printable
from pe_patch.evaluation.charts.chart import Chart, data

from .families import COMMON, GROUPED
from .models import build, put

DEMO = Path(__file__).parent.parent / "pe_patch" / "assets" / "demo"
HOSTILE = "\x1b[2J\x1b]0;t\x07No fault found\x9b31m\u2028\u2029\u202e\u2066\x00\r\x7f\ud800"
ACTING = [character for character in HOSTILE if not character.isprintable()]


def harmless(text: str) -> bool:
    return not any(character in text for character in ACTING)


def test_printable():
    assert printable("plain é 漢字 \U0001f600\n\ttab") == "plain é 漢字 \U0001f600\n\ttab"
    assert printable("\x1b[31m") == r"\x1b[31m" and printable("\u2028\u202e") == r"\u2028\u202e"
    assert printable("a\nb", keep="") == r"a\nb" and printable("\ud800") == r"\ud800"
    assert harmless(printable(HOSTILE)) and printable(printable(HOSTILE)) == printable(HOSTILE)


def test_errors_and_logs_of_the_library(caplog):
    for kind in (PePatchError, CheckpointError):
        assert harmless(str(kind(f"in {HOSTILE}")))
    with caplog.at_level(logging.WARNING, "pe_patch"):
        logging.getLogger("pe_patch").warning("%s holds %r and %s", "model", HOSTILE, HOSTILE)
    assert harmless(caplog.messages[0]) and "No fault found" in caplog.messages[0]
    record = logging.LogRecord("transformers", 30, "", 0, "Unknown %s", (HOSTILE,), None)
    assert harmless(PrintableFormatter("%(message)s").format(record))


CONFIGS = {
    "model type": {"model_type": HOSTILE},
    "model type on a line alone": {"model_type": "llama\nNo fault found in it."},
    "rope type": {"rope_parameters": {"rope_type": HOSTILE, "rope_theta": 1e4}},
    "rope key": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, HOSTILE: HOSTILE}},
    "layer type": {"layer_types": [HOSTILE, HOSTILE]},
    "activation": {"hidden_act": HOSTILE},
    "a record": {"pe_patch": {"version": 1, "scheme": HOSTILE, "options": {}, "native": {"model_type": "llama"}}},
    "an option": {"pe_patch": {"version": 1, "scheme": "yarn", "options": {HOSTILE: 1}, "native": {}}},
    "a version": {"pe_patch": {"version": HOSTILE}},
    "a family": {"pe_patch": {"version": 1, "scheme": "nope", "options": {}, "native": {"model_type": HOSTILE}}},
    "architecture": {"architectures": [HOSTILE]},
    "dtype": {"dtype": HOSTILE},
    "window": {"max_position_embeddings": HOSTILE},
}


@pytest.mark.parametrize("command", ["doctor", "doctor --json", "inspect", "inspect --json", "export", "advise"])
@pytest.mark.parametrize("name", CONFIGS)
def test_commands_on_a_hostile_checkpoint(name, command, tmp_path, capfd):
    config = {**COMMON, **GROUPED, "model_type": "llama", "architectures": ["LlamaForCausalLM"], **CONFIGS[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = command.split()
    code = main([words[0], str(tmp_path), *([str(tmp_path / "out")] if words == ["export"] else []), *words[1:]])
    out, err = capfd.readouterr()
    assert harmless(out.replace("\r\n", "\n")) and harmless(err), (out, err)
    if name != "model type on a line alone":
        return
    assert not any(line.startswith("No fault") for line in (out + err).splitlines()) or code == 0


def test_labels_do_not_stop_the_charts():
    import altair as alt

    panel = (
        alt.Chart(data([{"length": 1, "loss": 2.0, "series": HOSTILE}]), width=200, height=100, title=HOSTILE)
        .mark_point()
        .encode(x="length:Q", y="loss:Q", color=alt.Color("series:N", title=HOSTILE))
    )
    chart = Chart("loss", HOSTILE, (panel,), subtitle=f"{HOSTILE} text")
    assert chart.png().startswith(b"\x89PNG")
    assert harmless(json.dumps(chart.specifications(), ensure_ascii=False))


def test_the_console_escapes_cells_and_keeps_its_own_styles(capsys):
    from rich.table import Table
    from rich.text import Text

    table = Table("name")
    table.add_row(Text(HOSTILE))
    console().print(table)
    console(stderr=True).print(Text(HOSTILE))
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err) and "No fault found" in err


def test_a_patched_checkpoint_with_a_hostile_record(tmp_path, capfd):
    put(build("llama"), "t5").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in ("scheme", "options", "native", "written"):
        changed = {**config, "pe_patch": {**config["pe_patch"], key: HOSTILE}}
        (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError) as caught:
            load_patched(tmp_path / "model")
        assert harmless(str(caught.value))
        assert main(["inspect", str(tmp_path / "model")]) == 1
        assert harmless("".join(capfd.readouterr()))


def test_generated_text_is_escaped(tmp_path, capfd, monkeypatch):
    shutil.copytree(DEMO, tmp_path / "demo")

    def generated(*arguments, stream, **options):
        stream and stream(HOSTILE)
        return Generated(HOSTILE, 3)

    monkeypatch.setattr("pe_patch.checkpoints.generation.continue_ids", generated)
    for flags in ([], ["--json"]):
        assert main(["generate", str(tmp_path / "demo"), "--prompt", "The sea", *flags]) == 0
        assert harmless("".join(capfd.readouterr()))
