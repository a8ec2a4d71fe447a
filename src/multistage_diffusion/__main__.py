"""The command line msdiff as `python -m multistage_diffusion`, for launchers that start a module (torchrun -m)."""

import sys

from .cli import main

sys.exit(main())
