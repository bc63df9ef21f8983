"""One interface by which every model is scored: MedMoE, its exports, transformers' dual encoders, open_clip's.

Shapes: N images or texts, M texts, D the size of a model's shared space, K experts.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from medmoe_hf.common.console import progress
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.errors import ArgumentError, EncoderError
from medmoe_hf.inference.batching import (
    BATCH_SIZE,
    TEXT_BATCH_SIZE,
    default_device,
    encode_by_batch,
    load_model,
    processor_settings,
    short_name,
    unit_length,
)
from medmoe_hf.inference.open_clip_encoder import CONFIGURATION, OPEN_CLIP, OpenClipEncoder
from medmoe_hf.inference.other_encoders import ONNX, ExportedEncoder, TransformersEncoder
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.model import MedMoEModel, MedMoEProcessor
from medmoe_hf.model.image_processing_medmoe import to_rgb
from medmoe_hf.model.medical_images_medmoe import is_medical_image, read_medical_image
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY, modality_id

SCORES = ("global", "local", "mean")
"""Similarities of an image and a text: the cosine of their embeddings times the model's scale, the word-region
similarity, and the mean of the two."""


class Encoder(Protocol):
    """Interface that a model needs to be scored; write your own to compare another kind of model.

    Attributes:
        name: Name of the model in tables.
        logit_scale: Factor by which cosines are multiplied before a softmax.
        preprocessing: Description of how images and texts are processed; only its hash is recorded.
        weights: Origin of the weights: "pretrained", "random" or "exported".

    Example:
        ```python
        class Constant:
            name, logit_scale, preprocessing, weights = "constant", 1.0, "none", "none"

            def encode_images(self, images):
                return torch.ones(len(images), 1)

            def encode_texts(self, texts):
                return torch.ones(len(texts), 1)

            def features(self, images):
                return {"embedding": self.encode_images(images)}
        ```
    """

    name: str
    logit_scale: float
    preprocessing: str
    weights: str

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Encodes images.

        Args:
            images: N paths (DICOM and NIfTI too), PIL images or arrays.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts.

        Args:
            texts: N texts.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Computes the features that a linear probe is fitted on.

        Args:
            images: N images.

        Returns:
            Name -> (N, F) float32, on the CPU.
        """


def load_encoder(name: str | Path, batch_size: int = BATCH_SIZE, device: str | None = None) -> Encoder:
    """Loads the encoder for a model.

    Args:
        name: `small`, the checkpoint of the package; folder or Hub id of a MedMoE or of any transformers model with
            `get_image_features` and `get_text_features` (CLIP, SigLIP), of which no code is run: that of this package
            and of transformers is; a folder of open_clip (BiomedCLIP, CoCa), known by its `open_clip_config.json`;
            `open_clip:ARCH[:CHECKPOINT]`, see `OpenClipEncoder`; or `onnx:FOLDER`, a MedMoE that `medmoe export`
            wrote. `NAME=` before any of these is its name in tables.
        batch_size: Images per batch.
        device: Device to run on; None selects a GPU if there is one.

    Returns:
        A `MedMoEEncoder`, `TransformersEncoder`, `OpenClipEncoder` or `ExportedEncoder`.

    Raises:
        EncoderError: For another kind of model, a folder that lacks weights, or a missing folder or id.

    Example:
        ```python
        encoder = load_encoder("small")
        similarity = encoder.encode_images(["scan.png"]) @ encoder.encode_texts(["A pleural effusion."]).T
        ```
    """
    given, rest = split_name(name)
    if given is not None:
        encoder = load_encoder(rest, batch_size, device)
        encoder.name = given
        return encoder
    if str(name).startswith(OPEN_CLIP):
        return OpenClipEncoder(str(name), batch_size, device)
    if str(name).startswith(ONNX):
        return ExportedEncoder(str(name).removeprefix(ONNX), batch_size)
    try:
        folder = find_checkpoint(name, bare_ids=True)
    except FileNotFoundError as error:
        raise EncoderError(str(error)) from None
    if _is_open_clip(Path(folder)):
        encoder = OpenClipEncoder(f"{OPEN_CLIP}local-dir:{folder}", batch_size, device)
        encoder.name = short_name(folder)
        return encoder
    try:
        config, _ = PretrainedConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"{name} is neither the folder of a transformers model nor a Hub id that can be reached from here; "
            f"pass one of these, a folder with {CONFIGURATION}, open_clip:ARCH[:CHECKPOINT], or onnx:FOLDER for what "
            "`medmoe export` wrote."
        ) from error
    kind = MedMoEEncoder if config.get("model_type") == "medmoe" else TransformersEncoder
    return kind(folder, batch_size, device)


# The name and the rest; the name may not look like a path or like the prefix of another kind.
_NAMED = re.compile(r"([^=/\\:]+)=(.+)")


