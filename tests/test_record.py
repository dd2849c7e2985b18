"""A saved record is right when it is uploaded, agrees with the config beside it, and is checked when it is read."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from pe_patch import describe, load_patched, patch_model, unpatch_model
from pe_patch.cli.main import main
from pe_patch.errors import CheckpointError, OptionError, PePatchError
from pe_patch.patching.peft_record import TENSORS

from .models import GIVEN, applies, build, logits, put, tokens

DEMO = Path(__file__).parent.parent / "pe_patch" / "assets" / "demo"
IDS = tokens(2, 48)
UPLOADED = [("bloom", "nope"), ("gpt2", "rope"), ("llama", "t5"), ("llama", "yarn")]


def written(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder under a scheme with weights, one under one that Transformers knows, one without rotary parameters."""
    root = tmp_path_factory.mktemp("saved")
    for family, scheme in (("llama", "t5"), ("llama", "yarn"), ("bloom", "learned"), ("gpt2", "self_extend")):
        put(build(family), scheme).save_pretrained(root / f"{family}-{scheme}")
    return root


@pytest.mark.parametrize("folder", ["llama-t5", "bloom-learned", "gpt2-self_extend"])
def test_the_auto_classes_load_what_load_patched_loads(folder, saved):
    ours = load_patched(saved / folder)
    theirs = AutoModelForCausalLM.from_pretrained(saved / folder)
    assert type(theirs) is type(ours) and type(theirs.config) is type(ours.config)
    assert torch.equal(logits(theirs, IDS), logits(ours, IDS))
    assert theirs.config.to_dict() == ours.config.to_dict() and describe(theirs).scheme == describe(ours).scheme
    config = AutoConfig.from_pretrained(saved / folder)
    assert isinstance(config, ours.config_class) and config.model_type == ours.config.model_type
    assert config.max_position_embeddings == ours.config.max_position_embeddings if "bloom" not in folder else True
    base = AutoModel.from_pretrained(saved / folder, config=config)
    assert type(base) is type(ours.base_model)
    assert torch.equal(base(IDS).last_hidden_state, ours.base_model(IDS).last_hidden_state)
    head = AutoModelForSequenceClassification.from_pretrained(saved / folder, num_labels=5, dtype=torch.bfloat16)
    assert head.score.out_features == 5 and head.dtype == torch.bfloat16 and describe(head).scheme in folder


def test_arguments_of_the_auto_classes_arrive(saved):
    model, report = AutoModelForCausalLM.from_pretrained(
        str(saved / "llama-t5"), attn_implementation="eager", dtype="auto", output_loading_info=True, use_cache=False
    )
    assert model.config._attn_implementation == "pe_eager" and model.config.use_cache is False
    assert "missing_keys" in report
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert describe(empty).scheme == "t5" and empty.device.type == "meta"


