"""Ablation of the design on synthetic phantoms, one change at a time.

    python examples/experiments/ablation.py [--output ablation] [--smoke]

Takes half an hour on two idle cores, or half a minute with --smoke.

The base is `plus` at the size of `tiny`, with a third stage and with a learned scale of the global loss (the preset
had one until this ablation). Each row undoes one difference between `plus` and `paper`, or removes one part of the
design. All runs of a seed see the same pairs in the same order for the same number of steps, and are evaluated on the
same phantoms of another seed.

Results: `ablation.json` (all runs, written after each run, so that an interrupted ablation resumes), `ablation.md`
(means over seeds with 95 % intervals by Student's t, and differences paired by seed), `ablation.png` (the differences)
and `scale_weights.png` (the scales that each expert attends to).

Phantoms are drawings. What helps here need not help on images of patients.

Some changes of `plus` have no row: a text tower that is not frozen (none is pretrained here), longer texts and padding
to squares (no phantom needs them), negatives from all processes (there is one process), and augmentation and the
optimizer (they belong to the training configuration, not to the model).
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate.utils import set_seed
from scipy import stats
from transformers import BertTokenizer, get_scheduler

from medmoe_hf.common.files import atomic_write
from medmoe_hf.data import MODALITIES, phantom_sample, phantom_vocabulary, zero_shot_prompts
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.evaluation import accuracy, recall_at_k
from medmoe_hf.model import (
    MedMoEConfig,
    MedMoEExpert,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
    register_expert,
)
from medmoe_hf.model.modeling_medmoe import MedMoETokenExpert
from medmoe_hf.training.optimizer import parameter_groups

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIDE = 64
UNSEEN_SEED = 1_000_000  # phantoms of the evaluation; the seeds of training start at 0
NONSENSE = "glorbix"
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 50, 0.05

# All widths are 96, because the model without projections needs equal widths. With 64 pixels three stages end in 4x4
# cells; a fourth would end in 2x2, compared with 7x7 at 224 pixels. The ratio of `temp1_regions` to the 16x16 regions
# is that of 361 to 56x56, so that temp1 is 6.2, as in `plus` at 224 pixels.
BASE: dict[str, Any] = {
    "word_pooling": "mean",
    "router": "both",
    "projection_dim": 64,
    "temp1": 4.0,
    "temp1_regions": 29,
    "temp2": 5.0,
    "temp3": 10.0,
    "learned_scale": True,
    "contrast": "mean",
    "aux_label_smoothing": 0.1,
    "aux_loss_weight": 0.5,
    "vision_config": {
        "pyramid_norm": True,
        "global_features": "both",
        "scale_attention_native": True,
        "router_norm": True,
        "local_size": 96,
        "swin_config": {"embed_dim": 24, "depths": (1, 1, 1), "num_heads": (1, 2, 4)},
    },
}


class LastStageExpert(MedMoEExpert):
    """An expert that reads the coarsest feature map only."""

    def __init__(self, config: Any, channels: Any) -> None:
        super().__init__(config, channels[-1:])

    def forward(self, feature_maps: Any, *args: Any) -> Any:
        return super().forward(feature_maps[-1:], *args)


class FlatExpert(MedMoETokenExpert):
    """An expert that aligns scales as token sequences, as the official code, and projects them as in the paper."""

    projection = staticmethod(MedMoEExpert.projection)


# `exist_ok`: a process may import this file more than once.
register_expert("last-stage", LastStageExpert, exist_ok=True)
register_expert("flat", FlatExpert, exist_ok=True)


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        label: Description of the difference.
        changes: Fields of `MedMoEConfig` that differ from the configuration of `against`.
        against: The row that this one is compared with; None for the base.
        undoes: Whether the row undoes a difference between `plus` and `paper`; the row `paper` undoes all of them.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    against: str | None = "plus"
    undoes: bool = False


def undo(label: str, changes: dict[str, Any], against: str = "plus") -> Variant:
    return Variant(label, changes, against, undoes=True)


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merge dictionaries recursively; later ones take precedence."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


_UNDONE = {
    "words-sum": undo("subwords summed, not averaged", {"word_pooling": "sum"}),
    "router-report": undo("the report selects the expert, not the image", {"router": "report"}),
    "global-backbone": undo("v_g: mean of the Swin only", {"vision_config": {"global_features": "backbone"}}),
    "no-projection": undo("no projections", {"projection_dim": None}, against="global-expert"),
    "temp1-fixed": undo("temp1 fixed at 4, independent of the number of regions", {"temp1_regions": None}),
    "scale-fixed": undo("scale of the global loss fixed at 10", {"learned_scale": False}),
    "contrast-sum": undo("the two directions of the losses summed, not averaged", {"contrast": "sum"}),
    "no-smoothing": undo("auxiliary loss without label smoothing", {"aux_label_smoothing": 0.0}),
    "aux-4": undo("weight of the auxiliary loss 4, not 0.5", {"aux_loss_weight": 4.0}),
    "no-pyramid-norm": undo("no LayerNorm on the pyramid", {"vision_config": {"pyramid_norm": False}}),
    "no-router-norm": undo("no LayerNorm in the routers", {"vision_config": {"router_norm": False}}),
    "attention-full": undo("scale attention at full resolution", {"vision_config": {"scale_attention_native": False}}),
}

VARIANTS: dict[str, Variant] = {
    "plus": Variant("small `plus` (the base)", BASE, against=None),
    "paper": Variant(
        "small `paper` (undoes all of the following)", merged(*(row.changes for row in _UNDONE.values()))
    ),
    **_UNDONE,
    "kept": Variant(
        "undoes all except projections and v_g from both",
        merged(*(row.changes for name, row in _UNDONE.items() if name not in ("global-backbone", "no-projection"))),
    ),
    "global-expert": Variant("v_g: mean of the expert's map only", {"vision_config": {"global_features": "expert"}}),
    "shared-expert": Variant("one shared expert of the same size", {"vision_config": {"shared_expert": True}}),
    # One expert with C = 132 has as many parameters as six with C = 48.
    "shared-wide": Variant(
        "one shared expert with the parameters of six",
        {"vision_config": {"shared_expert": True, "expert_hidden_size": 132}},
    ),
    "last-stage": Variant("experts read the last stage only", {"vision_config": {"expert_type": "last-stage"}}),
    # As in the official code, the scale attention reads the aligned scales too.
    "align-1d": Variant(
        "scales aligned in one dimension", {"vision_config": {"expert_type": "flat"}}, against="attention-full"
    ),
    "pooled-8": Variant("words compared with 8x8 pooled regions, not 16x16", {"local_loss_regions": 8}),
    "pooled-5": Variant("words compared with 5x5 pooled regions, not 16x16", {"local_loss_regions": 5}),
    "local-token": Variant("local loss `token`, not `gloria`", {"local_loss": "token"}),
}
SMOKE = ("plus", "paper", "shared-expert", "last-stage")


# Key in the results of a run -> heading; retrieval is the mean of both directions.
METRICS = {
    "retrieval_r1": "R@1",
    "retrieval_r5": "R@5",
    "zero_shot": "zero-shot",
    "pointing": "pointing",
    "pointing_nonsense": "nonsense",
    "routing_image": "routing",
    "step_ms": "ms per step",
}
PLOTTED = ("retrieval_r5", "zero_shot", "pointing", "step_ms")


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of a table share."""

    steps: int
    batch_size: int
    unseen: int


