"""Pictures and heat-maps of a series, computed slice by slice when they are asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medmoe_hf.errors import MedMoEError, MissingPackageError
from medmoe_hf.inference.encoders import MedMoEEncoder
from medmoe_hf.inference.studies.tasks import normal_sentences, reference
from medmoe_hf.model import Task
from medmoe_hf.model.image_processing_medmoe import to_rgb
from medmoe_hf.model.studies_medmoe import Series

HEATMAP_SIGMA = 1.5  # in cells of the map: a single hot cell is mostly noise


UNREADABLE = (MedMoEError, OSError, ValueError)
"""Errors of a slice that cannot be decoded; a package that is missing is another matter."""


def pixels_of(picture: Any) -> torch.Tensor:
    """Returns a decoded slice as (3, H, W) in 0..255."""
    return to_rgb(getattr(picture, "pixels", picture))


@dataclass(eq=False)
class SeriesPictures:
    """Access to the slices of a series.

    Args:
        encoder: The model.
        series: The series.
        expert: Modality of the expert that reads it.
        task: Labels that it was asked for.
        batch_size: Slices per batch.
    """

    encoder: MedMoEEncoder
    series: Series
    expert: str
    task: Task | None
    batch_size: int

    def picture(self, index: int) -> np.ndarray:
        """Returns a slice as (H, W, 3) uint8."""
        pixels = pixels_of(self.series.slice(index)).round().to(torch.uint8)
        return np.asarray(pixels.permute(1, 2, 0).cpu().numpy())

    def heatmaps(
        self, phrase: str, indices: Sequence[int], size: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Computes heat-maps: how much more a place speaks for a phrase than for its absence.

        A label is compared with its negative sentences, or with the other labels; any other text with sentences that
        report no finding.

        Args:
            phrase: A label, whose first sentence is located, or any other text.
            indices: Slices.
            size: Longest side of a map; None for the size of the picture.

        Yields:
            Indices of the slices that can be read, and (H, W) float32.
        """
        if self.task is not None and phrase in self.task.prompts:
            text, compared = self.task.prompts[phrase][0], reference(self.task, phrase)
        else:
            text, compared = phrase, normal_sentences(self.expert)
        words = self._tokens([text])
        against = self._tokens(compared) if compared else None
        for start in range(0, len(indices), self.batch_size):
            known, pixels, sizes = [], [], []
            for index, decoded in self.series.slices(indices[start : start + self.batch_size]):
                try:
                    pixels.append(self.encoder.processor(images=decoded, return_tensors="pt")["pixel_values"])
                    height, width = pixels_of(decoded).shape[-2:]
                except MissingPackageError:
                    raise
                except UNREADABLE:
                    continue
                scale = 1.0 if size is None else min(1.0, size / max(height, width))
                sizes.append((max(1, round(height * scale)), max(1, round(width * scale))))
                known.append(index)
            if known:
                yield from zip(known, self._ground(torch.cat(pixels), words, against, sizes), strict=True)

    def _ground(self, pixels: torch.Tensor, words: Any, against: Any, sizes: Any) -> list[np.ndarray]:
        model, processor = self.encoder.model, self.encoder.processor
        with torch.inference_mode():
            grounding = model.ground(pixels.to(self.encoder.device), **words, modality=self.expert, reference=against)
            maps = processor.post_process_grounding(grounding, target_sizes=sizes, sigma=HEATMAP_SIGMA)
            return [np.asarray(by_word.mean(dim=0).float().cpu().numpy()) for by_word in maps]

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self.encoder.processor(text=list(texts), return_tensors="pt").to(self.encoder.device)
