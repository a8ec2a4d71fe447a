"""python -m multistage_diffusion: the command line msdiff, for what starts processes by module (torchrun -m)."""

import sys

from .cli import main

sys.exit(main())
