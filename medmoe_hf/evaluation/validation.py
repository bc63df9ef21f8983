"""Measurements during training: losses, routing and retrieval on held-out pairs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.label_tasks import HeldOutTasks, score_tasks
from medmoe_hf.evaluation.metrics import accuracy, recall_at_k
from medmoe_hf.model.losses_medmoe import cosine_logits
from medmoe_hf.model.modalities_medmoe import UNKNOWN_MODALITY

RECALLS = (1, 5, 10)
LOSS_PARTS = ("loss", "loss_global", "loss_local", "loss_aux")


@torch.no_grad()
def validate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    counts: Sequence[bool] | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    zero_shot: HeldOutTasks | None = None,
) -> dict[str, float]:
    """Measures a dual encoder on batches of `ContrastiveCollator`.

    A contrastive loss depends on the number of pairs that are contrasted, and that of a single pair is always 0.
    Losses are therefore means over the batches of the largest size; a last batch that is not full counts for routing
    and retrieval only. Retrieval uses the global embeddings, among all pairs of all batches.

    Losses have the positives of training (`config.positives`): if several pairs are positives of each other, their
    minimum is the entropy of the targets.

    Args:
        model: A `MedMoEModel`; its training mode is restored afterwards.
        batches: At least one batch, on the model's device.
        counts: Whether each batch is measured; the others are computed too, as processes with sharded weights must do
            together. None measures all.
        gather: Function that gathers rows of all processes; None for one process.
        zero_shot: Classification tasks of the batches, on the model's device; None for none. The global embeddings
            are compared, as in `medmoe_hf.evaluation.zero_shot`.

    Returns:
        Means of `loss`, `loss_global`, `loss_local`, `loss_aux`; accuracies `routing_image` and (with a report router)
        `routing_report`, 0..1, if a label is known; `image_to_text_r1`, `text_to_image_r1`, `..._r5`, `..._r10`, 0..1,
        for k smaller than the number of pairs (recall@k among k pairs is always 1). Also `pairs`, the number of pairs;
        `loss_pairs` and `loss_batch_size`, the pairs that the losses are over and their batch size; and
        `routing_pairs`, the pairs with a modality. With `zero_shot`, the balanced accuracies `zero_shot:NAME` of each
        task, their mean `zero_shot`, and `zero_shot_pairs`, the pairs that belong to a task.

    Raises:
        ValueError: If no batch has two pairs.

    Example:
        ```python
        metrics = validate(model, [collator(samples)])
        print(metrics["loss"], metrics["image_to_text_r1"])
        ```
    """
    was_training = model.training
    model.eval()
    columns: dict[str, list[Tensor]] = {}
    try:
        for number, batch in enumerate(batches):
            output = model(**batch)
            kept = {"image": output.image_embeds, "text": output.text_embeds, "label": batch["modality_labels"]}
            kept["routing_image"] = output.router_logits.argmax(dim=-1)
            if output.report_router_logits is not None:
                kept["routing_report"] = output.report_router_logits.argmax(dim=-1)
            for name in LOSS_PARTS:
                kept[name] = output[name].view(1)
            kept["size"] = kept["label"].new_tensor([len(kept["label"])])
            if zero_shot is not None:
                kept["class"] = zero_shot.classes[number].to(kept["label"].device)
                kept["alone"] = _without_reports(model, batch, output)
            measured = counts is None or counts[number]
            for name, value in kept.items():
                columns.setdefault(name, []).append(value if measured else value[:0])
        texts = [] if zero_shot is None else [model(**text).pooler_output.float() for text in zero_shot.texts]
    finally:
        model.train(was_training)
    if not columns:
        raise ArgumentError("Nothing to evaluate: the stream of held-out samples is empty.")
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    if gather is not None:
        joined = {name: gather(column) for name, column in joined.items()}
    joined = {name: column.cpu() for name, column in joined.items()}
    sizes = joined["size"]
    largest, pairs = int(sizes.max()), int(sizes.sum())
    if largest < 2:
        raise ArgumentError("A contrastive loss needs batches of two or more pairs.")
    full = sizes == largest
    known = int((joined["label"] != UNKNOWN_MODALITY).sum())
    result: dict[str, float] = {name: joined[name].double()[full].mean().item() for name in LOSS_PARTS}
    if known:
        routed = [name for name in ("routing_image", "routing_report") if name in joined]
        result |= {name: accuracy(joined[name], joined["label"]) for name in routed}
    scores = cosine_logits(joined["image"], joined["text"], 1.0)
    result |= recall_at_k(scores, ks=[k for k in RECALLS if k < pairs])
    if zero_shot is not None and zero_shot.tasks:
        embeds = nn.functional.normalize(torch.cat(texts).cpu(), dim=-1)
        result |= score_tasks(zero_shot.tasks, joined["alone"], joined["class"], embeds)
    return result | {
        "pairs": pairs,
        "loss_pairs": int(sizes[full].sum()),
        "loss_batch_size": largest,
        "routing_pairs": known,
    }


def _without_reports(model: Any, batch: Mapping[str, Any], output: Any) -> Tensor:
    """Embeddings (b, D) of the images by the experts that the image router selects, as where there is no report."""
    inner = model
    while hasattr(inner, "module"):  # DDP and others
        inner = inner.module
    config = inner.config
    if config.router != "report" or config.vision_config.global_features == "backbone":
        embeds: Tensor = output.image_embeds
        return embeds
    # The report of an image tells its modality, and has selected the expert.
    return nn.functional.normalize(model(pixel_values=batch["pixel_values"]).pooler_output.float(), dim=-1)


def describe(metrics: Mapping[str, float], positives: str = "none") -> str:
    """Formats what `validate` measured as one line, each number with its number of pairs.

    Args:
        metrics: The result of `validate`.
        positives: The model's `config.positives`, which is named unless it is `"none"`.

    Returns:
        The line.
    """
    rule = "" if positives == "none" else f", positives by {positives.replace('_', ' ')}"
    parts = [
        f"held-out loss {metrics['loss']:.3f} ({metrics['loss_pairs']} pairs, {metrics['loss_batch_size']} at a time"
        f"{rule})"
    ]
    for names, of in (
        (("routing_image", "routing_report"), f"of {metrics['routing_pairs']}"),
        (("image_to_text_r1", "text_to_image_r1"), f"among {metrics['pairs']}"),
    ):
        if found := [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]:
            parts.append(f"{', '.join(found)} ({of})")
    if "zero_shot" in metrics:
        tasks = sum(name.startswith("zero_shot:") for name in metrics)
        parts.append(f"zero_shot {metrics['zero_shot']:.3f} ({tasks} tasks, {metrics['zero_shot_pairs']} pairs)")
    return ", ".join(parts)
