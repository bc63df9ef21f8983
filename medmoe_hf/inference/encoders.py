"""One small interface by which every model is scored: MedMoE, its exports, transformers' dual encoders, open_clip's.

Shapes: N images or texts, M texts, D the width of a model's shared space, K experts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, PretrainedConfig

from medmoe_hf.common.console import progress
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import ArgumentError, EncoderError, MissingPackageError
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.model.image_processing_medmoe import MedMoEImageProcessor, MedMoEImageProcessorPil, to_rgb
from medmoe_hf.model.medical_images_medmoe import is_medical_image, read_medical_image
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY, modality_id

try:
    import onnxruntime
except ImportError:  # only models named "onnx:..." need it
    onnxruntime = None

try:
    import open_clip
except ImportError:  # only models named "open_clip:..." need it
    open_clip = None

BATCH_SIZE = 32
_TEXTS_AT_ONCE = 256
OPEN_CLIP, ONNX = "open_clip:", "onnx:"
_OPEN_CLIP_PLACES = ("local-dir:", "hf-hub:")

SCORES = ("global", "local", "mean")
"""What likens an image to a text: the cosine of their embeddings times the model's scale, its word-region similarity,
or the mean of the two."""


class Encoder(Protocol):
    """What a model must do to be scored.

    Attributes:
        name: what tables call it.
        logit_scale: by which it multiplies cosines before a softmax.
        preprocessing: its settings for images and texts, in words; only their hash is written down.
        weights: where its weights come from, in a word.
    """

    name: str
    logit_scale: float
    preprocessing: str
    weights: str

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """(N, D) float32 of length 1 on the CPU; of paths (DICOM and NIfTI too), PIL images or arrays."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 of length 1 on the CPU."""

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """What a linear probe may read, each (N, width) float32, by name."""


def load_encoder(name: str | Path, batch_size: int = BATCH_SIZE, device: str | None = None) -> Encoder:
    """The encoder for a model.

    Args:
        name: folder or Hub id of a MedMoE (whose code is then run, as with `trust_remote_code=True`) or of any
            transformers model with `get_image_features` and `get_text_features` (CLIP, SigLIP; no code from its folder
            is run); `open_clip:ARCH[:CHECKPOINT]`, see `OpenClipEncoder`; or `onnx:FOLDER`, a MedMoE that
            `medmoe export` has written.
        batch_size: images in one pass.
        device: where it runs; None: a GPU, if there is one.

    Raises:
        EncoderError: for another kind of model, a folder that lacks weights, or no such folder or id.
    """
    if str(name).startswith(OPEN_CLIP):
        return OpenClipEncoder(str(name), batch_size, device)
    if str(name).startswith(ONNX):
        return ExportedEncoder(str(name).removeprefix(ONNX), batch_size)
    try:
        refuse_missing_folder(name, bare_ids=True)
    except FileNotFoundError as error:
        raise EncoderError(str(error)) from None
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"{name} is neither the folder of a transformers model nor a Hub id that can be reached from here; name "
            "one of these, open_clip:ARCH[:CHECKPOINT], or onnx:FOLDER for what `medmoe export` wrote."
        ) from error
    kind = MedMoEEncoder if config.get("model_type") == "medmoe" else TransformersEncoder
    return kind(name, batch_size, device)


def scores_of(encoder: Encoder, scores: Sequence[str]) -> list[str]:
    """Those of `SCORES` that are asked for and that an encoder has.

    Raises:
        ValueError: for an unknown score.
    """
    unknown = [score for score in scores if score not in SCORES]
    if unknown:
        raise ArgumentError(f"There is no score {unknown[0]}, but {', '.join(SCORES)}.")
    return [score for score in scores if score == "global" or isinstance(encoder, MedMoEEncoder)]


def read_picture(image: Any) -> Image.Image:
    """Any image as RGB, by the rules of MedMoE's own processor: for models whose processor knows no DICOM.

    Args:
        image: a path, bytes, a PIL image, or an array (H, W), (H, W, C) or (C, H, W).
    """
    fetched = MedMoEImageProcessorPil().fetch_images(image)
    pixels = read_medical_image(fetched).pixels if is_medical_image(fetched) else fetched
    return Image.fromarray(to_rgb(pixels).round().to(torch.uint8).permute(1, 2, 0).numpy())


