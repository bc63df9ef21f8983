"""Encoding of texts and of classes that texts describe, for evaluation, search and predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medmoe_hf.common.console import progress


@torch.inference_mode()
def encode_texts(model: Any, processor: Any, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Encodes texts. Texts of similar length share a batch, and equal ones are encoded once.

    Args:
        model: A `MedMoEModel` in `eval` mode.
        processor: Its `MedMoEProcessor`.
        texts: N texts.
        batch_size: Texts per batch.

    Returns:
        (N, D) float32 report embeddings of length 1, on the CPU.

    Example:
        ```python
        embeds = encode_texts(model, processor, ["No pleural effusion.", "A large pleural effusion."])
        print(embeds.shape, (embeds[0] @ embeds[1]).item())
        ```
    """
    different = list(dict.fromkeys(texts))
    if not different:
        return torch.zeros(0, embedding_size(model))
    tokens = processor(text=different, padding=False)
    order = sorted(range(len(different)), key=lambda index: len(tokens["input_ids"][index]))
    rows = {different[index]: row for row, index in enumerate(order)}
    parts = []
    for start in progress(range(0, len(order), batch_size), "texts", unit="batch"):
        some = order[start : start + batch_size]
        batch = processor.tokenizer.pad(
            {name: [values[index] for index in some] for name, values in tokens.items()}, return_tensors="pt"
        )
        features = model.get_text_features(**batch.to(model.device)).pooler_output
        parts.append(nn.functional.normalize(features.float(), dim=-1).cpu())
    return torch.cat(parts)[[rows[text] for text in texts]]


def embedding_size(model: Any) -> int:
    """Returns D, the size of the space that images and reports share."""
    config = model.config
    return int(config.projection_dim or config.text_config.hidden_size)


def flatten_prompts(prompts: Mapping[str, Sequence[str]]) -> tuple[list[str], Tensor]:
    """Concatenates the prompts of all classes.

    Args:
        prompts: Class -> sentences.

    Returns:
        M sentences, and (M,) int64 index of each one's class.
    """
    sentences = [sentence for name in prompts for sentence in prompts[name]]
    return sentences, torch.tensor([label for label, name in enumerate(prompts) for _ in prompts[name]])


def class_embeddings(text_embeds: Tensor, class_ids: Tensor) -> Tensor:
    """Averages the sentences of each class.

    Args:
        text_embeds: (M, D), of unit length.
        class_ids: (M,), of `flatten_prompts`.

    Returns:
        (D, C), columns of unit length.
    """
    return nn.functional.normalize(by_class(text_embeds.t(), class_ids), dim=0)


def by_class(by_sentence: Tensor, class_ids: Tensor) -> Tensor:
    """Averages over the sentences of each class.

    Args:
        by_sentence: (N, M).
        class_ids: (M,), of `flatten_prompts`.

    Returns:
        (N, C).
    """
    labels = range(int(class_ids.max()) + 1)
    return torch.stack([by_sentence[:, class_ids == label].mean(dim=1) for label in labels], dim=1)
