"""The configuration of a run: frozen dataclasses, validated when they are created."""

from .network import NetworkConfig as NetworkConfig
from .run import CodecConfig as CodecConfig
from .run import DataConfig as DataConfig
from .run import DiffusionConfig as DiffusionConfig
from .run import RunConfig as RunConfig
from .sampling import EvaluationConfig as EvaluationConfig
from .sampling import SamplingConfig as SamplingConfig
from .training import ExecutionConfig as ExecutionConfig
from .training import OptimizerConfig as OptimizerConfig
from .training import TrainingConfig as TrainingConfig
