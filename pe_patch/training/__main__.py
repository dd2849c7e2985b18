"""Run `accelerate launch -m pe_patch.training RECIPE`."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
