"""What a single number, or a few hundred pixels, tell about pneumonia in one source and in the other.

    python examples/experiments/real/shortcuts.py --data ../shared/real

For the chest X-rays of children (kermany-cxr) and of adults (nih-cxr14), `train` and `val` only: the AUROC of simple
statistics of the image, and of logistic regressions on 24x24 gray pixels that are trained on one source and tested on
the other, on the gray values and on their ranks within the image (which exposure and post-processing do not change);
and likewise on the pooled features of the bare ImageNet backbone, of images as they are, equalized, or equalized
without any detail below a 24th of their side.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from encode import imagenet_backbone
from manifest import read_manifest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Pixels = NDArray[np.float64]

SOURCES = {"children": "kermany-cxr", "adults": "nih-cxr14"}
SIDE = 24
NETWORK_SIDE = 160
STRENGTHS = (1e-5, 1e-4, 1e-3)


def read(folder: Path, source: str) -> tuple[Pixels, NDArray[np.bool_]]:
    """Returns images (N, 224, 224) with values in [0, 1], and whether each shows pneumonia."""
    rows = [row for row in read_manifest(folder) if row["source"] == source and row["split"] in ("train", "val")]
    images = []
    for row in rows:
        with Image.open(folder / row["file"]) as image:
            images.append(np.asarray(image.convert("L").resize((224, 224), Image.Resampling.BILINEAR)) / 255)
    return np.stack(images), np.array([row["label"] == "pneumonia" for row in rows])


def statistics(images: Pixels) -> dict[str, Pixels]:
    """Returns simple statistics (N,) of the inner part of each image."""
    inner = images[:, 40:184, 30:194]
    return {
        "mean gray value": inner.mean((1, 2)),
        "contrast (standard deviation)": inner.std((1, 2)),
        "sharpness (mean difference of neighbours)": np.abs(np.diff(inner, axis=2)).mean((1, 2)),
    }


def features(images: Pixels, ranks: bool) -> Pixels:
    """Returns (N, SIDE * SIDE) gray values, or their ranks within each image."""
    size = (SIDE, SIDE)
    small = [
        np.asarray(Image.fromarray((255 * image).astype(np.uint8)).resize(size, Image.Resampling.BOX))
        for image in images
    ]
    flat = np.stack(small).reshape(len(images), -1).astype(np.float64)
    return flat.argsort(axis=1).argsort(axis=1) / flat.shape[1] if ranks else flat / 255


def network_features(images: Pixels, ranks: bool, coarse: bool) -> Pixels:
    """Returns (N, 1280) features of the ImageNet backbone.

    Args:
        images: (N, 224, 224) in [0, 1].
        ranks: Replace gray values by their ranks within the image.
        coarse: Remove the detail below a 24th of the side first.
    """
    model, found = imagenet_backbone(), []
    with torch.inference_mode():
        for image in images:
            shown = Image.fromarray((255 * image).astype(np.uint8))
            if coarse:
                shown = shown.resize((SIDE, SIDE), Image.Resampling.BOX)
            shown = shown.resize((NETWORK_SIDE, NETWORK_SIDE), Image.Resampling.BICUBIC)
            gray = np.asarray(shown, dtype=np.float32) / 255
            if ranks:
                gray = (gray.argsort(axis=None).argsort() / gray.size).reshape(gray.shape).astype(np.float32)
            found.append(model((2 * torch.from_numpy(gray) - 1).expand(1, 3, -1, -1))[0].numpy())
    return np.stack(found).astype(np.float64)


def report(name: str, features_of: Mapping[str, Pixels], labels: Mapping[str, NDArray[np.bool_]]) -> None:
    """Prints how classifiers that are trained on one source fare on the other."""
    for trained, tested in (("children", "adults"), ("adults", "children")):
        scores = []
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
            model.fit(features_of[trained], labels[trained])
            scores.append(
                f"C={strength:g} {roc_auc_score(labels[tested], model.decision_function(features_of[tested])):.2f}"
            )
        print(f"{f'{name}, {trained} -> {tested}':<50}{', '.join(scores)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    folder = parser.parse_args(arguments).data
    found = {name: read(folder, source) for name, source in SOURCES.items()}
    values = {name: statistics(images) for name, (images, _) in found.items()}
    print("AUROC of pneumonia, N: " + ", ".join(f"{name} {len(labels)}" for name, (_, labels) in found.items()))
    for statistic in values["children"]:
        scores = [f"{name} {roc_auc_score(found[name][1], values[name][statistic]):.2f}" for name in found]
        print(f"{statistic:<45}{', '.join(scores)}")
    labels = {name: own for name, (_, own) in found.items()}
    for ranks in (False, True):
        what = f"{SIDE}x{SIDE} {'ranks' if ranks else 'gray values'}"
        report(what, {name: features(images, ranks) for name, (images, _) in found.items()}, labels)
    for what, ranks, coarse in (("as it is", False, False), ("equalized", True, False), ("coarse", True, True)):
        of_source = {name: network_features(images, ranks, coarse) for name, (images, _) in found.items()}
        report(f"network, {what}", of_source, labels)


if __name__ == "__main__":
    main()
