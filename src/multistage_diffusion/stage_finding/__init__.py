"""Finding the stages: where the optimal denoiser of a data set changes its behaviour."""

from .finding import find_stages
from .result import SplitResult
from .settings import SplitSettings
from .sharing import Sharing

__all__ = ["Sharing", "SplitResult", "SplitSettings", "find_stages"]
