"""Texts to report embeddings, for evaluation and search."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medmoe_hf.common.console import progress


@torch.inference_mode()
def encode_texts(model: Any, processor: Any, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Report embeddings (N, D) float32 of length 1, on the CPU: texts of like length share a batch, equal ones a row.

    Args:
        model: a `MedMoEModel`, in `eval` mode.
        processor: its `MedMoEProcessor`.
        texts: N of them.
        batch_size: texts at a time.
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
    """D, the width of the space that images and reports share."""
    return model.config.projection_dim or model.config.text_config.hidden_size
