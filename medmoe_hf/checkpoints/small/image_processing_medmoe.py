"""Image processors of MedMoE: any image in, `pixel_values` (B, 3, H, W) out; torchvision and PIL backends."""

# mypy: allow-subclassing-any
# transformers is untyped.

# First, because it raises a clear error with older releases of transformers.
from .configuration_medmoe import REQUIRED_TRANSFORMERS as REQUIRED_TRANSFORMERS
from .configuration_medmoe import attach_to_package

# isort: split
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs

from .errors_medmoe import ImageError
from .image_files_medmoe import load_image
from .medical_images_medmoe import is_medical_image
from .medical_pixels_medmoe import MAX_PIXELS, MedicalImage

_CHANNEL_COUNTS = (1, 3, 4)
_TORCH_FILTERS = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


def smooth_heatmaps(heatmaps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Smooths heat maps with a Gaussian.

    A single hot cell is mostly noise; findings produce peaks that neighbours share. Borders are repeated, so that a
    constant map stays constant.

    Args:
        heatmaps: `(..., h, w)`.
        sigma: Standard deviation in cells; 0 for no smoothing.

    Returns:
        `(..., h, w)` float32.
    """
    maps = heatmaps.to(torch.float32)
    reach = math.ceil(3 * sigma)
    if not reach or not maps.numel():
        return maps
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=maps.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    rows = maps.reshape(-1, 1, *maps.shape[-2:])
    rows = torch.nn.functional.pad(rows, (reach,) * 4, mode="replicate")
    rows = torch.nn.functional.conv2d(rows, kernel.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(rows, kernel.view(1, 1, 1, -1)).view(maps.shape)


def _square_margins(height: int, width: int) -> tuple[int, int]:
    """Returns the margins above and left of an image centred in a square; an odd pixel goes below and right."""
    side = max(height, width)
    return (side - height) // 2, (side - width) // 2


def resize_heatmaps(heatmaps: torch.Tensor, size: tuple[int, int], pad_to_square: bool = False) -> torch.Tensor:
    """Resizes heat maps to an image: the inverse of the image processors' geometry.

    Args:
        heatmaps: `(..., h, w)`, any float dtype and range.
        size: Height and width of the image, in pixels.
        pad_to_square: Whether the image was padded to a square: the maps then cover the square, whose margins are
            removed.

    Returns:
        `(..., height, width)` float32, bilinear between the centres of cells (`align_corners=False`).
    """
    height, width = size
    if pad_to_square:
        side, (top, left) = max(size), _square_margins(height, width)
        return resize_heatmaps(heatmaps, (side, side))[..., top : top + height, left : left + width]
    leading = heatmaps.shape[:-2]
    if 0 in leading:
        return heatmaps.new_zeros((*leading, height, width), dtype=torch.float32)
    maps = heatmaps.to(torch.float32).reshape(1, -1, *heatmaps.shape[-2:])
    maps = torch.nn.functional.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return maps.reshape(*leading, height, width)


def _pil_pixels(image: Image.Image) -> tuple[np.ndarray, bool]:
    """Returns the pixels (H, W) or (H, W, 3 or 4) of an image, and whether to rescale their range to 0..255."""
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return np.array(image), True
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
        elif mode == "1":
            image = image.convert("L")
        elif mode not in ("L", "RGB"):
            image = image.convert("RGB")
    except ValueError as error:  # a transparent colour that the palette does not have
        raise ImageError(f"the colours of the image are damaged: {error}") from error
    return np.array(image), False


def _array_pixels(array: np.ndarray) -> np.ndarray:
    """Returns the array in a form that torch can share, copied where necessary."""
    if array.dtype.kind not in "buif":
        raise ImageError(f"numpy dtype {array.dtype} is not one of pixel values")
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return array


def _range(values: torch.Tensor) -> tuple[float, float]:
    low, high = (bound.item() for bound in torch.aminmax(values))
    # aminmax propagates NaN, and the difference is infinite if a bound is, or if it exceeds float64.
    if not math.isfinite(high - low):
        raise ImageError("the image holds NaN or infinite values")
    return low, high


def _eight_bit_range(values: torch.Tensor, stretch: bool, keep_floats: bool) -> torch.Tensor:
    """Scales values to 0..255: uint8 for 8-bit or bool, else float32. `stretch`: floats by minimum and maximum too."""
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if values.is_floating_point():
        values = values if values.element_size() >= 4 else values.to(torch.float32)
        low, high = _range(values)
        if keep_floats and not stretch:
            return values.to(torch.float32)
        if not stretch and low >= 0 and high <= 255:
            return (values * 255 if high <= 1 else values).to(torch.float32)
        values = values.to(torch.float64)
    else:
        # Integers of 16 bits are exact in float32, those of 32 bits in float64.
        values = values.to(torch.float32 if values.element_size() <= 2 else torch.float64)
        low, high = _range(values)
    if low == high:
        return torch.zeros_like(values, dtype=torch.float32)
    return ((values - low) / (high - low) * 255).to(torch.float32)


def _opacity(alpha: torch.Tensor) -> torch.Tensor:
    """Returns an alpha channel as float32 in 0..1, scaled by the range of its dtype, never by its own."""
    if alpha.dtype == torch.bool:
        return alpha.to(torch.float32)
    scale = 1 if alpha.is_floating_point() else torch.iinfo(alpha.dtype).max
    alpha = alpha.to(torch.float32)
    low, high = _range(alpha)
    if scale == 1 and high > 1:
        scale = 255
    if low < 0 or high > scale:
        raise ImageError(f"the alpha channel spans {low}..{high}; it must lie within 0..{scale}")
    return alpha / scale


def to_rgb(
    image: Image.Image | np.ndarray | torch.Tensor,
    input_data_format: str | ChannelDimension | None = None,
    do_convert_rgb: bool = True,
    device: str | torch.device | None = None,
    keep_floats: bool = False,
) -> torch.Tensor:
    """Converts one image to RGB in 0..255, by the rules that `MedMoEImageProcessor` documents.

    Args:
        image: A PIL image, or an array or tensor `(H, W)`, `(H, W, C)` or `(C, H, W)` with C in 1, 3, 4.
        input_data_format: `"channels_first"` or `"channels_last"` for arrays; inferred from the shape if None.
        do_convert_rgb: False rejects images that do not have exactly three channels.
        device: Device of the result; None keeps that of a tensor.
        keep_floats: Whether the values of float arrays and tensors are kept.

    Returns:
        `(3, H, W)`, uint8 if the image has 8 bits (or 1) per channel, float32 otherwise.

    Raises:
        ImageError: There are NaN or infinite values, no pixels, or values that are not pixels.
        ValueError: There is no channel axis, or the object is no image.
    """
    stretch = False
    channels_last: bool | None = None
    if isinstance(image, Image.Image):
        array, stretch = _pil_pixels(image)
        pixels, channels_last = torch.from_numpy(_array_pixels(array)), True
    elif isinstance(image, np.ndarray):
        pixels = torch.from_numpy(_array_pixels(image))
    elif isinstance(image, torch.Tensor):
        if image.is_complex():
            raise ImageError(f"tensor dtype {image.dtype} is not one of pixel values")
        pixels = image
    else:
        raise ValueError(f"{type(image).__name__} is not a PIL image, numpy array or torch tensor")
    if device is not None:
        pixels = pixels.to(device)
    if pixels.numel() == 0:
        raise ImageError(f"shape {tuple(pixels.shape)} holds no pixels")

    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    else:
        if channels_last is None:
            channels_last = _channels_last(pixels, input_data_format)
        if channels_last:
            pixels = pixels.permute(2, 0, 1)
    channels = pixels.shape[0]
    if channels != 3 and not do_convert_rgb:
        raise ValueError(f"the image has {channels} channels, and do_convert_rgb=False allows nothing but 3")

    colour = _eight_bit_range(pixels[:3], stretch, keep_floats)
    if channels == 4:
        eight_bit = colour.dtype == torch.uint8
        colour = colour.to(torch.float32) * _opacity(pixels[3:])
        colour = colour.round().to(torch.uint8) if eight_bit else colour
    return colour.expand(3, -1, -1).contiguous()


def _channels_last(pixels: torch.Tensor, input_data_format: str | ChannelDimension | None) -> bool:
    shape = tuple(pixels.shape)
    if pixels.ndim != 3:
        raise ValueError(f"shape {shape} is not an image's: 2 or 3 dimensions")
    if input_data_format is not None:
        layout = ChannelDimension(input_data_format)
    elif shape[0] not in _CHANNEL_COUNTS and shape[2] not in _CHANNEL_COUNTS:
        raise ValueError(f"shape {shape} has no 1, 3 or 4 channels as its first or last axis")
    else:
        layout = infer_channel_dimension_format(pixels, num_channels=_CHANNEL_COUNTS)
    channels = shape[2] if layout == ChannelDimension.LAST else shape[0]
    if channels not in _CHANNEL_COUNTS:
        raise ValueError(f"shape {shape}, read as {layout.value}, has {channels} channels, not 1, 3 or 4")
    return bool(layout == ChannelDimension.LAST)


def _single_images(images: Any) -> list[Any]:
    """Flattens nested lists, batches and single images to a list of single images."""
    if isinstance(images, (list, tuple)):
        return [single for item in images for single in _single_images(item)]
    if getattr(images, "ndim", 0) == 4 and not is_medical_image(images):
        return list(images)
    return [images]


def _is_in_eight_bit_range(image: Any) -> bool:
    return image.dtype in (np.uint8, torch.uint8) or bool(image.min() >= 0 and 1 < image.max() <= 255)


def _padded_to_square(image: Any) -> Any:
    """Pads a tensor or array (3, H, W) with black to (3, side, side), centred."""
    height, width = image.shape[-2:]
    side, (top, left) = max(height, width), _square_margins(height, width)
    below, right = side - height - top, side - width - left
    if isinstance(image, torch.Tensor):
        return torch.nn.functional.pad(image, (left, right, top, below))
    return np.pad(image, ((0, 0), (top, below), (left, right)))


class MedMoEImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call (and of the constructor) in addition to those of every image processor.

    Args:
        window: For DICOM and NIfTI, see `read_medical_image`.
        frame: For DICOM and NIfTI, see `read_medical_image`.
        pad_to_square: Whether images are padded to squares before they are resized.
        return_modality: Whether the output has an entry `modality`.
        max_pixels: Maximum number of pixels of an image.
        allow_urls: Whether http(s) addresses are fetched.
    """

    window: str | list[Any] | tuple[Any, ...] | None
    frame: int | None
    pad_to_square: bool | None
    return_modality: bool | None
    max_pixels: int | None
    allow_urls: bool | None


class _MedMoEImages:
    """Common code of the two backends; it precedes the backend among the base classes."""

    valid_kwargs = MedMoEImagesKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    window = None
    frame = None
    pad_to_square = False
    return_modality = False
    max_pixels = MAX_PIXELS
    allow_urls = True

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads the inputs of `load_image`, in any nesting; arrays and tensors are returned unchanged.

        DICOM and NIfTI are returned unchanged too: the arguments of a call determine how they are read.

        Args:
            image_url_or_urls: An input of `load_image`, an array or a tensor, or nested lists of them.

        Returns:
            Images in the same nesting.

        Raises:
            ImageError: A file cannot be decoded; the message names it.
            FileNotFoundError: A file does not exist.
            TypeError: An object is neither a source nor an image.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, MedicalImage) or is_medical_image(image_url_or_urls):
            return image_url_or_urls
        if isinstance(image_url_or_urls, (np.ndarray, torch.Tensor)):
            return image_url_or_urls
        return load_image(image_url_or_urls, max_pixels=self.max_pixels or MAX_PIXELS, allow_urls=self.allow_urls)[0]

    def _prepare_image_like_inputs(
        self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any
    ) -> list[torch.Tensor] | list[np.ndarray]:
        return [pixels for pixels, _ in self._prepared(images, *args, **kwargs)]

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        prepared = self._prepared(images, **kwargs)
        features = self._preprocess([pixels for pixels, _ in prepared], *args, **kwargs)
        modalities = [modality for _, modality in prepared]
        if kwargs.get("return_modality") and any(modalities):
            features["modality"] = modalities
        return features

    def _prepared(
        self,
        images: Any,
        *args: Any,
        window: Any = None,
        frame: int | None = None,
        max_pixels: int | None = None,
        allow_urls: bool | None = None,
        **kwargs: Any,
    ) -> list[tuple[Any, str | None]]:
        """Returns each image in the backend's format, with its modality where a medical file specifies one."""
        singles = _single_images(images)
        if not singles:
            raise ValueError("there are no images in the batch")
        prepared: list[tuple[Any, str | None]] = []
        for position, image in enumerate(singles):
            modality, arguments = None, kwargs
            try:
                if not isinstance(image, (np.ndarray, torch.Tensor)):
                    image, modality = load_image(
                        image,
                        window=window,
                        frame=frame,
                        max_pixels=max_pixels or MAX_PIXELS,
                        allow_urls=bool(allow_urls),
                    )
                    # Options for the arrays of the batch do not apply to images that were read here.
                    arguments = {**kwargs, "input_data_format": ChannelDimension.LAST, "do_rescale": True}
                prepared.append((self.process_image(image, *args, **arguments), modality))  # type: ignore[attr-defined]
            except ImageError as error:
                raise type(error)(f"image {position} of the batch: {error}") from error
            except ValueError as error:
                raise ValueError(f"image {position} of the batch: {error}") from error
        return prepared

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        size = kwargs.get("size")
        if kwargs.get("do_resize") and size is not None and not (size.height and size.width):
            raise ValueError(f"size must have a height and a width, got {dict(size)}")
        super()._validate_preprocess_kwargs(**kwargs)  # type: ignore[misc]

    def _preprocess(
        self,
        images: list[Any],
        disable_grouping: bool | None = None,
        return_tensors: Any = None,
        pad_to_square: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if pad_to_square:
            images = [_padded_to_square(image) for image in images]
        if kwargs.get("do_resize") and not kwargs.get("do_rescale"):
            # Floats on another scale: `resize` would clamp them to 0..255.
            images = [
                image if _is_in_eight_bit_range(image) else self._resize_raw(image, kwargs["size"], kwargs["resample"])  # type: ignore[attr-defined]
                for image in images
            ]
        # Stacking would convert 8-bit images to float if another one is float; results must not depend on the batch.
        if len({image.dtype for image in images}) > 1:
            disable_grouping = True
        features = super()._preprocess(  # type: ignore[misc]
            images, disable_grouping=disable_grouping, return_tensors=None, **kwargs
        )
        features["pixel_values"] = [
            image.to(torch.float32) if isinstance(image, torch.Tensor) else image.astype(np.float32, copy=False)
            for image in features["pixel_values"]
        ]
        return BatchFeature(features, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings for JSON; `auto_map` names the classes of both backends."""
        output: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if "AutoImageProcessor" in output.get("auto_map", {}):
            module = __name__.rsplit(".", 1)[-1]
            backends = {
                "torchvision": f"{module}.{MedMoEImageProcessor.__name__}",
                "pil": f"{module}.{MedMoEImageProcessorPil.__name__}",
            }
            output["auto_map"] = {**output["auto_map"], "AutoImageProcessor": backends}
        return output


class MedMoEImageProcessor(_MedMoEImages, TorchvisionBackend):
    """Converts images of any kind to `pixel_values` (B, 3, H, W) float32; torchvision backend.

    By default an image is resized to 224x224 (bicubic with antialiasing, ignoring the aspect ratio), divided by 255
    and normalised with ImageNet's mean and standard deviation. Defaults can be changed in the constructor or per call.

    **Input**: an image or (nested) lists of images of mixed kinds: PIL images of any mode; numpy arrays and torch
    tensors (H, W), (H, W, C), (C, H, W) with C in 1, 3, 4, or batches of these with four dimensions; file names (str
    or Path), http(s) addresses, base64 strings and bytes of files, which `load_image` reads. Files and PIL images are
    turned upright by their EXIF tag. Without `input_data_format` a first axis of 1, 3 or 4 is taken as the channels of
    an array, otherwise the last axis.

    **DICOM and NIfTI** (names and bytes of files, `pydicom` datasets, `nibabel` images, and `MedicalImage`) are inputs
    like any other image; see `read_medical_image`. With `return_modality=True` the output also has `modality`, for the
    model's argument of that name: `"ct"`, `"xray"`, ... from the DICOM header, or None, for each image; there is no
    such entry if no header specifies it.

    **Values**: every image is first converted to RGB in 0..255, without saturation or loss of precision:

    - 8 bits per channel: unchanged. Gray is repeated, palettes are applied, CMYK and similar modes are converted by
      Pillow.
    - bool and PIL mode `1`: 0 and 255.
    - every other integer dtype (including PNG and TIFF files with 16-bit colours), and the PIL modes `I`, `I;16`,
      `I;16B`, `F`: the image's own minimum to 0 and maximum to 255, linearly, over all colour channels together. A
      constant image becomes zeros.
    - float arrays: within [0, 1] times 255; within [0, 255] unchanged; otherwise by minimum and maximum. With
      `do_rescale=False` they are unchanged, whatever their range, as in other image processors.
    - transparency (RGBA, LA, palettes and colour keys with transparency, arrays of 4 channels) is blended with black.
      Integer alpha is a fraction of its dtype's maximum, float alpha is in 0..1 or 0..255.

    8-bit images are resized in 8 bits, all others in float32 and then clamped to 0..255 like 8-bit resizing; floats
    that `do_rescale=False` keeps on another scale are not clamped.

    Args:
        size: `{"height": ..., "width": ...}` or an int; 224 by default.
        pad_to_square: Whether the shorter side is first padded with black on both sides, which keeps the aspect ratio.
        window: For DICOM and NIfTI: a name such as `"lung"`, `(centre, width)`, or three of these for three channels.
        frame: For DICOM and NIfTI: index of the frame; None for the middle one.
        return_modality: Whether the output has an entry `modality`.
        max_pixels: An image with more pixels is rejected before it is decoded.
        allow_urls: Whether http(s) addresses are fetched, from public hosts only, within 60 seconds, and at most one
            byte per pixel of `max_pixels`. Programs that accept untrusted strings should pass False.
        **kwargs: The arguments of every image processor: `resample`, `do_resize`, `do_rescale`, `do_normalize`,
            `image_mean`, `image_std`, `do_convert_rgb`, `input_data_format`, `return_tensors`.

    Raises:
        ValueError: NaN, infinite values, an empty image, a shape without a channel axis (the message contains the
            position in the batch); a `size` without height or width; an unknown window; a DICOM or NIfTI file that is
            damaged, without pixels or without the requested frame (the message contains its name).
        ImageError: A file cannot be read or is not a regular file, or an address must not be fetched; as
            `ImageTooLargeError` an image exceeds `max_pixels` (the message contains name and position).
        FileNotFoundError: A file does not exist.
        ImportError: DICOM or NIfTI without the packages of `pip install "medmoe_hf[dicom]"`.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.model import MedMoEImageProcessor
        >>> processor = MedMoEImageProcessor(size=64, pad_to_square=True)
        >>> images = [np.zeros((300, 200), np.uint16), np.zeros((3, 80, 80), np.float32)]
        >>> processor(images, return_tensors="pt").pixel_values.shape
        torch.Size([2, 3, 64, 64])
    """

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        do_rescale: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Converts one image to a tensor (3, H, W) in 0..255 with `to_rgb`; `do_rescale=False` keeps floats."""
        return to_rgb(image, input_data_format, do_convert_rgb is not False, device, keep_floats=do_rescale is False)

    def resize(
        self, image: torch.Tensor, size: SizeDict, resample: Any = None, antialias: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """Resizes (..., 3, h, w) to `size`, clamped to 0..255."""
        if image.shape[-2:] == (size.height, size.width):
            return image
        resized = self._resize_raw(image, size, resample, antialias, **kwargs)
        return resized.clamp(0, 255) if resized.is_floating_point() else resized

    def _resize_raw(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stretched: torch.Tensor = super().resize(image, *args, **kwargs)
        return stretched


class MedMoEImageProcessorPil(_MedMoEImages, PilBackend):
    """`MedMoEImageProcessor` without torchvision: the same arguments, rules, defaults and output.

    Bilinear and bicubic resizing use torch's own kernels, which torchvision calls too: Pillow's differ by up to two
    gray levels on smooth 8-bit images. All other filters are Pillow's.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.model import MedMoEImageProcessorPil
        >>> MedMoEImageProcessorPil(size=64)(np.zeros((300, 200), np.uint8), return_tensors="np").pixel_values.shape
        (1, 3, 64, 64)
    """

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Converts one image to an array (3, H, W) in 0..255 with `to_rgb`; `do_rescale=False` keeps floats."""
        rgb = to_rgb(image, input_data_format, do_convert_rgb is not False, keep_floats=do_rescale is False)
        return rgb.detach().cpu().numpy()

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: Any = None, reducing_gap: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Resizes (3, h, w) to `size`, clamped to 0..255."""
        if image.shape[-2:] == (int(size["height"]), int(size["width"])):
            return image
        resized = self._resize_raw(image, size, resample, reducing_gap, **kwargs)
        return resized if resized.dtype == np.uint8 else resized.clip(0, 255)

    def _resize_raw(
        self, image: np.ndarray, size: SizeDict, resample: Any = None, reducing_gap: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        target = (int(size["height"]), int(size["width"]))
        if resample in _TORCH_FILTERS:
            return torch.nn.functional.interpolate(
                torch.from_numpy(image)[None],
                size=target,
                mode=_TORCH_FILTERS[resample],
                align_corners=False,
                antialias=True,
            )[0].numpy()
        if image.dtype == np.uint8:
            stretched: np.ndarray = super().resize(image, size, resample, reducing_gap, **kwargs)
            return stretched
        # The backend would round to 8 bits; Pillow's float mode has one channel.
        planes = [Image.fromarray(plane).resize(target[::-1], resample) for plane in image]
        return np.stack([np.asarray(plane) for plane in planes])


MedMoEImageProcessor.register_for_auto_class("AutoImageProcessor")
MedMoEImageProcessorPil.register_for_auto_class("AutoImageProcessor")
attach_to_package(__name__)
