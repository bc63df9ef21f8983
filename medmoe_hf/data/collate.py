"""From samples of a stream to a batch that the model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class ContrastiveCollator:
    """Makes the dual encoder's training batch: `pixel_values`, the tokens, `modality_labels` and `return_loss=True`.

    Args:
        processor: a `MedMoEProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples with `image`, `caption` and `modality` (int, -100 unknown) to a batch of that many rows."""
        batch = self.processor(
            images=[sample["image"] for sample in samples],
            text=[sample["caption"] for sample in samples],
            return_tensors="pt",
        )
        labels = torch.tensor([int(sample["modality"]) for sample in samples])
        return {**batch, "modality_labels": labels, "return_loss": True}
