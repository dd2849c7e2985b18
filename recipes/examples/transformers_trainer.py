"""A patched model in Transformers' own Trainer.

    python recipes/examples/transformers_trainer.py --model demo --scheme yarn --factor 4 --steps 20

The patch needs nothing of the Trainer. Checkpoints carry the scheme: `pe_patch.load_patched(checkpoint)` gives the
patched model back, and `--resume` goes on from the last of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

import pe_patch
from pe_patch.data.text import load_documents

DEMO = Path(pe_patch.__file__).parent / "assets" / "demo"


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a hub name, or demo")
    parser.add_argument("--text", default="stdlib", help="a folder of .txt files, a JSONL or Parquet file, a hub name")
    parser.add_argument("--scheme", default="yarn")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a document that are kept")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="trained")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(arguments)

    source = str(DEMO) if given.model == "demo" else given.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    pe_patch.patch_model(model, given.scheme, factor=given.factor)

    texts = load_documents(given.text, limit=200)
    tokens = tokenizer(texts, truncation=True, max_length=given.length)["input_ids"]
    trainer = Trainer(
        model,
        TrainingArguments(
            given.output,
            max_steps=given.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            logging_steps=1,
            save_steps=max(1, given.steps // 2),
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens}),
        # Documents lie end to end, without padding; where position_ids start again, attention is cut, also for
        # schemes that add to the scores.
        data_collator=DataCollatorWithFlattening(),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=given.resume)
    trainer.save_model()
    print(pe_patch.describe(pe_patch.load_patched(given.output)))
    return trainer


if __name__ == "__main__":
    main()
