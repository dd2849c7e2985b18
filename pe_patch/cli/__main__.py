"""Run `python -m pe_patch.cli`."""

import sys

from . import main

sys.exit(main())