def split_name(name: str | Path) -> tuple[str | None, str | Path]:
    """Splits `NAME=MODEL`.

    Args:
        name: A model as `load_encoder` takes it.

    Returns:
        The name in tables, None if none is given, and the model.

    Example:
        >>> split_name("BiomedCLIP=models/biomedclip"), split_name("small")
        (('BiomedCLIP', 'models/biomedclip'), (None, 'small'))
    """
    named = _NAMED.fullmatch(str(name))
    return (None, name) if named is None or Path(name).exists() else (named[1], named[2])


def _is_open_clip(folder: Path) -> bool:
    """Whether a folder is open_clip's. Some have the files of transformers' dual encoder too, which come first."""
    if not (folder / CONFIGURATION).is_file():
        return False
    try:
        return "vision_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True


def scores_of(encoder: Encoder, scores: Sequence[str]) -> list[str]:
    """Selects the requested scores that an encoder has.

    Args:
        encoder: An encoder; only a `MedMoEEncoder` has a local similarity.
        scores: Names from `SCORES`.

    Returns:
        The names, in the order of `scores`.

    Raises:
        ValueError: For an unknown score.
    """
    unknown = [score for score in scores if score not in SCORES]
    if unknown:
        raise ArgumentError(f"There is no score {unknown[0]}; known: {', '.join(SCORES)}.")
    return [score for score in scores if score == "global" or isinstance(encoder, MedMoEEncoder)]


