"""Encoder of open_clip's models, by the name of their architecture or from a folder such as BiomedCLIP's."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from medmoe_hf.errors import EncoderError, MissingPackageError, WeightsError
from medmoe_hf.inference.batching import (
    BATCH_SIZE,
    TEXT_BATCH_SIZE,
    default_device,
    encode_by_batch,
    read_picture,
    short_name,
    unit_length,
)

try:
    import open_clip
except ImportError:  # only models of open_clip need it
    open_clip = None

OPEN_CLIP = "open_clip:"
CONFIGURATION = "open_clip_config.json"
"""File by which a folder is known as open_clip's."""

_LOCAL, _HUB = "local-dir:", "hf-hub:"
# What torch says of tensors that a model has not, or has in another shape: the first line of many.
_MISFIT = re.compile(r"(?:Missing key|Unexpected key|size mismatch for)[^\n]*")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
# The text tower in the checkpoints of UniMed-CLIP, whose code is an older open_clip, and in open_clip.
_OLD_TEXT, _TEXT = "text_encoder.", "text."


class OpenClipEncoder:
    """Encoder of an open_clip model.

    Args:
        name: `open_clip:ARCH`, an architecture that open_clip knows, with random weights; `open_clip:ARCH:CHECKPOINT`,
            with one of open_clip's tags or a file (safetensors, or read by torch with `weights_only=True`: no code in
            it is run); `open_clip:local-dir:FOLDER` or `open_clip:hf-hub:ID`, which contain both. A FOLDER also
            contains the tokenizer, and the `config.json` of a text tower that is transformers'; without it,
            transformers looks for the text tower's name in its cache.
        batch_size: Images per batch.
        device: Device to run on; None selects a GPU if there is one.

    Raises:
        ImportError: Without the open_clip_torch package.
        EncoderError: For an unknown architecture or checkpoint, or a folder that lacks a file.

    Example:
        ```python
        encoder = OpenClipEncoder("open_clip:ViT-B-32:weights.safetensors")
        embeds = encoder.encode_images(["scan.png"])
        ```
    """

    def __init__(self, name: str, batch_size: int = BATCH_SIZE, device: str | None = None) -> None:
        if open_clip is None:
            raise MissingPackageError(
                'Models of open_clip need the package open_clip: pip install "medmoe_hf[compare]"'
            )
        self.batch_size, self.device = batch_size, default_device(device)
        rest = name.removeprefix(OPEN_CLIP)
        located = rest.startswith((_LOCAL, _HUB))
        architecture, _, checkpoint = (rest, "", "") if located else rest.partition(":")
        self.name = OPEN_CLIP + (f"{architecture}:{Path(checkpoint).name}" if checkpoint else short_name(rest))
        # Weights of a single tower would be downloaded: complete models only.
        settings: dict[str, Any] = {"device": self.device, "weights_only": True, "pretrained_text": False}
        try:
            renamed = None
            if rest.startswith(_LOCAL):
                folder = Path(rest.removeprefix(_LOCAL))
                if not folder.is_dir():
                    raise EncoderError(f"There is no folder {folder}.")
                settings |= _text_tower(folder)
                renamed = _renamed(_weights_file(folder))
                settings["load_weights"] = renamed is None
            # The same random weights in every run, without changing the caller's random state.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.model, _, self.transform = open_clip.create_model_and_transforms(
                    architecture,
                    pretrained=checkpoint or None,
                    require_pretrained=bool(checkpoint or located) and renamed is None,
                    **settings,
                )
            if renamed is not None:
                self.model.load_state_dict(renamed)
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except UnpicklingError as error:
            # The original message explains how to run the code in the file.
            raise EncoderError(
                f"{checkpoint or short_name(rest)} contains more than weights and is not loaded; use a safetensors "
                "file."
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, EncoderError):
                raise
            if example := _MISFIT.search(str(error)):
                raise WeightsError(
                    f"The weights of {checkpoint or short_name(rest)} do not fit the architecture that its name or "
                    f"folder states, {short_name(architecture)}: {' '.join(example[0].split())[:200]} ... "
                    "Name the architecture that the weights were trained with."
                ) from error
            raise EncoderError(
                f"open_clip cannot create {rest}: {error} Use open_clip:ARCH, open_clip:ARCH:CHECKPOINT "
                "(a tag or a file), open_clip:local-dir:FOLDER or open_clip:hf-hub:ID."
            ) from error
        self.model.eval()
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        self.preprocessing = f"{self.transform} {type(self.tokenizer).__name__} {self.tokenizer.context_length}"
        self.weights = "pretrained" if checkpoint or located else "random"

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Encodes images.

        Args:
            images: N paths (DICOM and NIfTI too), PIL images or arrays.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """

        def encode(batch: list[Any]) -> Tensor:
            pixels = torch.stack([self.transform(read_picture(image)) for image in batch]).to(self.device)
            return unit_length(self.model.encode_image(pixels))

        return encode_by_batch(images, self.batch_size, encode, "images")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts.

        Args:
            texts: N texts.

        Returns:
            (N, D) float32 of length 1, on the CPU.
        """
        return encode_by_batch(
            texts,
            TEXT_BATCH_SIZE,
            lambda batch: unit_length(self.model.encode_text(self.tokenizer(batch).to(self.device))),
            "texts",
        )

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Computes the features that a linear probe is fitted on.

        Args:
            images: N images.

        Returns:
            `embedding` (N, D): the image embeddings.
        """
        return {"embedding": self.encode_images(images)}


def _weights_file(folder: Path) -> Path:
    """The weights that open_clip reads from a folder."""
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise EncoderError(
            f"{folder} has {CONFIGURATION} but no weights: put them there as open_clip_model.safetensors, or as "
            "open_clip_pytorch_model.bin if they are a file of torch."
        )
    return Path(open_clip.factory._find_checkpoint_in_dir(folder))


def _text_tower(folder: Path) -> dict[str, Any]:
    """Settings by which a text tower of transformers is made of the folder's `config.json`: no name is looked up."""
    path = folder / CONFIGURATION
    try:
        text: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EncoderError(f"{path} does not describe a model of open_clip (model_cfg, text_cfg): {error}") from error
    if not text.get("hf_model_name"):
        return {}
    if not (folder / "config.json").is_file():
        if Path(text["hf_model_name"]).is_dir():
            return {}
        try:
            # from the cache, or from the Hub
            open_clip.hf_model.AutoConfig.from_pretrained(text["hf_model_name"])
        except (OSError, ValueError) as error:
            raise EncoderError(
                f"{folder} lacks the configuration of its text tower, and {text['hf_model_name']} cannot be reached: "
                f"copy the config.json of {text['hf_model_name']} into the folder."
            ) from error
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}}


def _renamed(path: Path) -> dict[str, Tensor] | None:
    """Weights of UniMed-CLIP by the names of open_clip; None for all other files, which open_clip reads itself."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            if not any(name.removeprefix("module.").startswith(_OLD_TEXT) for name in file.keys()):  # noqa: SIM118
                return None
    state: dict[str, Tensor] = open_clip.factory.load_state_dict(str(path), weights_only=True)
    if not any(name.startswith(_OLD_TEXT) for name in state):
        return None
    return {
        _TEXT + name.removeprefix(_OLD_TEXT) if name.startswith(_OLD_TEXT) else name: tensor
        for name, tensor in state.items()
        if not name.endswith("embeddings.position_ids")
    }
