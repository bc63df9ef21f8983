"""MedMoE as the patch encoder of other libraries, and features of patches in TRIDENT's HDF5 layout."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from medmoe_hf.common.files import atomic_write
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.errors import ArgumentError, MissingPackageError
from medmoe_hf.inference.batching import load_model, short_name, unit_length
from medmoe_hf.model import MedMoEModel, MedMoEProcessor

Features = Literal["embedding", "backbone", "expert", "both"]


class ImageTransform:
    """Turns one image into a model's pixel values, as data sets of other libraries call it; can be pickled.

    Args:
        folder: Folder or Hub id of a MedMoE, or `small`.

    Example:
        >>> from PIL import Image
        >>> from medmoe_hf.inference.patches import ImageTransform
        >>> ImageTransform("small")(Image.new("RGB", (64, 48))).shape
        torch.Size([3, 160, 160])
    """

    def __init__(self, folder: str | Path) -> None:
        with explain_loading(folder):
            processor: Any = MedMoEProcessor.from_pretrained(find_checkpoint(folder), trust_remote_code=False)
        self.processor = processor.image_processor

    def __call__(self, image: Any) -> Tensor:
        """Processes an image.

        Args:
            image: A path, a PIL image, or an array or tensor (H, W), (H, W, 3) or (3, H, W) of uint8.

        Returns:
            (3, H, W) float32.
        """
        if isinstance(image, Tensor):
            # also a subclass of torchvision, whose transforms return its own type
            image = image.as_subclass(Tensor)
        pixels: Tensor = self.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return pixels


class PatchModel(nn.Module):
    """The image tower of a MedMoE: pixel values to one vector per image.

    Args:
        model: A `MedMoEModel`.
        features: As for `patch_encoder`.
        modality: As for `patch_encoder`.
    """

    def __init__(self, model: MedMoEModel, features: Features = "embedding", modality: str | None = None) -> None:
        super().__init__()
        self.model, self.features, self.modality = model, features, modality

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixel_values: (B, 3, H, W), as `ImageTransform` returns them.

        Returns:
            (B, D) float32.
        """
        if self.features == "embedding":
            output = self.model.get_image_features(pixel_values, modality=self.modality, local=False)
            return unit_length(output.pooler_output)
        vision = self.model.vision_model
        kind = "both" if self.features == "expert" else self.features
        pooled: Tensor = vision.pooled_features(vision.encode(pixel_values), kind, self.modality)
        if self.features == "expert":
            pooled = pooled[:, -self.model.config.vision_config.local_size :]
        return pooled.float()


class PatchEncoder(NamedTuple):
    """What `CustomInferenceEncoder` of TRIDENT takes, by the names of its arguments.

    Attributes:
        enc_name: Name of the encoder.
        model: Module from pixel values to vectors.
        transforms: Function from a PIL image to pixel values.
        precision: Data type that TRIDENT computes in on a GPU.
    """

    enc_name: str
    model: nn.Module
    transforms: ImageTransform
    precision: torch.dtype


def patch_encoder(
    folder: str | Path = "small",
    features: Features = "embedding",
    modality: str | None = None,
    precision: torch.dtype = torch.float32,
) -> PatchEncoder:
    """Makes a MedMoE the patch encoder of TRIDENT.

    Args:
        folder: Folder or Hub id of a MedMoE, or `small`.
        features: `embedding` (of length 1, comparable with texts), or the features of the image tower that linear
            probes use: `backbone`, `expert` or `both`.
        modality: Expert that all patches are sent to, such as `histopathology`; None lets the image router select one
            for each patch.
        precision: Data type that TRIDENT computes in on a GPU.

    Returns:
        The arguments of TRIDENT's `CustomInferenceEncoder`.

    Raises:
        ArgumentError: For unknown features, or a modality for which the model has no expert.
        EncoderError: If the model cannot be loaded.

    Example:
        ```python
        from trident.patch_encoder_models import CustomInferenceEncoder

        encoder = CustomInferenceEncoder(**patch_encoder("small", modality="histopathology")._asdict())
        ```
    """
    if features not in get_args(Features):
        raise ArgumentError(f"`features` must be {', '.join(get_args(Features))}, got {features}.")
    found = find_checkpoint(folder)
    model = load_model(found, "cpu", MedMoEModel)
    if modality is not None:
        try:
            model.config.vision_config.modality_ids(modality, 1)
        except ValueError as error:
            raise ArgumentError(f"{folder} cannot send patches to `modality` {modality}: {error}") from error
    name = "-".join(["medmoe", *short_name(folder).split("/"), features, *([modality] if modality else [])])
    return PatchEncoder(name, PatchModel(model, features, modality).eval(), ImageTransform(found), precision)


