"""The loop's surroundings: flags all scripts share, and the run that feeds, steps, logs, saves and resumes."""

from .args import TrainingArgs, flag_names, parse_args
from .run import TrainingRun

__all__ = ["TrainingArgs", "TrainingRun", "flag_names", "parse_args"]
