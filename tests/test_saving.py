"""Test that every family saves and loads with a scheme of each mechanism, in a new process, unless it is refused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from transformers.utils import logging as host_logging

from pe_patch import ADAPTERS, UnsupportedError, patch_model
from pe_patch.adapters import LATENT as FOLDING

from .families import LANGUAGE_MODELS, VOCABULARY, WINDOW, build

CALIBRATION = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(5))
SCHEMES: dict[str, dict] = {
    "sinusoidal": {},
    "nope": {},
    "yarn": {"factor": 4.0, "beta_fast": 4.0},
    "dynamic_ntk": {"factor": 2.0},
    "alibi": {},
    "shaw": {"max_distance": 6},
    "self_extend": {"group": 4, "window": 12},
    "mla": {"kv_rank": 24, "rope_dim": 8, "calibration": CALIBRATION},
}
"""One of each mechanism: absolute, none, static rotary, length-dependent, bias, content-relative, two-range, another
attention."""
LENGTHS = (20, 48)
"""The comparison leaves out token 0, whose row Transformers sets to zero on loading if embeddings are tied."""
LATENT = {*FOLDING, "deepseek_v2"}
SOFT_CAPPED = {"gemma2"}

READER = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
ours, root = sys.argv[1] == "ours", sys.argv[2]
if ours:
    import pe_patch
from transformers import AutoModelForCausalLM
found, ids = {}, torch.load(root + "/ids.pt")
for folder in sys.argv[3:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(root + "/" + folder)
        with torch.no_grad():
            found[folder] = [model(ids[:, :length], use_cache=False).logits for length in (20, 48)]
        found[folder + " config"] = type(model.config).__name__, model.config.pe_patch["scheme"]
    except Exception as error:
        found[folder] = type(error).__name__ + ": " + str(error)
    if not ours:
        import json, pathlib
        architecture = json.loads(pathlib.Path(root, folder + ".json").read_text())
        try:
            getattr(transformers, architecture).from_pretrained(root + "/" + folder)
            found[folder + " class"] = ""
        except Exception as error:
            found[folder + " class"] = type(error).__name__ + ": " + str(error)
assert ours or "pe_patch" not in sys.modules
torch.save(found, root + "/" + sys.argv[1] + ".pt")
"""


def patched_model(family: str, scheme: str):
    model = build(family, "eager" if family in SOFT_CAPPED else None, num_hidden_layers=2, **two_layers(family))
    options = dict(SCHEMES[scheme])
    if ADAPTERS[family].rotary is None and scheme in ("yarn", "dynamic_ntk", "self_extend"):
        options["original_max_position_embeddings"] = WINDOW
    if family == "gemma3_text" and scheme in ("yarn", "dynamic_ntk", "self_extend"):
        options["layers"] = [1]  # where layer types have different bases, a scaling is for one of them
    if scheme == "shaw" and family in LATENT:
        options["values"] = False  # its table has the width of a query, and values have another width there
    if scheme == "mla" and family in LATENT:
        options = {}  # the family has latents already
    return patch_model(model, scheme, **options)


def two_layers(family: str) -> dict:
    """Return the layer types of two layers, for a family that has several."""
    return {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    """Save all models; return their folder, logits, refusals, natively saved names, and what the readers loaded."""
    root = tmp_path_factory.mktemp("saving")
    ids = torch.randint(3, VOCABULARY, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    torch.save(ids, root / "ids.pt")
    expected, refused, native = {}, {}, []
    printed: list[str] = []
    host_logging.disable_progress_bar()
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the readers, since the number of threads changes the order of sums
    for family in LANGUAGE_MODELS:
        for scheme in SCHEMES:
            folder = f"{family}-{scheme}"
            try:
                model = patched_model(family, scheme)
            except UnsupportedError as error:
                refused[folder] = str(error)
                continue
            printed.clear()
            model.save_pretrained(root / folder)
            assert not any("Missing validation function" in line for line in printed), printed
            assert model.config.model_type == family
            (root / f"{folder}.json").write_text(json.dumps(type(model).__name__))
            if json.loads((root / folder / "config.json").read_text())["model_type"] == family:
                native.append(folder)
            with torch.no_grad():
                expected[folder] = [model(ids[:, :length], use_cache=False).logits for length in LENGTHS]
    torch.set_num_threads(threads)
    logging.getLogger("transformers").removeHandler(handler)
    for reader in ("ours", "plain"):
        subprocess.run([sys.executable, "-c", READER, reader, str(root), *expected], check=True, capture_output=True)
    return root, expected, refused, native, {name: torch.load(root / f"{name}.pt") for name in ("ours", "plain")}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_saved_models_load_with_the_same_logits_or_an_error_that_helps(family, scheme, saved_models):
    """`AutoModelForCausalLM` gives the patched logits with pe_patch imported, and a helpful error without it."""
    _, expected, refused, native, found = saved_models
    folder = f"{family}-{scheme}"
    if folder in refused:
        assert scheme not in ("sinusoidal", "nope", "yarn")  # which every family takes
        return
    ours, plain = found["ours"][folder], found["plain"][folder]
    assert not isinstance(ours, str), ours
    assert found["ours"][f"{folder} config"] == (type(build(family).config).__name__, scheme)
    readings = [ours, plain] if folder in native else [ours]
    for reading in readings:
        assert not isinstance(reading, str), reading
        for actual, logits in zip(reading, expected[folder], strict=True):
            close = (2e-5 if folder in native else 0) * float(logits.abs().max())
            torch.testing.assert_close(actual[..., 1:], logits[..., 1:], rtol=0, atol=close)
    if folder not in native:
        assert "import pe_patch" in plain
        assert "pe_patch.load_patched" in found["plain"][f"{folder} class"]
