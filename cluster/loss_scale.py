"""Loss scaling for float16, in which gradients below 6e-8 vanish.

Scheduled as torch.amp.GradScaler does it, whose step knows no gradients that ZeRO holds: loss terms
are multiplied by a factor that is divided out of the gradients before the optimiser's step. A step
whose gradients overflow is left out and halves the factor; GROWTH_STEPS others in a row double it.
"""

from dataclasses import dataclass

GROWTH_STEPS = 2000


@dataclass
class LossScale:
    """The factor, a power of two, and how many steps it has been right for."""

    value: float = 65536.0
    good_steps: int = 0

    def update(self, *, overflow: bool) -> None:
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value /= 2
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
