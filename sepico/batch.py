"""What one rank trains on in one step."""

from dataclasses import dataclass, fields
from itertools import pairwise

from torch import Tensor


@dataclass
class StepBatch:
    """What one rank's slots of a step look like on the device.

    Images are float32 on the 0..1 scale; `seeds` holds one seed a slot. The target comes whole,
    the source cropped; `target_label` is for analysis only and never reaches a loss.
    `target_reference`, the day image of the place that a night image shows, comes with
    `teacher.day_night`.
    """

    seeds: list[int]
    source_image: Tensor  # (B, 3, h, w)
    source_label: Tensor  # (B, 1, h, w) int64
    target_image: Tensor | None = None  # (B, 3, H, W)
    target_label: Tensor | None = None  # (B, 1, H, W) int64
    target_reference: Tensor | None = None  # (B, 3, H, W)

    def split(self, parts: int) -> "list[StepBatch]":
        """The same slots in `parts` batches, of sizes that differ by one at most."""
        bounds = [len(self.seeds) * i // parts for i in range(parts + 1)]
        return [
            StepBatch(
                *(
                    None if value is None else value[begin:end]
                    for value in (getattr(self, field.name) for field in fields(self))
                )
            )
            for begin, end in pairwise(bounds)
        ]
