"""Processor of MedMoE: images and texts in, the model's inputs out, and heat-maps back onto the images."""

# mypy: allow-subclassing-any
# transformers is untyped.

from collections.abc import Sequence
from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin

from .configuration_medmoe import attach_to_package
from .image_processing_medmoe import resize_heatmaps, smooth_heatmaps
from .tokenization_medmoe import MedMoETokenizer


class MedMoEProcessor(ProcessorMixin):
    """An image processor and a tokenizer behind one call.

    `processor(images=..., text=..., return_tensors="pt")` takes images, texts or both (as many of each as you like)
    and gives `pixel_values` (B, 3, H, W) float32, `input_ids`, `attention_mask`, `word_ids` (T, L) and, where the
    tokenizer has them, `token_type_ids`; with `return_modality=True` also `modality` where DICOM files tell it. Texts
    are padded to the longest and truncated unless the call says otherwise.

    Args:
        image_processor: `MedMoEImageProcessor` or `MedMoEImageProcessorPil`.
        tokenizer: a `MedMoETokenizer`; any other fast tokenizer is wrapped into one.
        max_length: pieces, special tokens included, that texts are truncated to; saved with the processor. None means
            the tokenizer's `model_max_length`.

    Raises:
        ValueError: `max_length` is not positive or exceeds the tokenizer's `model_max_length`.
    """

    text_kwargs: dict[str, Any] = {"padding": True, "truncation": True}

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, max_length: int | None = None, **kwargs: Any
    ) -> None:
        if "word_ids" not in getattr(tokenizer, "model_input_names", ["word_ids"]):
            tokenizer = MedMoETokenizer.from_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer, **kwargs)
        if max_length is not None:
            if not 0 < max_length <= tokenizer.model_max_length:
                raise ValueError(
                    f"max_length must lie within 1..{tokenizer.model_max_length}, the tokenizer's model_max_length, "
                    f"got {max_length}"
                )
            self.text_kwargs = {**self.text_kwargs, "max_length": max_length}
        self.max_length = max_length

    def post_process_grounding(
        self,
        heatmaps: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        sigma: float = 0.0,
        pad_to_square: bool | None = None,
    ) -> list[torch.Tensor]:
        """Bring word heat-maps to the pixels of the original images.

        Args:
            heatmaps: similarities (B, W, h, w), or a model output with such an attribute `heatmaps` and optionally
                `word_mask` (B, W), true where a word is real.
            target_sizes: height and width of each original image, in pixels: B pairs or a tensor (B, 2). None means
                the image processor's `size`.
            sigma: width of a Gaussian that the maps are smoothed with first, in cells of the map; 0 leaves them as
                they are, 1 to 2 steadies the place of the peak.
            pad_to_square: whether the images were padded to squares, as the call of the image processor was told;
                None means its setting. Without `target_sizes` the maps cover the padded images.

        Returns:
            For each image a tensor (W_i, height, width) float32, bilinear between the cells. W_i counts the real
            words when there is a `word_mask`, else it is W. `tokenizer.words(text, max_length=processor.max_length)`
            gives the labels.

        Raises:
            ValueError: shapes or counts do not fit together.
        """
        maps = heatmaps if isinstance(heatmaps, torch.Tensor) else getattr(heatmaps, "heatmaps", None)
        mask = None if isinstance(heatmaps, torch.Tensor) else getattr(heatmaps, "word_mask", None)
        if maps is None:
            raise ValueError(f"{type(heatmaps).__name__} has no heatmaps")
        if maps.ndim != 4:
            raise ValueError(f"heatmaps must be (images, words, height, width), got shape {tuple(maps.shape)}")
        if mask is not None and mask.shape != maps.shape[:2]:
            raise ValueError(f"word_mask {tuple(mask.shape)} does not fit heatmaps {tuple(maps.shape)}")
        if sigma < 0:
            raise ValueError(f"sigma is a width in cells and cannot be negative, got {sigma}")

        if target_sizes is None:
            size = self.image_processor.size
            sizes = [(size.height, size.width)] * len(maps)
        else:
            listed = target_sizes.tolist() if isinstance(target_sizes, torch.Tensor) else target_sizes
            sizes = [(int(height), int(width)) for height, width in listed]
        if len(sizes) != len(maps):
            raise ValueError(f"there are heatmaps of {len(maps)} images but {len(sizes)} target_sizes")
        for size in sizes:
            if min(size) < 1:
                raise ValueError(f"target_sizes are heights and widths in pixels, got {size}")
        if pad_to_square is None:
            pad_to_square = getattr(self.image_processor, "pad_to_square", False)
        padded = bool(pad_to_square) and target_sizes is not None
        maps = smooth_heatmaps(maps, sigma)
        rows = maps if mask is None else [row[keep.bool()] for row, keep in zip(maps, mask, strict=True)]
        return [resize_heatmaps(row, size, padded) for row, size in zip(rows, sizes, strict=True)]


MedMoEProcessor.register_for_auto_class("AutoProcessor")
attach_to_package(__name__)