class MedMoEEncoder:
    """A MedMoE: its towers, and what only it has: local similarity, routers and heat-maps.

    Args:
        folder: folder or Hub id.
        batch_size: images in one pass.
        device: where it runs; None: a GPU, if there is one.
    """

    def __init__(self, folder: str | Path, batch_size: int = BATCH_SIZE, device: str | None = None) -> None:
        self.name, self.batch_size, self.device = _short_name(folder), batch_size, _device(device)
        self.model = _load(folder, self.device, trust_remote_code=True)
        with explain_loading(folder):
            self.processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.logit_scale = float(self.model.global_scale)
        self.preprocessing = _settings(self.processor)
        self.weights = "pretrained"

    @property
    def modalities(self) -> list[str]:
        """What the experts are for, in the order of their ids."""
        return list(self.model.config.modalities.values())

    @property
    def has_report_router(self) -> bool:
        return self.model.report_router is not None

    def expert_ids(self, modalities: Sequence[int] | np.ndarray) -> np.ndarray:
        """Ids of `medmoe_hf.data.MODALITIES` as ids of this model's experts, (N,); -100 where it has none."""
        own = {UNKNOWN_MODALITY: UNKNOWN_MODALITY}
        for known, name in enumerate(MODALITIES):
            try:
                own[known] = modality_id(name, self.modalities)
            except ValueError:
                own[known] = UNKNOWN_MODALITY
        return np.array([own[known] for known in modalities], dtype=np.int64)

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """(N, D); where the global embedding needs an expert, that of the image router."""
        return self._by_batch(images, lambda pixels: _unit(self._image_features(pixels).pooler_output))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D)."""
        return encode_texts(self.model, self.processor, texts)

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """`backbone` and `expert` (the mean of its local map), before any projection, and `both` side by side."""

        def read(pixels: Tensor) -> Tensor:
            vision = self.model.vision_model
            return vision.pooled_features(vision.encode(pixels), "both")

        both = self._by_batch(images, read).float()
        width = both.shape[1] - self.model.config.vision_config.local_size
        return {"backbone": both[:, :width], "expert": both[:, width:], "both": both}

    @torch.no_grad()
    def local_scores(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """The model's own word-region similarity, (N, M) float32: its `logits_per_image` with `similarity="local"`.

        Where reports select the expert (`config.router="report"`), entry (i, j) reads image i with the expert that
        text j selects; else with the expert of the image router. An image's local map lives for one batch, while the
        words of all texts are kept.
        """
        kept = []
        for part in _parts(texts):
            text = self._text_features(part)
            width = max(1, int(text.word_mask.sum(dim=1).max()))
            text.word_embeds, text.word_mask = text.word_embeds[:, :width], text.word_mask[:, :width]
            kept.append(text)
        model, experts = self.model, None
        if model.config.router == "report":
            experts = self.route_texts(texts).argmax(dim=1).to(self.device)

        def score(pixels: Tensor) -> Tensor:
            if experts is not None:
                pair_ids = experts.expand(len(pixels), -1)
                return model.similarity_by_expert(model.vision_model.encode(pixels), kept, pair_ids, kind="local")[0]
            image = model.get_image_features(pixel_values=pixels)
            parts = [model.similarity(image.pooler_output, image.local_embeds, text, "local") for text in kept]
            return torch.cat(parts, dim=1)

        return self._by_batch(images, score, "local similarity")

    def route_images(self, images: Sequence[Any]) -> Tensor:
        """The image router's probabilities (N, K)."""
        return self._by_batch(images, lambda pixels: self.model.route(pixel_values=pixels).probabilities)

    def route_texts(self, texts: Sequence[str]) -> Tensor:
        """The report router's probabilities (N, K)."""

        def route(part: list[str]) -> Tensor:
            return self.model.route(**self.processor(text=part, return_tensors="pt").to(self.device)).probabilities

        return _encode_by_batch(texts, _TEXTS_AT_ONCE, route, "reports")

    def heatmaps(
        self,
        images: Sequence[Any],
        phrases: Sequence[str],
        references: Sequence[Sequence[str]] | None = None,
        modalities: Sequence[int] | None = None,
        sigma: float = 1.5,
    ) -> list[np.ndarray]:
        """Where in each image its phrase is, as `ground` says: the mean over the phrase's words.

        Args:
            phrases: one for each image.
            references: for each image sentences that find nothing, see `MedMoEModel.ground`; None: without.
            modalities: expert ids of this model, -100 where unknown; None: the router's.
            sigma: Gaussian smoothing in cells of the map; a single hot cell is mostly noise.

        Returns:
            (H, W) float32 each, in the pixels of the image as it was read (DICOM: upright).
        """
        listed = [()] * len(images) if references is None else [tuple(sentences) for sentences in references]
        known = [UNKNOWN_MODALITY] * len(images) if modalities is None else [int(modality) for modality in modalities]
        heatmaps: list[np.ndarray] = [np.empty(0)] * len(images)
        # The reference is one for a whole batch.
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
        """A picture that the processor takes and whose size is known."""
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

        return _encode_by_batch(images, self.batch_size, encode, what)


