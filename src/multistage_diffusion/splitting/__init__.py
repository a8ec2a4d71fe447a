"""Finding the stages: where the optimal denoiser of a data set changes its behaviour."""

from .finding import find_stages
from .ranks import Ranks
from .result import SplitResult
from .settings import SplitSettings

__all__ = ["Ranks", "SplitResult", "SplitSettings", "find_stages"]