def piece_tokenizer() -> MedMoETokenizer:
    """Return a tokenizer of the phantoms' words that splits long words into subwords of four letters.

    Real vocabularies split medical words too; without subwords, summing and averaging them would not differ.
    """
    pieces = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789":
        pieces |= dict.fromkeys([letter, f"##{letter}"])
    for word in phantom_vocabulary():
        cuts = range(4, len(word), 4) if len(word) > 5 else ()
        pieces |= dict.fromkeys([word[:4] if cuts else word, *(f"##{word[cut : cut + 4]}" for cut in cuts)])
    return MedMoETokenizer.from_tokenizer(BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}), 64)


def new_model(name: str) -> tuple[MedMoEModel, MedMoEProcessor]:
    """Return the untrained model of a row, and its processor."""
    row = VARIANTS[name]
    changes = row.changes
    while row.against is not None:
        row = VARIANTS[row.against]
        changes = merged(row.changes, changes)
    tokenizer = piece_tokenizer()
    config = MedMoEConfig.from_preset("tiny", **merged(changes, {"text_config": {"vocab_size": len(tokenizer)}}))
    return MedMoEModel(config), MedMoEProcessor(MedMoEImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)


@lru_cache(maxsize=2)
def phantoms(seed: int, count: int) -> list[dict[str, Any]]:
    """Return the first samples of a stream, with preprocessed images; cached for all runs of a process."""
    collator = ContrastiveCollator(new_model("plus")[1])
    samples = (phantom_sample(seed, index, image_size=SIDE) for index in range(count))
    return [{**sample, "image": collator.prepare(sample["image"])} for sample in samples]


