"""Using a model: generation with a cache, answers of task models."""

from gptcore.inference.generate import generate
from gptcore.inference.predictor import Predictor

__all__ = ["Predictor", "generate"]