class MedMoEEncoder:
    """Encoder of a MedMoE, with its local similarity, routers and heat-maps.

    Args:
        folder: Folder or Hub id.
        batch_size: Images per batch.
        device: Device to run on; None selects a GPU if there is one.

    Attributes:
        model: The `MedMoEModel`.
        processor: Its `MedMoEProcessor`.

    Example:
        ```python
        encoder = MedMoEEncoder("scratch/model")
        probabilities = encoder.route_images(["scan.png"])
        print(dict(zip(encoder.modalities, probabilities[0].tolist(), strict=True)))
        ```
    """

    def __init__(self, folder: str | Path, batch_size: int = BATCH_SIZE, device: str | None = None) -> None:
        self.name, self.batch_size, self.device = short_name(folder), batch_size, default_device(device)
        self.model = load_model(folder, self.device, MedMoEModel)
        with explain_loading(folder):
            self.processor: Any = MedMoEProcessor.from_pretrained(folder, trust_remote_code=False)
        self.logit_scale = float(self.model.global_scale)
        self.preprocessing = processor_settings(self.processor)
        self.weights = "pretrained"

    @property
    def modalities(self) -> list[str]:
        """Modalities of the experts, in the order of their ids."""
        return list(self.model.config.modalities.values())

    @property
    def has_report_router(self) -> bool:
        """Whether the model can route reports."""
        return self.model.report_router is not None

    def expert_ids(self, modalities: Sequence[int] | np.ndarray) -> np.ndarray:
        """Converts ids of `medmoe_hf.data.MODALITIES` to ids of this model's experts.

        Args:
            modalities: N ids, -100 where unknown.

        Returns:
            (N,) int64; -100 where the modality is unknown or the model has no expert for it.
        """
        own = {UNKNOWN_MODALITY: UNKNOWN_MODALITY}
        for known, name in enumerate(MODALITIES):
            try:
                own[known] = modality_id(name, self.modalities)
            except ValueError:
                own[known] = UNKNOWN_MODALITY
        return np.array([own[known] for known in modalities], dtype=np.int64)

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Encodes images; where the global embedding needs an expert, the image router selects it.

        Args:
            images: N paths (DICOM and NIfTI too), PIL images or arrays.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """
        return self._by_batch(images, lambda pixels: unit_length(self._image_features(pixels).pooler_output))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts.

        Args:
            texts: N texts.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """
        return encode_texts(self.model, self.processor, texts)

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Computes the pooled features of the image tower, before any projection.

        Args:
            images: N images.

        Returns:
            `backbone` (N, F), `expert` (N, E), the mean of the expert's local map, and `both` (N, F + E).
        """

        def read(pixels: Tensor) -> Tensor:
            vision = self.model.vision_model
            pooled: Tensor = vision.pooled_features(vision.encode(pixels), "both")
            return pooled

        both = self._by_batch(images, read).float()
        width = both.shape[1] - self.model.config.vision_config.local_size
        return {"backbone": both[:, :width], "expert": both[:, width:], "both": both}

    @torch.no_grad()
    def local_scores(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Computes the word-region similarity: the model's `logits_per_image` with `similarity="local"`.

        Where reports select the expert (`config.router="report"`), entry (i, j) uses the expert that text j selects;
        otherwise the image router selects it. The local maps of one batch of images and the word embeddings of all
        texts are in memory at a time.

        Args:
            images: N images.
            texts: M texts.

        Returns:
            (N, M) float32, on the CPU.
        """
        kept = []
        for start in range(0, len(texts), TEXT_BATCH_SIZE):
            text = self._text_features(texts[start : start + TEXT_BATCH_SIZE])
            width = max(1, int(text.word_mask.sum(dim=1).max()))
            text.word_embeds, text.word_mask = text.word_embeds[:, :width], text.word_mask[:, :width]
            kept.append(text)
        model, experts = self.model, None
        if model.config.router == "report":
            experts = self.route_texts(texts).argmax(dim=1).to(self.device)

        def score(pixels: Tensor) -> Tensor:
            if experts is not None:
                pair_ids = experts.expand(len(pixels), -1)
                vision = model.vision_model.encode(pixels)
                scores: Tensor = model.similarity_by_expert(vision, kept, pair_ids, kind="local")[0]
                return scores
            image = model.get_image_features(pixel_values=pixels)
            parts = [model.similarity(image.pooler_output, image.local_embeds, text, "local") for text in kept]
            return torch.cat(parts, dim=1)

        return self._by_batch(images, score, "local similarity")

    def route_images(self, images: Sequence[Any]) -> Tensor:
        """Computes the probabilities of the image router.

        Args:
            images: N images.

        Returns:
            (N, K) float32, on the CPU; rows sum to 1.
        """
        return self._by_batch(images, lambda pixels: self.model.route(pixel_values=pixels).probabilities)

    def route_texts(self, texts: Sequence[str]) -> Tensor:
        """Computes the probabilities of the report router.

        Args:
            texts: N texts.

        Returns:
            (N, K) float32, on the CPU; rows sum to 1.
        """

        def route(part: list[str]) -> Tensor:
            inputs = self.processor(text=part, return_tensors="pt").to(self.device)
            probabilities: Tensor = self.model.route(**inputs).probabilities
            return probabilities

        return encode_by_batch(texts, TEXT_BATCH_SIZE, route, "reports")

    def heatmaps(
        self,
        images: Sequence[Any],
        phrases: Sequence[str],
        references: Sequence[Sequence[str]] | None = None,
        modalities: Sequence[int] | None = None,
        sigma: float = 1.5,
    ) -> list[np.ndarray]:
        """Computes a heat-map of a phrase per image: the mean of `MedMoEModel.ground` over the phrase's words.

        Args:
            images: N images.
            phrases: N phrases, one per image.
            references: Sentences per image that report no finding, see `MedMoEModel.ground`; None without.
            modalities: N expert ids of this model, -100 where unknown; None lets the router select.
            sigma: Standard deviation of Gaussian smoothing, in cells of the map; a single hot cell is mostly noise.

        Returns:
            N float32 arrays (H, W), in the pixels of the image as it was read (DICOM: upright).
        """
        listed = [()] * len(images) if references is None else [tuple(sentences) for sentences in references]
        known = [UNKNOWN_MODALITY] * len(images) if modalities is None else [int(modality) for modality in modalities]
        heatmaps: list[np.ndarray] = [np.empty(0)] * len(images)
        # All images of a batch share a reference.
        with progress(None, "heat-maps", unit="image", total=len(images)) as bar:
            for reference in dict.fromkeys(listed):
                rows = [row for row, other in enumerate(listed) if other == reference]
                against = (
                    self.processor(text=list(reference), return_tensors="pt").to(self.device) if reference else None
                )
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    pictures = [self._read(images[row]) for row in batch]
                    texts = [phrases[row] for row in batch]
                    inputs = self.processor(images=pictures, text=texts, return_tensors="pt").to(self.device)
                    grounding = self.model.ground(**inputs, reference=against, modality=[known[row] for row in batch])
                    sizes = [_size(picture) for picture in pictures]
                    maps = self.processor.post_process_grounding(grounding, target_sizes=sizes, sigma=sigma)
                    for row, by_word in zip(batch, maps, strict=True):
                        heatmaps[row] = by_word.mean(dim=0).cpu().numpy()
                    bar.update(len(batch))
        return heatmaps

    def _read(self, image: Any) -> Any:
        """Reads an image so that its size is known before the processor resizes it."""
        processor = self.processor.image_processor
        fetched = processor.fetch_images(image)
        if is_medical_image(fetched):
            return read_medical_image(fetched, frame=processor.frame, window=processor.window)
        return fetched

    def _image_features(self, pixels: Tensor) -> Any:
        return self.model.get_image_features(pixel_values=pixels, local=False)

    @torch.no_grad()
    def _text_features(self, texts: Sequence[str]) -> Any:
        return self.model.get_text_features(**self.processor(text=list(texts), return_tensors="pt").to(self.device))

    def _by_batch(self, images: Sequence[Any], read: Callable[[Tensor], Tensor], what: str = "images") -> Tensor:
        def encode(batch: list[Any]) -> Tensor:
            return read(self.processor(images=batch, return_tensors="pt")["pixel_values"].to(self.device))

        return encode_by_batch(images, self.batch_size, encode, what)


def _size(picture: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = to_rgb(getattr(picture, "pixels", picture)).shape[-2:]
    return height, width
