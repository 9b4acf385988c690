"""What is found out about a text, as plain numbers; places are those of the tokens that the model read."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Guess(NamedTuple):
    """A token that could stand at a place, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class Carried:
    """What the tokens of the text added to a log-probability, in bits."""

    bits: NDArray[np.float64]
    """(T)."""
    blank: float
    """The log-probability without what the text says."""
    missed: float
    """What the sum of `bits` lacks to the log-probability with it."""


@dataclass(frozen=True)
class Prediction:
    """What the model expected where a token stands."""

    bits: float
    """How surprising the token was: minus the logarithm of its probability, base 2."""
    rank: int
    """Of the token among all, from 1."""
    likeliest: tuple[Guess, ...]
    carried: Carried | None = None


@dataclass(frozen=True)
class Label:
    """A label of a classifier."""

    label: str
    nats: float
    """Log-likelihood as the answer, its end included."""
    probability: float
    """Among the labels."""
    carried: Carried | None = None
    """To its log-probability among the likeliest labels."""


@dataclass(frozen=True)
class Explanation:
    """Everything about one text. Places are those of `ids`."""

    kind: str
    """`continue` or `fill` of a base, or the type of its task."""
    ids: list[int]
    """What the model read (T)."""
    pieces: list[str]
    """Each token as text, or by its name."""
    characters: list[tuple[int, int, str]]
    """(from, to, text) of the tokens that together spell whole characters."""
    control: list[bool]
    """Whether a token is a control symbol (T)."""
    predictions: dict[int, Prediction]
    """By the place of the token that was asked for."""
    next: tuple[Guess, ...]
    """What may follow; empty where the text goes nowhere."""
    attention: NDArray[np.float32]
    """(layers, heads, t, t) between the newest t tokens: a line for each that looks, a column for each that is seen."""
    labels: tuple[Label, ...]
    """The likeliest first."""
    bytes: int
    """UTF-8 bytes of the tokens that were asked for."""
    points: int
    """At which gradients were taken; 0 without attributions."""
    left_out: tuple[str, ...]
    """A sentence each about what was too long or too much."""

    @property
    def bits(self) -> float:
        """Surprise of all that was asked."""
        return sum(prediction.bits for prediction in self.predictions.values())

    def as_row(self) -> dict[str, Any]:
        """All numbers but the attention maps, as plain values."""
        row: dict[str, Any] = {
            "kind": self.kind,
            "bits": self.bits,
            "bytes": self.bytes,
            "bits_per_byte": self.bits / self.bytes if self.bytes else None,
            "tokens": [self._token(place) for place in range(len(self.ids))],
            "next": [guess._asdict() for guess in self.next],
            "labels": [dataclasses.asdict(label) | {"carried": _plain(label.carried)} for label in self.labels],
            "points": self.points,
            "left_out": list(self.left_out),
        }
        return row

    def _token(self, place: int) -> dict[str, Any]:
        token = {"id": self.ids[place], "text": self.pieces[place], "control": self.control[place]}
        if (asked := self.predictions.get(place)) is None:
            return token
        likeliest = [guess._asdict() for guess in asked.likeliest]
        numbers = {"bits": asked.bits, "probability": 2.0**-asked.bits, "rank": asked.rank, "likeliest": likeliest}
        return token | numbers | {"carried": _plain(asked.carried)}


def _plain(carried: Carried | None) -> dict[str, Any] | None:
    return None if carried is None else {**dataclasses.asdict(carried), "bits": carried.bits.round(4).tolist()}
