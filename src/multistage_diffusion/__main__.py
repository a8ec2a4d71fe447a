"""The command line msdiff as `python -m multistage_diffusion`, for launchers that start a module (torchrun -m)."""

from .cli import entry

entry()
