"""The configuration of a run: frozen dataclasses, validated when they are created."""

from .execution import ExecutionConfig as ExecutionConfig
from .network import NetworkConfig as NetworkConfig
from .run import CodecConfig as CodecConfig
from .run import DataConfig as DataConfig
from .run import DiffusionConfig as DiffusionConfig
from .run import OptimizerConfig as OptimizerConfig
from .run import RunConfig as RunConfig
from .run import TrainingConfig as TrainingConfig
from .sampling import EvaluationConfig as EvaluationConfig
from .sampling import SamplingConfig as SamplingConfig
