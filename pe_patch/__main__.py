"""Run `python -m pe_patch`, which is the same as `pe-patch`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
