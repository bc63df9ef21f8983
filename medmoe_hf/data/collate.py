"""From samples of a stream to a batch that the model takes."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from medmoe_hf.data.captions import is_empty
from medmoe_hf.errors import ArgumentError
from medmoe_hf.model import MedMoEImageProcessor

UNKNOWN_GROUP = -1
"""The group of a pair that is its own only positive."""


class ContrastiveCollator:
    """Makes the dual encoder's training batch: `pixel_values`, the tokens, `modality_labels` and `return_loss=True`.

    The work is cut in three, so that each part can run where it costs least: `prepare` (an image to 8-bit pixels of
    the model's size) in the processes that read, `assemble` (a batch, a quarter of the bytes that floats take) in the
    training process, `normalise` on the device. A call does all three.

    With `positives` `"caption"` or `"label"` the batch has `positive_groups` (B,) too: equal for pairs that mean the
    same, on every process and in every run, and -1 where that is unknown. They are

    - `"caption"`: of an equal caption, whatever its case, white space and final full stop;
    - `"label"`: of an equal `group` of the sample; of a sample without one, of an equal `label` within the modality
      (`no finding` is one thing on a radiograph and another in an eye) and, where the label is a number, within the
      source. A sample whose label is empty is a group of its own.

    Args:
        processor: a `MedMoEProcessor`.
        positives: as `MedMoEConfig.positives`. `"none"` and `"text_similarity"` need nothing of the batch.
    """

    def __init__(
        self, processor: Any, positives: Literal["none", "caption", "label", "text_similarity"] = "none"
    ) -> None:
        self.processor, self.positives = processor, positives
        images = processor.image_processor
        # Anything but a stretch to one size is left to the image processor whole.
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
        """Longer side in pixels that images are brought to."""
        size = self.processor.image_processor.size
        return max(size["height"], size["width"]) if self.in_parts else None

    def prepare(self, image: Image.Image) -> np.ndarray:
        """One image to (3, H, W): in 0..255, 8 bits where it had 8, or what the image processor makes of it.

        An array and no tensor: between processes a small tensor costs four times as much.
        """
        images = self.processor.image_processor
        if not self.in_parts:
            return images(image, return_tensors="np")["pixel_values"][0]
        # The same calls as the image processor's, without a millisecond of bookkeeping around them.
        if image.mode == "RGB":
            # Colours side by side, as Pillow has them: half the time of the same kernel on planes, the same bytes.
            rgb = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        else:
            rgb = images.process_image(image)
        return images.resize(rgb, images.size, images.resample).contiguous().numpy()

    def assemble(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples whose `image` is prepared, with `caption` and `modality` (int, -100 unknown), to a batch.

        Raises:
            ValueError: if `positives` is `"label"`, and not one sample has a `label` or `group`.
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
            return [_group("caption", _normalised(sample["caption"])) for sample in samples]
        if not any("label" in sample or "group" in sample for sample in samples):
            raise ArgumentError(
                "`positives: label` needs to know which samples share a label, and no sample of the batch has a "
                "`label` or `group`. Name the field that holds it by `label`, or use `positives: caption`."
            )
        return [_label_group(sample) for sample in samples]

    def normalise(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Brings `pixel_values` (B, 3, H, W) of an assembled batch to the model's range, on the device they are on."""
        if not self.in_parts:
            return batch
        images, pixels = self.processor.image_processor, batch["pixel_values"]
        mean, std = (
            (torch.tensor(values, device=pixels.device) / images.rescale_factor).view(-1, 1, 1)
            for values in (images.image_mean, images.image_std)
        )
        # In place: on a CPU a new tensor of a batch's size costs more than the arithmetic on it.
        return {**batch, "pixel_values": pixels.float().mul_(1 / std).add_(-mean / std)}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples with `image` (not prepared), `caption` and `modality` to a batch of them."""
        return self.normalise(
            self.assemble([{**sample, "image": self.prepare(sample["image"])} for sample in samples])
        )


def _label_group(sample: Mapping[str, Any]) -> int:
    group = _normalised(sample.get("group"))
    if group:
        return _group("group", group)
    label = _normalised(sample.get("label"))
    # The numbers of one source's classes say nothing about another's.
    scope = str(sample.get("source")) if re.fullmatch(r"[+-]?[\d.]+", label) else ""
    return _group("label", label, str(int(sample["modality"])), scope)


def _normalised(value: Any) -> str:
    """A caption or label so that equal meanings are equal strings: case, white space, final full stop; 1.0 is 1."""
    if is_empty(value):
        return ""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("utf-8", errors="replace")
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps: pandas makes floats of it
    return " ".join(unicodedata.normalize("NFKC", str(value)).casefold().split()).rstrip(" .")


def _group(kind: str, value: str, *scope: str) -> int:
    """63 bits that depend on nothing but the words, so that all processes agree; -1 for no words.

    Two of a million different texts share a number with a probability of 5e-8.
    """
    if not value:
        return UNKNOWN_GROUP
    content = "\0".join((kind, value, *scope)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
