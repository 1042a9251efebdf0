"""Adapting a model to a task: examples, gradients a layer at a time, and the run that trains an adapter."""

from mlx_gptoss.tune.options import TuneOptions
from mlx_gptoss.tune.run import tune

__all__ = ["TuneOptions", "tune"]
