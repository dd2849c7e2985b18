"""One class for each positional scheme."""

# Importing a module registers its schemes.
from . import absolute, bias, decay, fire, grid, relative, remap, rotary, scaling, yarn  # noqa: F401
