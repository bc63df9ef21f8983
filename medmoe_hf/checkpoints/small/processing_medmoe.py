"""Processor of MedMoE: converts images and texts to the model's inputs, and heat maps back to the images."""

# mypy: allow-subclassing-any
# transformers is untyped.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration_medmoe import attach_to_package
from .errors_medmoe import ArgumentError
from .image_processing_medmoe import resize_heatmaps, smooth_heatmaps
from .medical_pixels_medmoe import MAX_PIXELS
from .studies_medmoe import Series, Study, read_studies
from .tasks_medmoe import TOKEN_FIELDS, Task
from .tokenization_medmoe import MedMoETokenizer


class StudyBatches:
    """The slices of series as batches, which are decoded while they are iterated, each time anew.

    A batch has `pixel_values` `(B, 3, H, W)`, `series_ids` `(B,)`, which index `series`, and `slice_ids` `(B,)`, the
    indices within the series. All slices of a batch are of one series. Slices that cannot be decoded are left out, and
    listed in `skipped` of their series.

    Args:
        series: The series.
        process: Makes `pixel_values` of a list of images.
        batch_size: Greatest number of slices in a batch.
        window: As for `Series.slices`.
    """

    def __init__(
        self, series: Sequence[Series], process: Callable[[list[Any]], Any], batch_size: int, window: Any
    ) -> None:
        if batch_size < 1:
            raise ArgumentError(f"a batch has 1 slice or more, got batch_size {batch_size}")
        self.series, self.batch_size = list(series), batch_size
        self._process, self._window = process, window

    def __repr__(self) -> str:
        return f"StudyBatches({self.series}, batch_size={self.batch_size})"

    def __iter__(self) -> Iterator[BatchFeature]:
        for number, series in enumerate(self.series):
            slices = series.slices(window=self._window)
            while batch := list(islice(slices, self.batch_size)):
                yield BatchFeature(
                    {
                        "pixel_values": self._process([image for _, image in batch]),
                        "series_ids": torch.full((len(batch),), number),
                        "slice_ids": torch.tensor([index for index, _ in batch]),
                    }
                )


def _all_series(study: Any, **reading: Any) -> list[Series]:
    if isinstance(study, Series):
        return [study]
    if isinstance(study, Study):
        return list(study.series)
    if isinstance(study, (list, tuple)) and study and all(isinstance(one, (Series, Study)) for one in study):
        return [series for one in study for series in _all_series(one)]
    return [series for found in read_studies(study, **reading) for series in found.series]


class MedMoEProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one call.

    `processor(images=..., text=..., return_tensors="pt")` takes images, texts or both (their numbers may differ) and
    returns `pixel_values` (B, 3, H, W) float32, `input_ids`, `attention_mask`, `word_ids` (N, L) and, where the
    tokenizer has them, `token_type_ids`; with `return_modality=True` also `modality` where DICOM files specify it.
    Texts are padded to the longest and truncated by default. `study=` takes whole series, see `__call__`.

    Args:
        image_processor: `MedMoEImageProcessor` or `MedMoEImageProcessorPil`.
        tokenizer: A `MedMoETokenizer`; any other fast tokenizer is wrapped in one.
        max_length: Number of tokens, including special ones, to which texts are truncated; saved with the processor.
            None means the tokenizer's `model_max_length`.
        **kwargs: Other arguments of `ProcessorMixin`.

    Raises:
        ValueError: `max_length` is not positive or exceeds the tokenizer's `model_max_length`.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer
        >>> tokenizer = MedMoETokenizer.from_words(["pleural effusion"], max_length=16)
        >>> processor = MedMoEProcessor(MedMoEImageProcessor(size=64), tokenizer)
        >>> image = np.zeros((80, 80), np.uint8)
        >>> inputs = processor(images=image, text=["effusion", "pleural effusion"], return_tensors="pt")
        >>> inputs["pixel_values"].shape, inputs["word_ids"].tolist()
        (torch.Size([1, 3, 64, 64]), [[-1, 0, -1, -1], [-1, 0, 1, -1]])
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

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *args: Any,
        study: Any = None,
        batch_size: int = 16,
        plane: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Converts images, texts or whole studies to the model's inputs.

        Args:
            images: Inputs of the image processor.
            text: One text or several.
            *args: As for every processor.
            study: A folder or file, several of these, a `Study` or `Series`, or a list of them, instead of `images`.
                `pixel_values` is then a `StudyBatches`: an iterable of batches, of which one is in memory at a time.
                `MedMoEModel.get_study_features` takes it.
            batch_size: Greatest number of slices in a batch of a study.
            plane: For NIfTI files of a study, see `read_studies`.
            **kwargs: Arguments of the image processor and of the tokenizer, such as `window` and `return_tensors`; for
                studies tensors are those of torch.

        Returns:
            The inputs of the model.

        Raises:
            ValueError: There are both images and a study, or an argument has a wrong value.
            FileNotFoundError: A path of the study does not exist.
            MedicalImageError: The study has no image.

        Example:
            >>> import tempfile
            >>> from PIL import Image
            >>> from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer
            >>> processor = MedMoEProcessor(MedMoEImageProcessor(size=64), MedMoETokenizer.from_words(["lung"]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Image.new("L", (80, 60)).save(f"{folder}/a.png")
            ...     inputs = processor(study=folder, text="lung")
            ...     shapes = [batch.pixel_values.shape for batch in inputs.pixel_values]
            >>> shapes
            [torch.Size([1, 3, 64, 64])]
        """
        if study is None:
            return super().__call__(images, text, *args, **kwargs)
        if images is not None:
            raise ArgumentError("pass images or a study, not both")
        window = kwargs.pop("window", None)
        if window is None:
            window = self.image_processor.window
        kwargs["return_tensors"] = "pt"
        max_pixels = kwargs.get("max_pixels") or getattr(self.image_processor, "max_pixels", None) or MAX_PIXELS
        series = _all_series(study, plane=plane, window=window, max_pixels=max_pixels)
        call = super().__call__
        inputs = BatchFeature() if text is None else call(None, text, *args, **kwargs)
        inputs["pixel_values"] = StudyBatches(
            series, lambda found: call(found, **kwargs)["pixel_values"], batch_size, window
        )
        return inputs

    def tokenize_task(self, task: Task) -> Task:
        """Adds the tokens of its sentences to a task, so that a model classifies without a tokenizer.

        Args:
            task: A task; tokens that it has are replaced.

        Returns:
            The task with tokens, for `MedMoEModel.classify` and `MedMoEModel.tasks`.

        Example:
            >>> from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer
            >>> from medmoe_hf.model.tasks_medmoe import Task
            >>> tokenizer = MedMoETokenizer.from_words(["clear effusion"], max_length=16)
            >>> processor = MedMoEProcessor(MedMoEImageProcessor(), tokenizer)
            >>> task = processor.tokenize_task(Task("chest", {"normal": ["Clear."], "effusion": ["Effusion."]}))
            >>> sorted(task.tokens)
            ['Clear.', 'Effusion.']
        """
        sentences = task.sentences
        found = self(text=sentences, padding=False)
        kept = [name for name in TOKEN_FIELDS if name in found]
        rows = {text: {name: list(map(int, found[name][row])) for name in kept} for row, text in enumerate(sentences)}
        return replace(task, tokens=rows)

    def post_process_grounding(
        self,
        heatmaps: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        sigma: float = 0.0,
        pad_to_square: bool | None = None,
    ) -> list[torch.Tensor]:
        """Resizes word heat maps to the original images.

        Args:
            heatmaps: Heat maps `(B, L, h, w)`, or a model output with this attribute and optionally `word_mask`
                `(B, L)`, True where there is a word.
            target_sizes: Height and width of each original image, in pixels: B pairs or a tensor `(B, 2)`. None means
                the image processor's `size`.
            sigma: Standard deviation in cells of a Gaussian with which the maps are smoothed first; 0 for no
                smoothing, 1 to 2 for a stable peak.
            pad_to_square: Whether the images were padded to squares, as passed to the image processor; None means its
                setting. Without `target_sizes` the maps cover the padded images.

        Returns:
            B tensors `(W_i, height, width)` float32, bilinear between cells. W_i is the number of words if there is a
            `word_mask`, otherwise L. `tokenizer.words(text, max_length=processor.max_length)` returns the labels.

        Raises:
            ValueError: Shapes or counts do not match.

        Example:
            >>> import torch
            >>> from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer
            >>> processor = MedMoEProcessor(MedMoEImageProcessor(), MedMoETokenizer.from_words(["lung"]))
            >>> maps = processor.post_process_grounding(torch.rand(1, 2, 16, 16), target_sizes=[(480, 640)], sigma=1.5)
            >>> maps[0].shape
            torch.Size([2, 480, 640])
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
