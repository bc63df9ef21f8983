"""Encoders of models other than a MedMoE in PyTorch: CLIP and its kin in transformers, and ONNX exports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoProcessor

from medmoe_hf.common.loading import explain_loading
from medmoe_hf.errors import EncoderError, MissingPackageError
from medmoe_hf.inference.batching import (
    BATCH_SIZE,
    TEXT_BATCH_SIZE,
    default_device,
    encode_by_batch,
    load_model,
    processor_settings,
    read_picture,
    short_hash,
    short_name,
    unit_length,
)
from medmoe_hf.model.image_processing_medmoe import MedMoEImageProcessor

try:
    import onnxruntime
except ImportError:  # only models named "onnx:..." need it
    onnxruntime = None

ONNX = "onnx:"


class TransformersEncoder:
    """Encoder of a transformers model with `get_image_features` and `get_text_features`, such as CLIP and SigLIP.

    Args:
        folder: Folder or Hub id, with a processor. No code in it is run.
        batch_size: Images per batch.
        device: Device to run on; None selects a GPU if there is one.

    Raises:
        EncoderError: For a model without these two methods.

    Example:
        ```python
        encoder = TransformersEncoder("openai/clip-vit-base-patch32")
        embeds = encoder.encode_texts(["A chest X-ray."])
        ```
    """

    def __init__(self, folder: str | Path, batch_size: int = BATCH_SIZE, device: str | None = None) -> None:
        self.name, self.batch_size, self.device = short_name(folder), batch_size, default_device(device)
        self.model = load_model(folder, self.device)
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(self.model, method):
                raise EncoderError(
                    f"{folder}: {type(self.model).__name__} has no {method}, so it is not a dual encoder."
                )
        with explain_loading(folder):
            self.processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        scale = getattr(self.model, "logit_scale", None)
        self.logit_scale = 1.0 if scale is None else float(scale.detach().exp())
        config = self.model.config
        lengths = (
            getattr(getattr(config, "text_config", None), "max_position_embeddings", None),
            self.processor.tokenizer.model_max_length,
        )
        length = min(length for length in lengths if length is not None)
        # SigLIP was trained on texts padded to the maximum length.
        padding = "max_length" if config.model_type.startswith("siglip") else True
        self.text_settings = {"padding": padding, "truncation": True, "max_length": length}
        self.preprocessing = f"{processor_settings(self.processor)} {self.text_settings}"
        self.weights = "pretrained"

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Encodes images.

        Args:
            images: N paths (DICOM and NIfTI too), PIL images or arrays.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """

        def encode(batch: list[Any]) -> Tensor:
            pictures = [read_picture(image) for image in batch]
            inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
            return unit_length(_pooled(self.model.get_image_features(**inputs)))

        return encode_by_batch(images, self.batch_size, encode, "images")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts.

        Args:
            texts: N texts.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """

        def encode(batch: list[str]) -> Tensor:
            inputs = self.processor(text=batch, return_tensors="pt", **self.text_settings).to(self.device)
            return unit_length(_pooled(self.model.get_text_features(**inputs)))

        return encode_by_batch(texts, TEXT_BATCH_SIZE, encode, "texts")

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Computes the features that a linear probe is fitted on.

        Args:
            images: N images.

        Returns:
            `embedding` (N, D): the image embeddings.
        """
        return {"embedding": self.encode_images(images)}


class ExportedEncoder:
    """Encoder of a MedMoE that `medmoe export` wrote as ONNX; the image router selects the expert of each image.

    Args:
        folder: Folder with `export.json`. Images are processed by `MedMoEImageProcessor` with the settings in it.
        batch_size: Images per batch.

    Raises:
        ImportError: Without the onnxruntime package.
        EncoderError: For another folder, or one in another format.

    Example:
        ```python
        encoder = ExportedEncoder("exported")
        embeds = encoder.encode_images(["scan.png"])
        ```
    """

    def __init__(self, folder: str | Path, batch_size: int = BATCH_SIZE) -> None:
        if onnxruntime is None:
            raise MissingPackageError('Models named onnx:... need onnxruntime: pip install "medmoe_hf[export]".')
        self.name, self.batch_size = ONNX + short_name(folder), batch_size
        try:
            self.facts = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
            files = {tower: Path(folder) / self.facts[tower]["file"] for tower in ("image_tower", "text_tower")}
            images, self.modalities = self.facts["images"], list(self.facts["modalities"])
            self.logit_scale = float(self.facts["similarity"]["scale"])
            self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EncoderError(f"{folder} was not written by `medmoe export`: {error}") from error
        if any(file.suffix != ".onnx" for file in files.values()):
            raise EncoderError(f"{folder} does not contain ONNX files; export the model with --format onnx.")
        self.towers = {
            tower: onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            for tower, file in files.items()
        }
        self.processor = MedMoEImageProcessor(
            size={"height": images["height"], "width": images["width"]},
            resample=Image.Resampling[images["resample"].upper()],
            pad_to_square=images["pad_to_square"],
            rescale_factor=images["rescale_factor"],
            image_mean=images["mean"],
            image_std=images["std"],
        )
        self.preprocessing = f"{images} {short_hash(self.tokenizer.to_str())}"
        self.weights = "exported"

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Encodes images.

        Args:
            images: N paths (DICOM and NIfTI too), PIL images or arrays.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """

        def encode(batch: list[Any]) -> Tensor:
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            return self._run("image_tower", "image_embeds", pixel_values=pixels.numpy())

        return encode_by_batch(images, self.batch_size, encode, "images")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts.

        Args:
            texts: N texts.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """

        def encode(batch: list[str]) -> Tensor:
            encodings = self.tokenizer.encode_batch(batch)
            given = {
                "input_ids": [encoding.ids for encoding in encodings],
                "attention_mask": [encoding.attention_mask for encoding in encodings],
                "word_ids": [[-1 if word is None else word for word in encoding.word_ids] for encoding in encodings],
            }
            arrays = {name: np.array(rows, dtype=np.int64) for name, rows in given.items()}
            return self._run("text_tower", "text_embeds", **arrays)

        return encode_by_batch(texts, TEXT_BATCH_SIZE, encode, "texts")

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Computes the features that a linear probe is fitted on.

        Args:
            images: N images.

        Returns:
            `embedding` (N, D): the image embeddings.
        """
        return {"embedding": self.encode_images(images)}

    def _run(self, tower: str, output: str, **inputs: np.ndarray) -> Tensor:
        (found,) = self.towers[tower].run([output], inputs)
        return torch.from_numpy(found)


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
