"""Stage finding: where the optimal denoiser of a data set changes its behaviour."""

from .finding import NoMiddleStageError, compute_stages
from .result import StageResult
from .settings import StageSettings
from .sharing import Sharing

__all__ = ["NoMiddleStageError", "Sharing", "StageResult", "StageSettings", "compute_stages"]
