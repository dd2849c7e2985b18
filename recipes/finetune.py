"""Train or fine-tune a causal language model after a recipe.

accelerate launch recipes/finetune.py recipes/configs/tiny_yarn.yaml seed=1 phases.0.steps=100
"""

import sys

from pe_patch.training.run import main

sys.exit(main())
