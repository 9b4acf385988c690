"""NVIDIA cards by name: how fast they multiply, what they hold and what they draw. Data only; no torch.

The numbers are those of NVIDIA's data sheets and, for GeForce cards, of its architecture whitepapers. They are dense: where a
sheet prints "with sparsity", half of it stands here. Products add up in float32, which halves what GeForce cards print for
float16. Cards before Ampere have no bfloat16; gptcore computes in float16 on them.
"""

import difflib
from dataclasses import dataclass

from gptcore.errors import SettingsError


@dataclass(frozen=True)
class Card:
    """One card."""

    name: str
    half: float
    """TFLOP/s of products in bfloat16 and float16."""
    float32: float
    """TFLOP/s of products of float32 numbers: in TF32 from Ampere on."""
    memory: float
    """GiB."""
    watts: float
    """Of the board, at most."""
    bfloat16: bool = True
    """Whether it has that, and not float16 alone."""


CARDS = {
    card.name: card
    for card in (
        Card("b200", 2250.0, 1125.0, 180.0, 1000.0),  # HGX B200 data sheet, an eighth of the board
        Card("h200", 989.5, 494.5, 141.0, 700.0),  # H200 data sheet, SXM
        Card("h100", 989.5, 494.5, 80.0, 700.0),  # H100 data sheet, SXM
        Card("h100-pcie", 756.5, 378.0, 80.0, 350.0),  # H100 data sheet, PCIe
        Card("a100-80gb", 312.0, 156.0, 80.0, 400.0),  # A100 data sheet, SXM
        Card("a100-40gb", 312.0, 156.0, 40.0, 400.0),  # A100 data sheet, SXM
        Card("a40", 149.7, 74.8, 48.0, 300.0),  # A40 data sheet
        Card("a10", 125.0, 62.5, 24.0, 150.0),  # A10 data sheet
        Card("l40s", 362.0, 183.0, 48.0, 350.0),  # L40S data sheet
        Card("l4", 121.0, 60.0, 24.0, 72.0),  # L4 data sheet
        Card("v100", 125.0, 15.7, 16.0, 300.0, bfloat16=False),  # V100 data sheet, SXM2
        Card("v100-32gb", 125.0, 15.7, 32.0, 300.0, bfloat16=False),  # V100 data sheet, SXM2
        Card("t4", 65.0, 8.1, 16.0, 70.0, bfloat16=False),  # T4 data sheet
        Card("rtx5090", 209.5, 104.8, 32.0, 575.0),  # RTX Blackwell whitepaper
        Card("rtx4090", 165.2, 82.6, 24.0, 450.0),  # Ada whitepaper
        Card("rtx3090", 71.0, 35.6, 24.0, 350.0),  # GA102 whitepaper
    )
}


def card(name: str) -> Card:
    """The card of this name. Raises `SettingsError` that lists the names."""
    if name not in CARDS:
        near = difflib.get_close_matches(name, CARDS, 1)
        meant = f", did you mean {near[0]}?" if near else ";"
        raise SettingsError(f"unknown card {name!r}{meant} there are: here (this machine), {', '.join(CARDS)}")
    return CARDS[name]