class TransformersEncoder:
    """A transformers model with `get_image_features` and `get_text_features`: CLIP, SigLIP and their kin.

    Args:
        folder: folder or Hub id, with a processor. No code in it is run.
        batch_size: images in one pass.
        device: where it runs; None: a GPU, if there is one.

    Raises:
        EncoderError: for a model without these two methods.
    """

    def __init__(self, folder: str | Path, batch_size: int = BATCH_SIZE, device: str | None = None) -> None:
        self.name, self.batch_size, self.device = _short_name(folder), batch_size, _device(device)
        self.model = _load(folder, self.device, trust_remote_code=False)
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(self.model, method):
                raise EncoderError(f"{folder}: {type(self.model).__name__} has no {method}; it is no dual encoder.")
        with explain_loading(folder):
            self.processor: Any = AutoProcessor.from_pretrained(folder)
        scale = getattr(self.model, "logit_scale", None)
        self.logit_scale = 1.0 if scale is None else float(scale.detach().exp())
        config = self.model.config
        length = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)
        # SigLIP has seen nothing but texts padded to its full length.
        padding = "max_length" if config.model_type.startswith("siglip") else True
        self.text_settings = {"padding": padding, "truncation": True, "max_length": length}
        self.preprocessing = f"{_settings(self.processor)} {self.text_settings}"
        self.weights = "pretrained"

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """(N, D)."""

        def encode(batch: list[Any]) -> Tensor:
            pictures = [read_picture(image) for image in batch]
            inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
            return _unit(_pooled(self.model.get_image_features(**inputs)))

        return _encode_by_batch(images, self.batch_size, encode, "images")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D)."""

        def encode(batch: list[str]) -> Tensor:
            inputs = self.processor(text=batch, return_tensors="pt", **self.text_settings).to(self.device)
            return _unit(_pooled(self.model.get_text_features(**inputs)))

        return _encode_by_batch(texts, _TEXTS_AT_ONCE, encode, "texts")

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """`embedding`: that of the shared space."""
        return {"embedding": self.encode_images(images)}


class OpenClipEncoder:
    """A model of open_clip.

    Args:
        name: `open_clip:ARCH`, an architecture that open_clip knows, with random weights; `open_clip:ARCH:CHECKPOINT`,
            a tag of open_clip's or a file (safetensors, or read by torch with `weights_only=True`: nothing in it is
            run); `open_clip:local-dir:FOLDER` or `open_clip:hf-hub:ID`, which hold both.
        batch_size: images in one pass.
        device: where it runs; None: a GPU, if there is one.

    Raises:
        ImportError: without the open_clip_torch package.
        EncoderError: for an unknown architecture or checkpoint.
    """

    def __init__(self, name: str, batch_size: int = BATCH_SIZE, device: str | None = None) -> None:
        if open_clip is None:
            raise MissingPackageError(
                'Models named open_clip:... need the package open_clip: pip install "medmoe_hf[compare]"'
            )
        self.batch_size, self.device = batch_size, _device(device)
        rest = name.removeprefix(OPEN_CLIP)
        placed = rest.startswith(_OPEN_CLIP_PLACES)
        architecture, _, checkpoint = (rest, "", "") if placed else rest.partition(":")
        self.name = OPEN_CLIP + (f"{architecture}:{Path(checkpoint).name}" if checkpoint else _short_name(rest))
        try:
            # Random weights are the same in every run, and nobody else's random numbers change.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.model, _, self.transform = open_clip.create_model_and_transforms(
                    architecture,
                    pretrained=checkpoint or None,
                    device=self.device,
                    weights_only=True,
                    # Whole models only: a tower's own weights would be fetched from elsewhere.
                    pretrained_text=False,
                )
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except UnpicklingError as error:
            # Its own message tells how to run what is in the file.
            raise EncoderError(
                f"{checkpoint} holds more than weights and is not read; get it as safetensors."
            ) from error
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            raise EncoderError(
                f"open_clip cannot make {rest}: {error} Name it open_clip:ARCH, open_clip:ARCH:CHECKPOINT "
                "(a tag or a file), open_clip:local-dir:FOLDER or open_clip:hf-hub:ID."
            ) from error
        self.model.eval()
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        self.preprocessing = f"{self.transform} {type(self.tokenizer).__name__} {self.tokenizer.context_length}"
        self.weights = "pretrained" if checkpoint or placed else "random"

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """(N, D)."""

        def encode(batch: list[Any]) -> Tensor:
            pixels = torch.stack([self.transform(read_picture(image)) for image in batch]).to(self.device)
            return _unit(self.model.encode_image(pixels))

        return _encode_by_batch(images, self.batch_size, encode, "images")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D)."""
        return _encode_by_batch(
            texts,
            _TEXTS_AT_ONCE,
            lambda batch: _unit(self.model.encode_text(self.tokenizer(batch).to(self.device))),
            "texts",
        )

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """`embedding`: that of the shared space."""
        return {"embedding": self.encode_images(images)}


