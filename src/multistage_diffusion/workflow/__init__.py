"""The main job as Python functions; the command line is a thin layer over them.

result = split("digits", out=Path("split.json"))
run = train(preset("digits"), Path("runs/digits"), result=result)
images = sample(run, count=64)
scores = evaluate(run)
report(run)
"""

from .clustering import split_run
from .coding import train_codec
from .evaluating import compare, evaluate, statistics
from .exchange import export_published, import_published
from .finding import save_split, split
from .fitting import CHANGEABLE, resume, train
from .likelihood import measure_likelihood
from .material import prepare
from .planning import plan
from .using import report, sample

__all__ = [
    "CHANGEABLE",
    "compare",
    "evaluate",
    "export_published",
    "import_published",
    "measure_likelihood",
    "plan",
    "prepare",
    "report",
    "resume",
    "sample",
    "save_split",
    "split",
    "split_run",
    "statistics",
    "train",
    "train_codec",
]
