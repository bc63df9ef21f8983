"""From samples of a stream to a batch that the model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from medmoe_hf.model import MedMoEImageProcessor


class ContrastiveCollator:
    """Makes the dual encoder's training batch: `pixel_values`, the tokens, `modality_labels` and `return_loss=True`.

    The work is cut in three, so that each part can run where it costs least: `prepare` (an image to 8-bit pixels of
    the model's size) in the processes that read, `assemble` (a batch, a quarter of the bytes that floats take) in the
    training process, `normalise` on the device. A call does all three.

    Args:
        processor: a `MedMoEProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
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
        """Samples whose `image` is prepared, with `caption` and `modality` (int, -100 unknown), to a batch."""
        images = [sample["image"] for sample in samples]
        if len({image.dtype for image in images}) > 1:
            images = [image.astype(np.float32) for image in images]
        texts = self.processor(text=[sample["caption"] for sample in samples], return_tensors="pt")
        labels = torch.tensor([int(sample["modality"]) for sample in samples])
        return {
            "pixel_values": torch.from_numpy(np.stack(images)),
            **texts,
            "modality_labels": labels,
            "return_loss": True,
        }

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
