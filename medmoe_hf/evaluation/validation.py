"""What is measured while training: losses, routing and retrieval on held-out pairs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medmoe_hf.errors import ArgumentError
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
) -> dict[str, float]:
    """Measures a dual encoder on batches of `ContrastiveCollator`.

    A contrastive loss depends on how many pairs are told from each other, and that of a lone pair is 0 whatever the
    model. So losses are of the batches of the largest size alone, and every pair in these weighs the same; the rest, a
    last batch that is not full, counts for routing and retrieval. Retrieval is by the global embeddings, among all
    pairs of all batches.

    Losses have the positives of training (`config.positives`): where several pairs mean the same, they fall no lower
    than the entropy of the targets.

    Args:
        model: a `MedMoEModel`; it is put back into the mode it was in.
        batches: on the model's device, at least one.
        counts: for each batch whether it is measured; the others are computed all the same, as several processes with
            sharded weights must do together.
        gather: puts rows of all processes together; None for one process.

    Returns:
        means of `loss`, `loss_global`, `loss_local`, `loss_aux`; `routing_image` and (with a report router)
        `routing_report`, accuracies, if any label is known; `image_to_text_r1`, `text_to_image_r1`, `..._r5`,
        `..._r10`, as far as there are more than 1, 5, 10 pairs: a recall at k among k is 1 by itself. And what they
        are of: `pairs`, all; `loss_pairs`, in `loss_batch_size` at a time; `routing_pairs`, those with a label.

    Raises:
        ValueError: if no batch has two pairs.
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
            measured = counts is None or counts[number]
            for name, value in kept.items():
                columns.setdefault(name, []).append(value if measured else value[:0])
    finally:
        model.train(was_training)
    if not columns:
        raise ArgumentError("There was nothing to evaluate: the stream of held-out samples is empty.")
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
    return result | {
        "pairs": pairs,
        "loss_pairs": int(sizes[full].sum()),
        "loss_batch_size": largest,
        "routing_pairs": known,
    }


def describe(metrics: Mapping[str, float], positives: str = "none") -> str:
    """What `validate` measured in a line, each number with what it is of.

    Args:
        metrics: of `validate`.
        positives: the model's `config.positives`; losses are named as such unless it is `"none"`.
    """
    told = "" if positives == "none" else f", positives by {positives.replace('_', ' ')}"
    parts = [
        f"held-out loss {metrics['loss']:.3f} ({metrics['loss_pairs']} pairs, {metrics['loss_batch_size']} at a time"
        f"{told})"
    ]
    for names, of in (
        (("routing_image", "routing_report"), f"of {metrics['routing_pairs']}"),
        (("image_to_text_r1", "text_to_image_r1"), f"among {metrics['pairs']}"),
    ):
        if found := [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]:
            parts.append(f"{', '.join(found)} ({of})")
    return ", ".join(parts)