def write_patch_features(
    path: str | Path,
    features: ArrayLike | Tensor,
    coords: ArrayLike,
    *,
    patch_size: int,
    level0_magnification: int,
    target_magnification: int,
    overlap: int = 0,
) -> None:
    """Writes features of the patches of one slide in the HDF5 layout of TRIDENT, which Patho-Bench reads.

    The file contains `features` (N, D) and `coords` (N, 2). Attributes of `coords` are `patch_size`,
    `patch_size_level0`, `level0_magnification`, `target_magnification`, `overlap` and `name`, the name of the file
    without `.h5`, by which slides are found. TRIDENT's `savetodir`, a path, is left out.

    Args:
        path: File to write, `SLIDE.h5`.
        features: (N, D) features, one per patch; written as float32.
        coords: (N, 2) left and top of each patch, in pixels of the full resolution.
        patch_size: Side of a patch in pixels at `target_magnification`.
        level0_magnification: Magnification of the full resolution, such as 40.
        target_magnification: Magnification that patches were read at, such as 20.
        overlap: Overlap of neighbouring patches, in pixels at `target_magnification`.

    Raises:
        ArgumentError: If numbers of rows differ, or a setting or the name of the file is not as described.
        MissingPackageError: Without the package h5py.

    Example:
        ```python
        from medmoe_hf.inference.encoders import load_encoder
        from medmoe_hf.inference.patches import write_patch_features

        features = load_encoder("small").encode_images(patches)
        write_patch_features(
            "slide.h5", features, coords, patch_size=256, level0_magnification=40, target_magnification=20
        )
        ```
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingPackageError('HDF5 files need the package h5py: pip install "medmoe_hf[trident]"') from error
    path = Path(path)
    table = np.asarray(features, dtype=np.float32)
    places = np.asarray(coords)
    if table.ndim != 2 or places.shape != (len(table), 2):
        raise ArgumentError(f"Expected features (N, D) and coords (N, 2), got {table.shape} and {places.shape}.")
    if not np.array_equal(places, places.astype(np.int64)):
        raise ArgumentError("`coords` must be whole numbers of pixels.")
    if path.suffix != ".h5":
        raise ArgumentError(f"{path}: Patho-Bench reads files whose name ends with .h5.")
    if min(patch_size, level0_magnification, target_magnification) < 1 or not 0 <= overlap < patch_size:
        raise ArgumentError(
            "`patch_size` and magnifications must be 1 or more, and `overlap` less than `patch_size`; got "
            f"{patch_size}, {level0_magnification}, {target_magnification} and {overlap}."
        )
    attributes = {
        "patch_size": patch_size,
        "patch_size_level0": patch_size * level0_magnification // target_magnification,
        "level0_magnification": level0_magnification,
        "target_magnification": target_magnification,
        "overlap": overlap,
        "name": path.stem,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, h5py.File(partial, "w") as file:
        for name, values in (("features", table), ("coords", places.astype(np.int64))):
            # appendable, as TRIDENT's
            file.create_dataset(name, data=values, maxshape=(None, values.shape[1]), chunks=True)
        file["features"].attrs["name"] = path.stem
        file["coords"].attrs.update(attributes)
