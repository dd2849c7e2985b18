"""Try every causal model type of Transformers, and keep what came out for the documentation.

python -m tests.model_types                  # every type; about six minutes on one core
python -m tests.model_types lfm2 qwen3_next  # only these
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import transformers

from .checks import HOLDS, outcome
from .tiny import TYPES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "model_types.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all of them")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("pe_patch").setLevel(logging.ERROR)
    stored, started = arguments.output, time.perf_counter()
    content = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {"types": {}}
    content["transformers"] = transformers.__version__
    for model_type in arguments.types or TYPES:
        found = outcome(model_type)
        content["types"][model_type] = asdict(found) | {"supported": found.supported}
        content["types"] = dict(sorted(content["types"].items()))
        stored.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        wrong = {name: each for name, each in found.checks.items() if each != HOLDS}
        verdict = found.status if found.supported else f"{found.status}, NOT SUPPORTED"
        print(f"{model_type}: {verdict} {found.reason} {wrong or ''} {time.perf_counter() - started:.0f} s", flush=True)
    supported = sum(each["supported"] for each in content["types"].values())
    print(f"{supported} of {len(content['types'])} supported")


if __name__ == "__main__":
    main()
