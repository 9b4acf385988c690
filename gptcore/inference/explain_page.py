"""The page of an explanation: one HTML file that asks nobody for anything and runs no script but its own.

What the text holds reaches the page as data and is shown as text, never as markup; the page's own policy, which names the
digest of its one script, would stop any other.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcore.inference.explanation import Carried, Explanation
from gptcore.model import LoadedModel

_TEMPLATE = Path(__file__).with_name("explain.html")

_PROBABILITY = {
    "continue": "The probability of a token is what the model gave it after everything before it.",
    "fill": "The probability of a token is what the model gave it when it alone was hidden (pseudo-log-likelihood, Salazar et "
    "al. 2020). The bits are no length of a code: compare them with those of masked models. For attention nothing is hidden.",
    "classify": "Only the answer is asked, as in training. The probability of a label is its share among all labels, by their "
    "likelihood as the answer, the end included.",
    "summarize": "Only the answer is asked, as in training: the likeliest token at each place.",
}
_ATTENTION = (
    "Attention is a line of softmax(QKᵀ / √d + M): the shares in which a head mixes what it reads of other tokens into a token "
    "(Vaswani et al. 2017). It tells where a head looks, which is no reason by itself (Jain and Wallace 2019). Of the shares "
    "the square roots are kept, in 255 steps, so they are off by at most 0.4 %."
)
_INTEGRATED = (
    "What carried a prediction: integrated gradients (Sundararajan et al. 2017) of its log-probability, on the way from a text "
    "whose every token is the mean embedding of the vocabulary to the real one, at {points} points or as many as it takes. The "
    "bits of all tokens add up to what the text changed; what they miss is told. Control symbols are never blank."
)
_GRADIENT = (
    "What carried a prediction: gradient × input (Shrikumar et al. 2016) of its log-probability, the input being a token's "
    "embedding less the mean of the vocabulary's. It is blind where the probability is flat; what the sum misses is told."
)


def explanation_page(explained: Explanation, loaded: LoadedModel, name: str) -> str:
    """The page as text; equal explanations give equal pages. `name`: of the model, as a person knows it."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            *(f"{kind}-src 'sha256-{_digest(_between(template, kind))}'" for kind in ("style", "script")),
        ]
    )
    filled = {"title": html.escape(f"{name} explained"), "policy": html.escape(policy), "data": _data(explained, loaded, name)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], template)


def quantised(weights: NDArray[np.float32]) -> bytes:
    """Weights from 0 to 1 as bytes: 255 times their square root. Squared again they are off by at most 0.004."""
    return bytes(np.round(255.0 * np.sqrt(weights)).astype(np.uint8).tobytes())


def _data(explained: Explanation, loaded: LoadedModel, name: str) -> str:
    """Everything that is shown, as JSON that cannot end the element it stands in."""
    layers, heads, size, _ = explained.attention.shape
    attention = {
        "layers": layers, "heads": heads, "size": size, "from": len(explained.ids) - size,
        "weights": base64.b64encode(quantised(explained.attention)).decode(),
    }  # fmt: skip
    labels = [{"name": e.label, "p": e.probability, "nats": e.nats, "carried": _carried(e.carried)} for e in explained.labels]
    shown = {
        "name": name,
        "kind": explained.kind,
        "facts": _facts(loaded),
        "tokens": [_token(explained, place) for place in range(len(explained.ids))],
        "characters": explained.characters,
        "next": explained.next,
        "attention": attention,
        "labels": labels,
        "bits": explained.bits,
        "bytes": explained.bytes,
        "vocabulary": loaded.model.vocab_size,
        "how": _how(explained),
        "leftOut": explained.left_out,
    }
    text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _token(explained: Explanation, place: int) -> dict[str, Any]:
    token: dict[str, Any] = {"text": explained.pieces[place]}
    if explained.control[place]:
        token["control"] = True
    if (asked := explained.predictions.get(place)) is not None:
        guesses = [(guess.text, float(f"{guess.probability:.4g}")) for guess in asked.likeliest]
        token |= {"bits": round(asked.bits, 4), "rank": asked.rank, "guesses": guesses, "carried": _carried(asked.carried)}
    return token


def _carried(carried: Carried | None) -> dict[str, Any] | None:
    if carried is None:
        return None
    return {"bits": carried.bits.round(3).tolist(), "blank": round(carried.blank, 3), "missed": round(carried.missed, 3)}


def _facts(loaded: LoadedModel) -> list[str]:
    model, config = loaded.model, loaded.model.config
    return [
        f"{sum(weight.numel() for weight in model.parameters()) / 1e6:,.1f} M parameters",
        f"{config.layers} layers of {config.heads} heads, {config.width} wide",
        f"context {config.context:,} tokens",
        f"vocabulary {model.vocab_size:,}",
        f"{config.objective} objective",
        *([f"task {loaded.task['name']}"] if loaded.task else []),
    ]


def _how(explained: Explanation) -> list[str]:
    carried = {0: [], 1: [_GRADIENT]}.get(explained.points, [_INTEGRATED.format(points=explained.points)])
    return [_PROBABILITY[explained.kind], *carried, _ATTENTION]


def _between(template: str, tag: str) -> str:
    match = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    assert match is not None
    return match[1]


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
