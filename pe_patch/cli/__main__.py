"""Run `python -m pe_patch.cli`."""

import sys

from .main import main

sys.exit(main())
