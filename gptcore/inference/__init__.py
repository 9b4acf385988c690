"""Using a model: generation with a cache, answers of task models, and what is behind them (`explain`, `explain_page`)."""

from gptcore.inference.generate import generate
from gptcore.inference.predictor import Answer, Choice, Predictor, Request, exact_predictor
from gptcore.inference.sampling import Sampling

__all__ = ["Answer", "Choice", "Predictor", "Request", "Sampling", "exact_predictor", "generate"]
