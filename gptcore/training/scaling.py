"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2), as in `torch.amp.GradScaler`.

The loss is multiplied before the backward pass so that small gradients do not vanish in float16, and the gradient divided
after it. One that overflows is thrown away and the scale halved; where none did for a while, it is doubled. GradScaler itself
does not fit: its state is bound to a device and to optimizers that each see the overflow for themselves.
"""

from typing import Any

from torch import Tensor

_START = 2.0**16
_LEAST = 1.0
"""An overflow at this scale is not the scale's."""
_PATIENCE = 2000
"""Steps without an overflow after which the scale is doubled."""


class LossScale:
    """The factor of the loss, a power of two: multiplying with it rounds nothing."""

    def __init__(self) -> None:
        self.value, self._good = _START, 0

    def fits(self, norm: Tensor) -> bool:
        """Whether the gradient with this norm did not overflow; the next step's scale follows from it. Waits for a card."""
        if bool(norm.isfinite()):
            self._good += 1
            if self._good == _PATIENCE:
                self.value, self._good = 2.0 * self.value, 0
            return True
        self.value, self._good = max(_LEAST, self.value / 2.0), 0
        return False

    @property
    def ran_out(self) -> bool:
        """Whether it cannot be halved any more."""
        return self.value == _LEAST

    def state(self) -> dict[str, Any]:
        """For the checkpoint; JSON."""
        return {"value": self.value, "good": self._good}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state()` gave; {} for the start."""
        self.value, self._good = state.get("value", _START), state.get("good", 0)
