"""The shared flags of all training scripts, and the run that loads batches, steps, logs, saves and resumes."""

from .args import TrainingArgs, flag_names, parse_args, parse_flags
from .run import TrainingRun

__all__ = ["TrainingArgs", "TrainingRun", "flag_names", "parse_args", "parse_flags"]
