"""`python -m pe_patch`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