def test_pipeline_and_tokenizer(tmp_path):
    model = patch_model(AutoModelForCausalLM.from_pretrained(DEMO), "self_extend", group=4, window=64).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("The sea")["input_ids"] == tokenizer("The sea")["input_ids"]
    generate = pipeline("text-generation", model=str(tmp_path))
    assert describe(generate.model).scheme == "self_extend"
    inputs = tokenizer("The sea was calm", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    found = generate("The sea was calm", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert found == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_a_concrete_class_does_not_load_silently(saved):
    for cls, folder in ((BloomForCausalLM, "bloom-learned"), (transformers.GPT2LMHeadModel, "gpt2-self_extend")):
        for keywords in ({}, {"dtype": torch.float32}, {"use_cache": False}):
            with pytest.raises(Exception, match=r"pe_patch\.load_patched"):
                cls.from_pretrained(saved / folder, **keywords)


def test_a_config_of_a_patched_model_is_copied_pickled_and_undone():
    for family in ("bloom", "llama"):
        model = build(family)
        native, native_class = copy.deepcopy(model.config.to_dict()), type(model.config)
        put(model, "t5")
        for again in (copy.copy(model.config), copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
            assert again == model.config and again.to_json_string() == model.config.to_json_string()
        assert model.config.to_dict()["model_type"] == family  # which PEFT and others read
        whole = pickle.loads(pickle.dumps(model))
        unpatch_model(whole)
        unpatch_model(model)
        for config in (model.config, whole.config):
            assert type(config) is native_class and config.to_dict() == native


@pytest.fixture
def uploads(monkeypatch):
    """The contents of config.json whenever something is uploaded."""
    found: list[dict] = []

    class Created:
        repo_id = "someone/model"

    def upload(self, repo_id, operations, **_):
        for operation in operations:
            if operation.path_in_repo == "config.json":
                content = operation.path_or_fileobj
                text = Path(content).read_bytes() if isinstance(content, str | Path) else content
                found.append(json.loads(text))

    def upload_folder(self, *, folder_path, **_):
        found.append(written(Path(folder_path)))

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Created)
    monkeypatch.setattr(HfApi, "create_commit", upload)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return found


@pytest.mark.parametrize(("family", "scheme"), UPLOADED)
def test_what_is_uploaded_is_what_was_saved(family, scheme, uploads, tmp_path):
    model = put(build(family), scheme)
    model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert uploads == [written(tmp_path / "out")] and uploads[0]["pe_patch"]["scheme"] == scheme
    assert (scheme == "yarn") == (uploads[0]["model_type"] == family)
    model.push_to_hub("someone/model")
    assert uploads[1] == uploads[0]


@pytest.mark.parametrize(("family", "scheme"), UPLOADED)
def test_the_config_alone_and_the_trainer(family, scheme, tmp_path):
    model = put(build(family), scheme)
    model.save_pretrained(tmp_path / "whole")
    model.config.save_pretrained(tmp_path / "alone")
    model.config.to_json_file(tmp_path / "config.json")
    for found in (tmp_path / "alone", tmp_path):
        assert written(found) == written(tmp_path / "whole")
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=1
    )
    row = {"input_ids": IDS[0, :8], "labels": IDS[0, :8]}
    trainer = Trainer(model, arguments, train_dataset=[row, row])
    trainer.train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert torch.allclose(logits(again, IDS), logits(model.eval(), IDS), atol=1e-5)
    if scheme != "yarn":
        del model.config.pe_patch
        with pytest.raises(PePatchError, match="record"):
            model.save_pretrained(tmp_path / "without")
        with pytest.raises(PePatchError, match="record"):
            model.config.to_json_file(tmp_path / "config.json")


def edit(folder: Path, change) -> Path:
    config = written(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("folder", "change", "theirs", "ours"),
    [
        ("llama-yarn", lambda c: c["rope_parameters"].update(factor=8.0), "rope_parameters.factor is 8.0", "2.0"),
        ("llama-yarn", lambda c: c["rope_parameters"].update(mscale=0.5), "mscale is 0.5", "missing"),
        ("llama-yarn", lambda c: c["rope_parameters"].pop("beta_fast"), "beta_fast is 'missing'", "4.0"),
        ("llama-yarn", lambda c: c.update(max_position_embeddings=128), "max_position_embeddings is 128", "64"),
        ("llama-yarn", lambda c: c.pop("rope_parameters"), "rope_parameters is None", "yarn"),
        ("llama-yarn", lambda c: c.update(model_type="mistral"), "model_type is 'mistral'", "llama"),
        ("llama-t5", lambda c: c["rope_parameters"].update(rope_theta=5e5), "rope_theta is 500000.0", "10000.0"),
        ("llama-t5", lambda c: c.update(rope_parameters={"rope_type": "default"}), "'default'", "'pe_patch'"),
        ("llama-t5", lambda c: c.update(max_position_embeddings=64), "max_position_embeddings is 64", "32"),
        ("gpt2-self_extend", lambda c: c.update(n_positions=32), "n_positions is 32", "92"),
    ],
)
def test_a_record_that_contradicts_its_config(folder, change, theirs, ours, saved, tmp_path):
    copied = edit(shutil.copytree(saved / folder, tmp_path / "model"), change)
    loaders = [load_patched] if folder == "llama-yarn" else [load_patched, AutoModelForCausalLM.from_pretrained]
    for load in loaders:  # plain Transformers obeys the rotary parameters that it knows
        with pytest.raises(CheckpointError) as caught:
            load(copied)
        message = str(caught.value)
        assert str(copied / "config.json") in message and theirs in message and ours in message
        assert "Write" in message and "patch_model" in message


@pytest.mark.parametrize("name", [name for name in GIVEN if applies("llama", name)])
def test_every_saved_scheme_is_inspected(name, tmp_path, capsys):
    put(build("llama"), name).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scheme"] == name


RECORD = {
    "version": [None, "1", 1.5, True, 0, 99, []],
    "scheme": [None, 3, "", "no_such", [], {}],
    "options": [None, [], "x", {"nonsense": 1}, {"num_buckets": "a"}, {"num_buckets": -1}, {"num_buckets": None}],
    "native": [None, [], "x", {}, {"model_type": None}, {"model_type": "no_such"}, {"model_type": ["llama"]}],
    "layers": [None, 3, "all", [99], [-1], [0.5], [True], ["0"], [], {}],
    "submodule": [None, 3, "no_such"],
    "keep_native": [None, 1, "yes"],
    "strict": [None, 0, "no"],
    "written": [None, [], "x", {"max_position_embeddings": "x"}],
}
DELETED = ("version", "scheme", "options", "native")


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in RECORD.items() for value in values])
def test_a_damaged_record_names_file_key_and_value(key, value, saved, tmp_path):
    folder = edit(shutil.copytree(saved / "llama-t5", tmp_path / "model"), lambda c: c["pe_patch"].update({key: value}))
    for load in (load_patched, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((CheckpointError, OptionError)) as caught:
            load(folder)
        message = str(caught.value)
        assert f"{folder}/config.json" in message, message
        shown = next(iter(value.values()), value) if isinstance(value, dict) else value
        shown = shown[0] if isinstance(shown, list) and shown and key == "layers" else shown
        assert str(shown) in message, message
        assert key in message or (value == [99] and "layers" in message), message


@pytest.mark.parametrize("native", [
    {"max_position_embeddings": "x"}, {"rope_parameters": "x"}, {"rope_parameters": []}, {"architectures": "x"},
    {"architectures": [3]}, {"hidden": 3}, {"config": "text_config"}, {"config": 3},
])  # fmt: skip
def test_a_damaged_native_part(native, saved, tmp_path):
    folder = edit(
        shutil.copytree(saved / "llama-t5", tmp_path / "model"), lambda c: c["pe_patch"]["native"].update(native)
    )
    with pytest.raises(CheckpointError, match=f"native.{next(iter(native))}"):
        load_patched(folder)


@pytest.mark.parametrize("key", DELETED)
def test_a_record_that_lacks_a_key(key, saved, tmp_path):
    folder = edit(shutil.copytree(saved / "llama-t5", tmp_path / "model"), lambda c: c["pe_patch"].pop(key))
    with pytest.raises(CheckpointError, match=f"config.json.*lacks '{key}'"):
        load_patched(folder)


@pytest.mark.parametrize("record", [None, 3, "x", [], True])
def test_a_record_that_is_no_object(record, saved, tmp_path):
    folder = edit(shutil.copytree(saved / "llama-t5", tmp_path / "model"), lambda c: c.update(pe_patch=record))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_patched(folder)


@pytest.mark.parametrize("text", ["[1]", "3", '"x"', "null", "{"])
def test_a_config_that_is_no_object(text, saved, tmp_path):
    folder = shutil.copytree(saved / "llama-t5", tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="model"):
        load_patched(folder)


NUMBERS = [True, -1, 0, 7, 10**400, 1.5, float("nan"), float("inf")]
VALUES = [None, *NUMBERS, "", "x", "\x1b[31m", [], [1], [[]], {}, {"a": None}]


def damaged(value, generator):
    """The same JSON with one part of it changed."""
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    node, key = generator.choice(places)
    if isinstance(node, dict) and generator.random() < 0.3:
        del node[key]
    else:
        node[key] = copy.deepcopy(generator.choice(VALUES))


@pytest.mark.parametrize("folder", ["llama-t5", "llama-yarn", "bloom-learned", "gpt2-self_extend"])
def test_random_damage_never_ends_in_a_bare_traceback(folder, saved, tmp_path):
    generator, model = random.Random(0), shutil.copytree(saved / folder, tmp_path / "model")
    whole, refused = written(model), 0
    for _ in range(60):
        config = copy.deepcopy(whole)
        for _ in range(generator.choice((1, 1, 2))):
            damaged(config["pe_patch"], generator)
        (model / "config.json").write_text(json.dumps(config))
        try:
            load_patched(model)
        except PePatchError as error:
            refused += 1
            assert str(model) in str(error) and "\x1b" not in str(error)
    assert refused > 30


def test_a_truncated_file_of_the_schemes_weights(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = put(build("llama"), "t5")
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    put(base, "t5")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    whole = (tmp_path / "adapter" / TENSORS).read_bytes()
    load_patched(tmp_path / "adapter")
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "adapter" / TENSORS).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=TENSORS):
            load_patched(tmp_path / "adapter")
    (tmp_path / "adapter" / TENSORS).write_bytes(whole)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    wrong = {"version": "1", "options": None, "trained": 3, "digest": None, "peft_type": 3, "layers": 3}
    for key, value in wrong.items():
        changed = {**config, "pe_patch": {**config["pe_patch"], key: value}}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=key) as caught:
            load_patched(tmp_path / "adapter")
        assert "adapter_config.json" in str(caught.value)
    del model


