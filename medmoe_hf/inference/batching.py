"""Reading images, loading models and encoding in batches: what the encoders of all models share."""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from medmoe_hf.common.console import progress
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.errors import ArgumentError, EncoderError, WeightsError
from medmoe_hf.model.image_processing_medmoe import MedMoEImageProcessorPil, to_rgb
from medmoe_hf.model.medical_images_medmoe import is_medical_image, read_medical_image

BATCH_SIZE = 32
TEXT_BATCH_SIZE = 256


def read_picture(image: Any) -> Image.Image:
    """Reads any image as RGB, as MedMoE's own processor does: for models whose processor cannot read DICOM.

    Args:
        image: A path, bytes, a PIL image, or an array (H, W), (H, W, C) or (C, H, W).

    Returns:
        An RGB image of the original size; DICOM and NIfTI images are windowed and upright.

    Raises:
        MedicalImageError: If a DICOM or NIfTI file cannot be read.

    Example:
        >>> import numpy as np
        >>> read_picture(np.zeros((32, 48), dtype=np.uint8)).size
        (48, 32)
    """
    fetched = MedMoEImageProcessorPil().fetch_images(image)
    pixels = read_medical_image(fetched).pixels if is_medical_image(fetched) else fetched
    return Image.fromarray(to_rgb(pixels).round().to(torch.uint8).permute(1, 2, 0).numpy())


def short_hash(text: str) -> str:
    """Hashes a text (SHA-256): the first 12 hexadecimal digits."""
    return sha256(text.encode()).hexdigest()[:12]


def load_model(folder: str | Path, device: str, kind: type[PreTrainedModel] | None = None) -> Any:
    """Loads a complete transformers model in float32, without running any code of its folder.

    Args:
        folder: Folder or Hub id.
        device: Device to put it on.
        kind: Class of the model; None for the class of transformers that the configuration names.

    Returns:
        The model, in `eval` mode.

    Raises:
        EncoderError: If tensors are missing, or a file of weights contains code.
        WeightsError: If the configuration states other shapes than the weights have.
    """
    with explain_loading(folder):
        # Tensors of other shapes are then listed, and not raised as an error that is none of ours.
        settings = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            if kind is None:
                model, info = AutoModel.from_pretrained(folder, trust_remote_code=False, **settings)
            else:
                model, info = kind.from_pretrained(folder, **settings)
        except UnpicklingError as error:
            # The original message explains how to run the code in the file.
            raise EncoderError(f"{folder} contains more than weights and is not loaded; use safetensors.") from error
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, stated = mismatched[0]
        raise WeightsError(
            f"The weights in {folder} do not fit its configuration: {len(mismatched)} tensors of the "
            f"{type(model).__name__} have other shapes, such as {name}, {tuple(found)} in place of {tuple(stated)}. "
            "Use config.json and weights of the same model."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise EncoderError(
            f"{folder} lacks {len(missing)} tensors of a {type(model).__name__} ({missing[0]}, ...), so randomly "
            "initialized ones would be scored. Pass the folder of a complete dual encoder, not of a classifier or an "
            "adapter."
        )
    return model.eval().to(device)


def processor_settings(processor: Any) -> str:
    """Describes how a processor treats images and texts, independently of the path it was loaded from."""
    images, tokenizer = processor.image_processor.to_dict(), processor.tokenizer
    vocabulary = short_hash(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else type(tokenizer).__name__
    kept = {key: str(value) for key, value in sorted(images.items()) if "name" not in key and key != "auto_map"}
    return f"{kept} {vocabulary} {getattr(processor, 'max_length', None)} transformers {transformers.__version__}"


def short_name(folder: str | Path) -> str:
    """The last two parts of a path, as in a Hub id; what precedes them may name a person."""
    return "/".join(Path(folder).parts[-2:])


def default_device(device: str | None) -> str:
    """Selects a GPU if `device` is None and there is one.

    Raises:
        ArgumentError: For a device that torch does not know, or does not find here.
    """
    if not device:
        return "cuda" if torch.cuda.is_available() else "cpu"
    remedy = 'Leave `device` out to use a GPU where there is one, or pass "cpu".'
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f'torch knows no device "{device}". {remedy}') from error
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(wanted.type)
    if count is not None and (wanted.index or 0) >= count:
        raise ArgumentError(f'torch finds {count or "no"} devices of the kind {wanted.type}, got "{device}". {remedy}')
    return device


def unit_length(embeds: Tensor) -> Tensor:
    """Normalizes embeddings (N, D) to length 1, in float32."""
    return nn.functional.normalize(embeds.float(), dim=-1)


@torch.no_grad()
def encode_by_batch(items: Sequence[Any], size: int, encode: Callable[[list[Any]], Tensor], what: str) -> Tensor:
    """Encodes items in batches, with a progress bar.

    Args:
        items: N images or texts.
        size: Batch size.
        encode: Function of a batch that returns one row per item.
        what: Label of the progress bar.

    Returns:
        (N, ...) rows on the CPU.
    """
    parts = []
    with progress(None, what, unit="it", total=len(items)) as bar:
        for start in range(0, len(items), size):
            parts.append(encode(list(items[start : start + size])).cpu())
            bar.update(len(parts[-1]))
    return torch.cat(parts)
