"""Stage finding: where the optimal denoiser of a data set changes its behaviour."""

from .finding import compute_stages
from .result import StageResult
from .settings import StageSettings
from .sharing import Sharing

__all__ = ["Sharing", "StageResult", "StageSettings", "compute_stages"]