class ExportedEncoder:
    """A MedMoE that `medmoe export` has written as ONNX, with the expert of the image router for each image.

    Args:
        folder: with `export.json`. Images are read and resized by MedMoE's own processor, set as this file says.
        batch_size: images in one pass.

    Raises:
        ImportError: without the onnxruntime package.
        EncoderError: for another folder, or one in another format.
    """

    def __init__(self, folder: str | Path, batch_size: int = BATCH_SIZE) -> None:
        if onnxruntime is None:
            raise MissingPackageError('Models named onnx:... need onnxruntime: pip install "medmoe_hf[export]".')
        self.name, self.batch_size = ONNX + _short_name(folder), batch_size
        try:
            self.facts = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
            files = {tower: Path(folder) / self.facts[tower]["file"] for tower in ("image_tower", "text_tower")}
            images, self.modalities = self.facts["images"], list(self.facts["modalities"])
            self.logit_scale = float(self.facts["similarity"]["scale"])
            self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EncoderError(f"{folder} is no folder that `medmoe export` has written: {error}") from error
        if any(file.suffix != ".onnx" for file in files.values()):
            raise EncoderError(f"{folder} is no ONNX; export the model with --format onnx.")
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
        self.preprocessing = f"{images} {fingerprint(self.tokenizer.to_str())}"
        self.weights = "exported"

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """(N, D); where the global embedding needs an expert, that of the image router."""

        def encode(batch: list[Any]) -> Tensor:
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            return self._run("image_tower", "image_embeds", pixel_values=pixels.numpy())

        return _encode_by_batch(images, self.batch_size, encode, "images")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D)."""

        def encode(batch: list[str]) -> Tensor:
            encodings = self.tokenizer.encode_batch(batch)
            given = {
                "input_ids": [encoding.ids for encoding in encodings],
                "attention_mask": [encoding.attention_mask for encoding in encodings],
                "word_ids": [[-1 if word is None else word for word in encoding.word_ids] for encoding in encodings],
            }
            arrays = {name: np.array(rows, dtype=np.int64) for name, rows in given.items()}
            return self._run("text_tower", "text_embeds", **arrays)

        return _encode_by_batch(texts, _TEXTS_AT_ONCE, encode, "texts")

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """`embedding`: that of the shared space."""
        return {"embedding": self.encode_images(images)}

    def _run(self, tower: str, output: str, **inputs: np.ndarray) -> Tensor:
        (found,) = self.towers[tower].run([output], inputs)
        return torch.from_numpy(found)


def fingerprint(text: str) -> str:
    """Twelve digits that change when a text does."""
    return sha256(text.encode()).hexdigest()[:12]


def _load(folder: str | Path, device: str, trust_remote_code: bool) -> Any:
    with explain_loading(folder):
        model, info = AutoModel.from_pretrained(
            folder, trust_remote_code=trust_remote_code, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise EncoderError(
            f"{folder} lacks {len(missing)} tensors of a {type(model).__name__} ({missing[0]}, ...), and random ones "
            "would be scored. It needs the folder of a whole dual encoder, not of a classifier or an adapter."
        )
    return model.eval().to(device)


def _settings(processor: Any) -> str:
    """All that a processor does to images and texts, whatever it was loaded from."""
    images, tokenizer = processor.image_processor.to_dict(), processor.tokenizer
    vocabulary = fingerprint(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else type(tokenizer).__name__
    kept = {key: str(value) for key, value in sorted(images.items()) if "name" not in key and key != "auto_map"}
    return f"{kept} {vocabulary} {getattr(processor, 'max_length', None)} transformers {transformers.__version__}"


def _short_name(folder: str | Path) -> str:
    """A folder's last two parts, as a Hub id has: what stands before them may name a person."""
    return "/".join(Path(folder).parts[-2:])


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _size(picture: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = to_rgb(getattr(picture, "pixels", picture)).shape[-2:]
    return height, width


def _unit(embeds: Tensor) -> Tensor:
    return nn.functional.normalize(embeds.float(), dim=-1)


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        yield texts[start : start + _TEXTS_AT_ONCE]


@torch.no_grad()
def _encode_by_batch(items: Sequence[Any], size: int, encode: Callable[[list[Any]], Tensor], what: str) -> Tensor:
    parts = []
    with progress(None, what, unit="it", total=len(items)) as bar:
        for start in range(0, len(items), size):
            parts.append(encode(list(items[start : start + size])).cpu())
            bar.update(len(parts[-1]))
    return torch.cat(parts)
