"""How the next token is drawn: the settings, and the draw itself."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from gptcore.config.section import Positive, Section
from gptcore.errors import SettingsError


class Sampling(Section):
    """From which tokens the next one is drawn. They apply in this order; as they are, the likeliest is taken."""

    repetition_penalty: Positive = 1.0
    """What is in the text already is so many times less likely to come again (Keskar et al. 2019): its logit is divided by
    this where it is positive and multiplied where it is not. 1: no matter."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the likeliest so many; 0: from all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the smallest set of the likeliest with this probability (Holtzman et al. 2020)."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Draw from those that are at least this share as likely as the likeliest (Nguyen et al. 2024)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Another seed draws another text."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """From plain values; None stands for what is unset. Raises `SettingsError`, one sentence on all that is wrong."""
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            wrong = [f"{problem['loc'][0]} is {problem['input']!r}: {_plain(problem['msg'])}" for problem in error.errors()]
            raise SettingsError("; ".join(wrong)) from error


def _plain(message: str) -> str:
    """pydantic's words as those of a sentence."""
    return message.removeprefix("Value error, ").replace("Input should be", "it should be")


def random_stream(seed: int, prompt: int, sample: int) -> np.random.Generator:
    """What the sample of this number of the prompt of this number is drawn with, whatever is drawn beside it."""
    return np.random.default_rng((seed, prompt, sample))


def penalised(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits (B, V) with those of the tokens in each row's text made smaller."""
    logits = logits.clone()
    for row, text in zip(logits, texts, strict=True):
        seen = torch.tensor(sorted(set(text)), device=row.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


def draw(logits: Tensor, sampling: Sampling, randoms: Sequence[np.random.Generator]) -> Tensor:
    """One id (B) per row of logits (B, V), each with the next number of its own random stream."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    probabilities, ids = _candidates(logits, sampling)
    upto = probabilities.double().cumsum(-1)  # (B, K)
    drawn = torch.tensor([[random.random()] for random in randoms], dtype=torch.float64, device=logits.device)  # (B, 1)
    # The first place where the sum exceeds the draw; zero-probability places are never the first.
    place = torch.searchsorted(upto, drawn * upto[:, -1:], right=True).clamp_max(upto.shape[-1] - 1)
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What may be drawn: probabilities (B, K) that need not sum to 1, and their ids, unless they are those of all tokens."""
    ids: Tensor | None = None
    # The largest becomes 0 first, so that no temperature makes it infinite, nor 0 / 0 of it.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1.0:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier ones sum to
        beyond = before >= sampling.top_p
        beyond[:, 0] = False  # the likeliest one is never beyond
        probabilities = probabilities.masked_fill(beyond, 0.0)
    if sampling.min_p > 0.0:
        unlikely = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(unlikely, 0.0)
    return probabilities, ids
