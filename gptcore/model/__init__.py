"""The Transformer in one file, its loss, and the folder it lives in."""

from gptcore.model.cache import Cache
from gptcore.model.folder import LoadedModel, load_model, save_model
from gptcore.model.transformer import GPT

__all__ = ["GPT", "Cache", "LoadedModel", "load_model", "save_model"]