def batch_of(collator: ContrastiveCollator, samples: list[dict[str, Any]]) -> dict[str, Any]:
    return collator.normalize(collator.assemble(samples))


def run(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train and evaluate the model of a row."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pairs = phantoms(seed, settings.steps * settings.batch_size)
    set_seed(seed)
    model, processor = new_model(name)
    collator = ContrastiveCollator(processor)
    optimizer = new_optimizer(model)
    scheduler = get_scheduler("cosine", optimizer, min(WARMUP, settings.steps // 4), settings.steps)
    model.train()
    for start in range(0, len(pairs), settings.batch_size):
        step(model, optimizer, batch_of(collator, pairs[start : start + settings.batch_size]))
        scheduler.step()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **measure(model.eval(), collator, phantoms(UNSEEN_SEED, settings.unseen)),
    }


def new_optimizer(model: MedMoEModel) -> torch.optim.Optimizer:
    groups = parameter_groups(model, WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def step(model: MedMoEModel, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def time_steps(names: list[str], settings: Settings, rounds: int) -> dict[str, list[float]]:
    """Measure the CPU time of a training step on one thread, in ms per row and round.

    Rows take turns and only their own thread's time counts, so that other load affects all rows alike.
    """
    torch.set_num_threads(1)
    samples = phantoms(0, settings.steps * settings.batch_size)[: settings.batch_size]
    racers = []
    for name in names:
        model, processor = new_model(name)
        racers.append((name, model.train(), new_optimizer(model), batch_of(ContrastiveCollator(processor), samples)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1 + rounds):
        for name, model, optimizer, batch in racers:
            started = time.process_time()
            step(model, optimizer, batch)
            if number:  # the first warms up
                times[name].append(1000 * (time.process_time() - started))
    return times


@torch.no_grad()
def measure(model: MedMoEModel, collator: ContrastiveCollator, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure retrieval, zero-shot accuracy, pointing game, routing and scale weights on unseen phantoms.

    Similarities are those of the model's `forward`: where reports select experts, each prompt or caption selects its
    own. The score of a finding is the mean over its prompts.
    """
    batch = batch_of(collator, samples)
    labels, pixels = batch.pop("modality_labels"), batch["pixel_values"]
    output = model(**{**batch, "return_loss": False})
    recall = recall_at_k(output.logits_per_image, [sample["caption"] for sample in samples], ks=(1, 5))
    result: dict[str, Any] = dict(recall)
    for k in (1, 5):
        result[f"retrieval_r{k}"] = (recall[f"image_to_text_r{k}"] + recall[f"text_to_image_r{k}"]) / 2
    result["routing_image"] = accuracy(output.router_logits.argmax(dim=-1), labels)
    if output.report_router_logits is not None:
        result["routing_report"] = accuracy(output.report_router_logits.argmax(dim=-1), labels)

    zero_shot: list[float] = []
    hits: list[float] = []
    nonsense_hits: list[float] = []
    weights: list[torch.Tensor] = []
    for number, modality in enumerate(MODALITIES):
        rows = [row for row, sample in enumerate(samples) if sample["modality"] == number]
        prompts = zero_shot_prompts(modality)
        texts = collator.processor(
            text=[prompt for group in prompts.values() for prompt in group], return_tensors="pt"
        )
        logits = model(pixel_values=pixels[rows], **texts).logits_per_image
        by_finding = torch.stack([part.mean(dim=1) for part in logits.split([len(p) for p in prompts.values()], 1)], 1)
        truth = torch.tensor([list(prompts).index(samples[row]["finding"]) for row in rows])
        zero_shot.append(accuracy(by_finding.argmax(dim=1), truth))

        found = [row for row in rows if samples[row]["finding_word"]]
        normal = collator.processor(text=prompts["normal"], return_tensors="pt")
        for words, kept in (
            ([samples[row]["finding_word"] for row in found], hits),
            ([NONSENSE] * len(found), nonsense_hits),
        ):
            text = collator.processor(text=words, return_tensors="pt")
            grounding = model.ground(pixels[found], **text, reference=normal, modality=modality)
            maps = collator.processor.post_process_grounding(grounding, sigma=1.5)
            kept += [is_hit(by_word[0], samples[row]["box"]) for by_word, row in zip(maps, found, strict=True)]
        weights.append(model.get_image_features(pixels[rows], modality=modality).scale_weights.mean(dim=(0, 2, 3)))
    result["zero_shot_by_modality"] = dict(zip(MODALITIES, zero_shot, strict=True))
    result["zero_shot"] = statistics.mean(zero_shot)
    result["pointing"] = statistics.mean(hits)
    result["pointing_nonsense"] = statistics.mean(nonsense_hits)
    # Mean weight of each scale per expert, finest first.
    result["scale_weights"] = {name: one.tolist() for name, one in zip(MODALITIES, weights, strict=True)}
    return result


def is_hit(heatmap: torch.Tensor, box: list[float]) -> float:
    """Return 1.0 if the hottest pixel of (H, W) is inside the box, else 0.0."""
    y, x = divmod(int(heatmap.argmax()), heatmap.shape[1])
    left, top, right, bottom = box
    return float(left <= x < right and top <= y < bottom)


def chances(settings: Settings) -> dict[str, float]:
    """Return the chance level of each metric."""
    samples = phantoms(UNSEEN_SEED, settings.unseen)
    boxes = [sample["box"] for sample in samples if sample["box"]]
    area = statistics.mean((right - left) * (bottom - top) / SIDE**2 for left, top, right, bottom in boxes)
    return {
        "retrieval_r1": 1 / settings.unseen,
        "retrieval_r5": 5 / settings.unseen,
        "zero_shot": statistics.mean(1 / len(zero_shot_prompts(modality)) for modality in MODALITIES),
        "pointing": area,
        "pointing_nonsense": area,
        "routing_image": 1 / len(MODALITIES),
    }


# Tables and figures


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval (Student's t); the half-width of one value is NaN."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def by_seed(results: dict[str, Any], name: str) -> dict[int, Any]:
    return {run["seed"]: run for run in results["runs"].values() if run["variant"] == name}


def values(results: dict[str, Any], name: str, metric: str) -> dict[int, float]:
    """Return the values of a row: one per seed, or one per round for the time of a step."""
    if metric == "step_ms":
        return dict(enumerate(results["step_ms"][name]))
    return {seed: run[metric] for seed, run in by_seed(results, name).items()}


def differences(results: dict[str, Any], name: str, metric: str) -> list[float]:
    """Return the row minus the one it is compared with, for each seed (or round) that both have."""
    against = VARIANTS[name].against
    if against is None or not by_seed(results, against):
        return []
    own, other = values(results, name, metric), values(results, against, metric)
    return [own[key] - other[key] for key in sorted(own.keys() & other.keys())]


def format_value(metric: str, value: float, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.{0 if metric == 'step_ms' else 3}f}"


def format_interval(mean: float, half: float, metric: str = "") -> str:
    return format_value(metric, mean) + ("" if np.isnan(half) else f" ± {format_value(metric, half)}")


def table(results: dict[str, Any], settings: Settings) -> str:
    """Return the results as Markdown."""
    names = [name for name in VARIANTS if by_seed(results, name)]
    seeds = {run["seed"] for run in results["runs"].values()}
    chance = chances(settings)
    head = " | ".join(METRICS.values())
    rule = "|---|---|" + "---|" * len(METRICS)
    lines = [
        "# Ablation on synthetic phantoms",
        "",
        "Drawings, not patients: the results hold for an artificial task only.",
        "",
        f"Seeds: {len(seeds)}. Every row: {settings.steps} steps of {settings.batch_size} pairs, evaluated on "
        f"{settings.unseen} phantoms of another seed. R@k: mean of both directions. Pointing: how often the hottest "
        "pixel of the map of the finding's word, with normal reports as reference, is inside the finding's box; "
        "nonsense: the same for a made-up word. Routing: accuracy of the image router. ms per step: CPU time of a "
        f"training step on one thread; rows take turns in {len(results['step_ms']['plus'])} rounds.",
        "",
        "## Means over seeds, ± half-width of the 95 % interval (Student's t)",
        "",
        f"| | parameters | {head} |",
        rule,
        "| chance | | "
        + " | ".join(format_value(key, chance[key]) if key in chance else "" for key in METRICS)
        + " |",
    ]
    for name in names:
        own = by_seed(results, name)
        cells = [
            format_interval(*interval(list(values(results, name, metric).values())), metric) for metric in METRICS
        ]
        parameters = next(iter(own.values()))["parameters"]
        lines.append(f"| `{name}`: {VARIANTS[name].label} | {parameters / 1e6:.2f} M | {' | '.join(cells)} |")
    lines += [
        "",
        "## Differences to the row compared with, paired by seed (time: by round)",
        "",
        "In brackets the 95 % interval; bold where it excludes 0. One in twenty would do so by chance alone.",
        "",
        f"| | compared with | {head} |",
        rule,
    ]
    for name in names:
        cells = []
        for metric in METRICS:
            changes = differences(results, name, metric)
            if not changes:
                continue
            mean, half = interval(changes)
            text = format_value(metric, mean, sign=True)
            if len(changes) > 1:
                low, high = (format_value(metric, bound, sign=True) for bound in (mean - half, mean + half))
                text += f" [{low}, {high}]"
            cells.append(f"**{text}**" if abs(mean) > half else text)
        if cells:
            lines.append(f"| `{name}`: {VARIANTS[name].label} | `{VARIANTS[name].against}` | {' | '.join(cells)} |")
    lines += ["", "## Scale weights of the base: the scales that each expert attends to", ""]
    base = by_seed(results, "plus")
    if base:
        scales = len(next(iter(base.values()))["scale_weights"][MODALITIES[0]])
        titles = [f"{SIDE // (4 * 2**scale)}x{SIDE // (4 * 2**scale)} cells" for scale in range(scales)]
        lines += [f"| expert | {' | '.join(titles)} |", "|---|" + "---|" * scales]
        for modality in MODALITIES:
            columns = zip(*(run["scale_weights"][modality] for run in base.values()), strict=True)
            cells = [format_interval(*interval(list(column))) for column in columns]
            lines.append(f"| {modality} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_differences(results: dict[str, Any], path: Path) -> None:
    """Draw a panel per plotted metric and a line per row: the seeds, their mean and its interval."""
    names = [name for name in VARIANTS if differences(results, name, "zero_shot")]
    figure, axes = plt.subplots(
        1, len(PLOTTED), figsize=(15, 1.6 + 0.34 * len(names)), sharey=True, layout="constrained"
    )
    for axis, metric in zip(axes, PLOTTED, strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for y, name in enumerate(names):
            changes = differences(results, name, metric)
            mean, half = interval(changes)
            colour = "tab:blue" if VARIANTS[name].undoes or name == "paper" else "tab:orange"
            axis.plot(changes, [y] * len(changes), "o", color=colour, alpha=0.35, markersize=4)
            axis.errorbar(
                mean, y, xerr=None if np.isnan(half) else half, fmt="D", color=colour, capsize=3, markersize=5
            )
        axis.set_title(f"{METRICS[metric]}: {'lower' if metric == 'step_ms' else 'higher'} is better", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    labels = [VARIANTS[name].label + ("" if VARIANTS[name].against == "plus" else " *") for name in names]
    axes[0].set_yticks(range(len(names)), [label.replace("`", "") for label in labels], fontsize=9)
    axes[0].invert_yaxis()
    figure.suptitle(
        "Synthetic phantoms: difference to small plus, paired by seed, with 95 % intervals (*: to the row named "
        "in the table)\nblue: undoes a difference between plus and paper; orange: changes a part of the design",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scale_weights(results: dict[str, Any], path: Path) -> None:
    """Draw the base's mean scale weights per expert as bars, and each seed as a dot."""
    base = list(by_seed(results, "plus").values())
    weights = np.array([[run["scale_weights"][modality] for modality in MODALITIES] for run in base])  # seed, K, S
    scales = weights.shape[2]
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for scale in range(scales):
        positions = np.arange(len(MODALITIES)) + (scale - (scales - 1) / 2) * 0.8 / scales
        cells = SIDE // (4 * 2**scale)
        axis.bar(positions, weights[:, :, scale].mean(axis=0), 0.75 / scales, label=f"{cells}x{cells} cells")
        axis.plot(np.tile(positions, len(base)), weights[:, :, scale].ravel(), "k.", markersize=4)
    axis.axhline(1 / scales, color="black", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(MODALITIES)), MODALITIES)
    axis.set_ylabel("mean attention")
    figure.legend(title="scale", ncols=scales, loc="outside lower center", fontsize=9)
    axis.set_title("Synthetic phantoms: the scales that each expert attends to (dots: seeds)", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("ablation"), help="folder for all results")
    parser.add_argument("--steps", type=int, default=300, help="training steps per run")
    parser.add_argument("--seeds", type=int, default=3, help="runs per row")
    parser.add_argument("--unseen", type=int, default=480, help="number of phantoms to evaluate on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel runs, of one thread each")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="names of rows; by default all")
    parser.add_argument("--smoke", action="store_true", help="a few rows and steps, to check that the program works")
    arguments = parser.parse_args()
    names, seeds, rounds = arguments.only or list(VARIANTS), arguments.seeds, 10
    settings = Settings(arguments.steps, 24, arguments.unseen)
    if arguments.smoke:
        names, seeds, rounds = list(SMOKE), 1, 2
        settings = Settings(4, 24, 60)
    content: dict[str, Any] = {"synthetic": True, "settings": vars(settings), "runs": {}}
    path = arguments.output / "ablation.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != content["settings"]:
            parser.error(
                f"{path} holds runs with {found['settings']}, not {content['settings']}; choose another --output"
            )
        content = found
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # Ordered by seed, because a process caches the phantoms of a seed.
    wanted = [(name, seed) for seed in range(seeds) for name in names if f"{name}/{seed}" not in content["runs"]]
    with ProcessPoolExecutor(max(1, min(arguments.jobs, len(wanted))), mp_context=get_context("spawn")) as pool:
        tasks = {pool.submit(run, name, seed, settings): (name, seed) for name, seed in wanted}
        for number, task in enumerate(as_completed(tasks), start=1):
            name, seed = tasks[task]
            one = {"variant": name, "seed": seed, **task.result()}
            content["runs"][f"{name}/{seed}"] = one
            write(path, json.dumps(content, indent=1) + "\n")
            measured = ", ".join(f"{title} {one[key]:.3f}" for key, title in METRICS.items() if key in one)
            print(
                f"{time.monotonic() - started:5.0f} s  {number}/{len(wanted)}  {name}, {seed}: {measured}", flush=True
            )
    # Measured after all runs have finished, so that they do not share the machine.
    content["step_ms"] = time_steps([name for name in VARIANTS if by_seed(content, name)], settings, rounds)
    write(path, json.dumps(content, indent=1) + "\n")
    text = table(content, settings)
    write(arguments.output / "ablation.md", text)
    draw_differences(content, arguments.output / "ablation.png")
    draw_scale_weights(content, arguments.output / "scale_weights.png")
    print(f"\n{text}\nWritten to {arguments.output}: ablation.json, ablation.md, ablation.png, scale_weights.png")


if __name__ == "__main__":
    main()
