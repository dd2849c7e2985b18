"""A patched model in TRL's SFTTrainer, with LoRA and packed documents.

    python recipes/examples/trl_sft.py --model demo --scheme yarn --factor 4 --steps 20

Needs TRL: pip install "pe_patch[trl]". It saves a PEFT adapter with a record of its scheme:
`pe_patch.load_patched(folder)` builds base model, patch and adapter, and `pe_patch.load_adapter(model, folder)` refuses
a model with another scheme.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

import pe_patch
from pe_patch.data.text import load_documents

DEMO = Path(pe_patch.__file__).parent / "assets" / "demo"


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a hub name, or demo")
    parser.add_argument("--text", default="stdlib", help="a folder of .txt files, a JSONL or Parquet file, a hub name")
    parser.add_argument("--scheme", default="yarn")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="adapter")
    given = parser.parse_args(arguments)

    source = str(DEMO) if given.model == "demo" else given.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    pe_patch.patch_model(model, given.scheme, factor=given.factor)

    trainer = SFTTrainer(
        model,
        SFTConfig(
            given.output,
            max_steps=given.steps,
            max_length=given.length,
            # "bfd" keeps documents apart: TRL hands over position_ids that start again with each. With "wrapped" they
            # run into one another, under every scheme.
            packing=True,
            packing_strategy="bfd",
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": load_documents(given.text, limit=200)}),
        processing_class=tokenizer,
        # Norms and embeddings trained in full beside the low-rank updates, as LongLoRA does. A scheme with weights of
        # its own would train them after pe_patch.patching.peft_record.train_scheme(trainer.model).
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["embed_tokens", "norm"],
            ensure_weight_tying=model.config.tie_word_embeddings, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    print(pe_patch.describe(pe_patch.load_patched(given.output)))
    return trainer


if __name__ == "__main__":
    main()