@pytest.mark.parametrize(
    ("submodule", "scheme", "options", "field"),
    [("language_model", "t5", {}, "use_cache"), ("language_model", "yarn", {"factor": 4.0}, ""),
     ("vision_tower", "rope_2d", {}, "hidden_size")],
)  # fmt: skip
def test_a_part_of_a_model_that_sees(submodule, scheme, options, field, tmp_path):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=build("llama").config, image_token_index=96, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    patch_model(model, scheme, submodule=submodule, **options)
    model.save_pretrained(tmp_path / "whole")
    inputs = {"input_ids": tokens(1, 20).clone(), "pixel_values": torch.randn(1, 3, 16, 16)}
    inputs["input_ids"][0, :4] = 96
    for load in (load_patched, transformers.AutoModelForImageTextToText.from_pretrained):
        loaded = load(tmp_path / "whole")
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert isinstance(loaded.config, transformers.LlavaConfig) and loaded.config.pe_patch["scheme"] == scheme
    if field:
        with pytest.raises(StrictDataclassFieldValidationError, match=f"{field}.*\n.*load_patched"):
            type(model).from_pretrained(tmp_path / "whole")
    if submodule == "language_model":
        model.model.language_model.save_pretrained(tmp_path / "part")
        part = load_patched(tmp_path / "part")
        expected = model.model.language_model(IDS).last_hidden_state
        assert torch.equal(part(IDS).last_hidden_state, expected)
    loaded = unpatch_model(load_patched(tmp_path / "whole"))
    parts = (loaded.config, loaded.config.text_config, loaded.config.vision_config)
    assert not any(hasattr(each, "pe_patch") for each in parts)
    unpatch_model(model)
    assert type(model.config) is transformers.LlavaConfig and "pe_patch" not in str(model.config.to_dict())
