"""Collation: from samples of a stream to a batch for the model."""

import hashlib
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from medmoe_hf.data.captions import is_empty
from medmoe_hf.data.sentences import sample_run
from medmoe_hf.errors import ArgumentError
from medmoe_hf.model import MedMoEImageProcessor

UNKNOWN_GROUP = -1
"""Group of a pair that has no positive other than itself."""


class ContrastiveCollator:
    """Collates samples into batches for contrastive training of `MedMoEModel`.

    A batch has `pixel_values` (B, 3, H, W), `input_ids` and `attention_mask` (B, L), `modality_labels` (B,) and
    `return_loss=True`. Collation has three steps, so that each can run where it is cheapest: `prepare` (resizes an
    image, in 8 bits) in the workers, `assemble` (stacks a batch, at a quarter of the size of floats) in the training
    process, and `normalize` on the device. A call performs all three.

    With `positives="caption"` or `"label"`, the batch also has `positive_groups` (B,): equal integers for pairs that
    are positives of each other, the same on every process and in every run, and -1 for unknown.

    - `"caption"`: pairs with equal captions, ignoring case, white space and a final period.
    - `"label"`: pairs with an equal `group`; without one, with an equal `label` of the same modality (`no finding`
      means one thing on a radiograph and another on a fundus photograph) and, if the label is a number, of the same
      source. Pairs with an empty label have no positives other than themselves.

    Args:
        processor: A `MedMoEProcessor`.
        positives: Which pairs are positives, as in `MedMoEConfig.positives`. `"none"` and `"text_similarity"` require
            nothing of the batch.

    Attributes:
        in_parts: Whether `prepare` returns 8-bit pixels and `normalize` runs on the device. False for image processors
            with other steps than stretching, rescaling and normalization, which then do everything in `prepare`.

    Example:
        >>> from medmoe_hf.data import phantom_sample, phantom_vocabulary
        >>> from medmoe_hf.data.collate import ContrastiveCollator
        >>> from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer
        >>> tokenizer = MedMoETokenizer.from_words(phantom_vocabulary(), max_length=30)
        >>> collator = ContrastiveCollator(MedMoEProcessor(MedMoEImageProcessor(), tokenizer))
        >>> batch = collator([phantom_sample(0, index, image_size=64) for index in range(4)])
        >>> batch["pixel_values"].shape, batch["modality_labels"].shape
        (torch.Size([4, 3, 224, 224]), torch.Size([4]))
    """

    def __init__(
        self, processor: Any, positives: Literal["none", "caption", "label", "text_similarity"] = "none"
    ) -> None:
        self.processor, self.positives = processor, positives
        images = processor.image_processor
        # Other steps than stretching, rescaling and normalization are left to the image processor.
        self.in_parts = (
            isinstance(images, MedMoEImageProcessor)
            and images.do_resize
            and images.do_rescale
            and images.do_normalize
            and not getattr(images, "pad_to_square", False)
            and not getattr(images, "do_center_crop", None)
            and not getattr(images, "do_pad", None)
        )

    @property
    def side(self) -> int | None:
        """Longer side in pixels to which images are resized; None if the image processor does everything."""
        size = self.processor.image_processor.size
        return max(int(size["height"]), int(size["width"])) if self.in_parts else None

    def prepare(self, image: Image.Image) -> NDArray[Any]:
        """Resizes one image.

        Args:
            image: A PIL image of any mode.

        Returns:
            Pixels (3, H, W) in 0..255, in 8 bits if the image has 8; if `in_parts` is False, the `pixel_values` of the
            image processor. An array, since sending a small tensor to another process costs four times as much.
        """
        images = self.processor.image_processor
        if not self.in_parts:
            processed: NDArray[Any] = images(image, return_tensors="np")["pixel_values"][0]
            return processed
        # The same operations as the image processor's, without its overhead of a millisecond.
        if image.mode == "RGB":
            # Channels last, as in Pillow: the same kernel takes half the time, with the same result.
            rgb = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        else:
            rgb = images.process_image(image)
        resized: NDArray[Any] = images.resize(rgb, images.size, images.resample).contiguous().numpy()
        return resized

    def shorten(self, caption: str, rng: random.Random) -> str:
        """Returns a caption that is no longer than the text tower reads.

        Args:
            caption: A caption of any length.
            rng: Generator that draws the part to keep.

        Returns:
            The caption if it fits, otherwise a random run of adjacent sentences that does (see
            `medmoe_hf.data.sentences.sample_run`).
        """
        tokenizer = self.processor.tokenizer
        limit = getattr(self.processor, "max_length", None) or tokenizer.model_max_length
        # A token has at least one byte: most captions need not be tokenized twice.
        if len(caption.encode(errors="surrogatepass")) + tokenizer.num_special_tokens_to_add() <= limit:
            return caption

        def lengths(texts: Sequence[str]) -> list[int]:
            ids = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
            return [len(one) for one in ids]

        return caption if lengths([caption])[0] <= limit else sample_run(caption, limit, lengths, rng)

    def assemble(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stacks prepared samples into a batch.

        Args:
            samples: Samples with `image` (from `prepare`), `caption` and `modality` (id 0..5, or -100 for unknown).

        Returns:
            The batch; `pixel_values` are to be normalized by `normalize`.

        Raises:
            ValueError: If `positives` is `"label"` and no sample has a `label` or `group`.
        """
        images = [sample["image"] for sample in samples]
        if len({image.dtype for image in images}) > 1:
            images = [image.astype(np.float32) for image in images]
        texts = self.processor(text=[sample["caption"] for sample in samples], return_tensors="pt")
        labels = torch.tensor([int(sample["modality"]) for sample in samples])
        batch = {
            "pixel_values": torch.from_numpy(np.stack(images)),
            **texts,
            "modality_labels": labels,
            "return_loss": True,
        }
        if self.positives in ("caption", "label"):
            batch["positive_groups"] = torch.tensor(self._groups(samples), dtype=torch.long)
        return batch

    def _groups(self, samples: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.positives == "caption":
            return [_group("caption", _normalized(sample["caption"])) for sample in samples]
        if not any("label" in sample or "group" in sample for sample in samples):
            raise ArgumentError(
                "`positives: label` requires labels, but no sample of the batch has a `label` or `group`. Specify the "
                "field with the label by `label`, or use `positives: caption`."
            )
        return [_label_group(sample) for sample in samples]

    def normalize(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalizes `pixel_values` (B, 3, H, W) of a batch from `assemble`, on their current device.

        Returns:
            The batch with normalized `pixel_values`. The pixels of the given batch may be overwritten.
        """
        if not self.in_parts:
            return batch
        images, pixels = self.processor.image_processor, batch["pixel_values"]
        mean, std = (
            (torch.tensor(values, device=pixels.device) / images.rescale_factor).view(-1, 1, 1)
            for values in (images.image_mean, images.image_std)
        )
        # In place: on CPUs, allocating a new batch costs more than the arithmetic.
        return {**batch, "pixel_values": pixels.float().mul_(1 / std).add_(-mean / std)}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates samples with `image` (a PIL image), `caption` and `modality` into a normalized batch."""
        return self.normalize(
            self.assemble([{**sample, "image": self.prepare(sample["image"])} for sample in samples])
        )


def _label_group(sample: Mapping[str, Any]) -> int:
    group = _normalized(sample.get("group"))
    if group:
        return _group("group", group)
    label = _normalized(sample.get("label"))
    # Numeric labels of different sources are unrelated.
    scope = str(sample.get("source")) if re.fullmatch(r"[+-]?[\d.]+", label) else ""
    return _group("label", label, str(int(sample["modality"])), scope)


def _normalized(value: Any) -> str:
    """Normalizes a caption or label: case, white space, final period, and 1.0 to 1."""
    if is_empty(value):
        return ""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("utf-8", errors="replace")
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas converts a column of integers with missing values to floats
    return " ".join(unicodedata.normalize("NFKC", str(value)).casefold().split()).rstrip(" .")


def _group(kind: str, value: str, *scope: str) -> int:
    """Returns a 63-bit hash of the words, equal on all processes; -1 for no words.

    The probability of a collision among a million different texts is 5e-8.
    """
    if not value:
        return UNKNOWN_GROUP
    content = "\0".join((kind, value, *scope)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
