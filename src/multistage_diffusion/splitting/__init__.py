"""Finding the stages: where the optimal denoiser of a data set changes its behaviour."""

from .result import SplitResult, SplitSettings, find_stages

__all__ = ["SplitResult", "SplitSettings", "find_stages"]
