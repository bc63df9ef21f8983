"""What is measured while training: losses, routing and retrieval on held-out pairs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medmoe_hf.evaluation.metrics import accuracy, recall_at_k
from medmoe_hf.model.losses_medmoe import cosine_logits

LOSS_PARTS = ("loss", "loss_global", "loss_local", "loss_aux")


@torch.no_grad()
def validate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    counts: Sequence[bool] | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Measures a dual encoder on batches of `ContrastiveCollator`.

    Retrieval is by the global embeddings, among all pairs of all batches.

    Args:
        model: a `MedMoEModel`; it is put back into the mode it was in.
        batches: on the model's device, at least one.
        counts: for each batch whether it is measured; the others are computed all the same, as several processes with
            sharded weights must do together.
        gather: puts rows of all processes together; None for one process.

    Returns:
        means of `loss`, `loss_global`, `loss_local`, `loss_aux`; `routing_image` and (with a report router)
        `routing_report`, accuracies; `image_to_text_r1`, `text_to_image_r1`, `..._r5`, `..._r10`.
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
            measured = counts is None or counts[number]
            for name, value in kept.items():
                columns.setdefault(name, []).append(value if measured else value[:0])
    finally:
        model.train(was_training)
    if not columns:
        raise ValueError("There was nothing to evaluate: the stream of held-out samples is empty.")
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    if gather is not None:
        joined = {name: gather(column) for name, column in joined.items()}
    joined = {name: column.cpu() for name, column in joined.items()}
    result = {name: joined[name].double().mean().item() for name in LOSS_PARTS}
    result |= {
        name: accuracy(joined[name], joined["label"]) for name in ("routing_image", "routing_report") if name in joined
    }
    return result | recall_at_k(cosine_logits(joined["image"], joined["text"], 1.0))
