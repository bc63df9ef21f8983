"""Encodes images and texts with a checkpoint, by the Auto classes and the checkpoint's own code alone.

`encode.py` runs the text of this file in a process that refuses `medmoe_hf`; so it imports nothing from there, and
nothing from this folder.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm


class RefusePackage:
    """An import finder that hides `medmoe_hf`, even if it is installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "medmoe_hf":
            raise ModuleNotFoundError(f"No module named {name!r}: it is not installed here.", name=name)


@torch.inference_mode()
def encode(model: Any, processor: Any, job: dict[str, Any]) -> dict[str, np.ndarray]:
    """Encodes the images and texts of a job.

    Args:
        model: Model of `AutoModel`, in `eval` mode.
        processor: Its processor.
        job: `images`, N paths; `texts`, M texts; `batch_size`; `groups`, a list of `{"images": [...], "texts": [...]}`
            with the indices of images and texts whose local similarity is needed.

    Returns:
        `embedding` (N, D) and `texts` (M, D) of length 1, in the shared space; `v_g` (N, F), the image embedding
        before its projection; `router` (N, K) probabilities; `local` (N, M) logits, NaN where not needed; `scale` (),
        the factor of the cosines.
    """
    pooled: list[Tensor] = []
    # `get_image_features` replaces the global embedding by its projection.
    model.vision_model.register_forward_hook(lambda _, __, output: pooled.append(output.pooler_output))
    texts, kept = [], []
    for start in range(0, len(job["texts"]), 256):
        inputs = processor(text=job["texts"][start : start + 256], return_tensors="pt")
        found = model.get_text_features(**inputs)
        texts.append(normalize(found.pooler_output.float(), dim=-1))
        kept += [
            (words[: int(mask.sum())], mask[: int(mask.sum())])
            for words, mask in zip(found.word_embeds, found.word_mask, strict=True)
        ]
    needed: dict[int, set[int]] = {}
    for group in job["groups"]:
        for row in group["images"]:
            needed.setdefault(row, set()).update(group["texts"])
    embedding, router = [], []
    local = np.full((len(job["images"]), len(job["texts"])), np.nan, dtype=np.float32)
    size = job["batch_size"]
    for start in tqdm(range(0, len(job["images"]), size), desc="images", unit="batch", mininterval=5):
        rows = range(start, min(start + size, len(job["images"])))
        pixels = processor(images=[job["images"][row] for row in rows], return_tensors="pt")["pixel_values"]
        columns = sorted(set().union(*(needed.get(row, set()) for row in rows)))
        output = model.get_image_features(pixel_values=pixels, local=bool(columns))
        embedding.append(normalize(output.pooler_output.float(), dim=-1))
        router.append(output.router_logits.float().softmax(dim=-1))
        if columns:
            words = torch.nn.utils.rnn.pad_sequence([kept[column][0] for column in columns], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([kept[column][1] for column in columns], batch_first=True)
            text = SimpleNamespace(word_embeds=words, word_mask=mask)
            scores = model.similarity(output.pooler_output, output.local_embeds, text, "local")
            local[np.ix_(list(rows), columns)] = scores.float().numpy()
    return {
        "embedding": torch.cat(embedding).numpy(),
        "router": torch.cat(router).numpy(),
        "v_g": torch.cat(pooled).float().numpy(),
        "texts": torch.cat(texts).numpy() if texts else np.zeros((0, 0), dtype=np.float32),
        "local": local,
        "scale": np.array(float(model.global_scale)),
    }


def main(folder: str, job: str, out: str) -> None:
    """Loads a checkpoint as its users do, and writes what `encode` returns as an NPZ file."""
    sys.meta_path.insert(0, RefusePackage)
    from transformers import AutoModel, AutoProcessor

    with open(job, encoding="utf-8") as file:
        content = json.load(file)
    model, loading = AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise SystemExit(
            f"{folder} lacks {len(loading['missing_keys'])} tensors: {sorted(loading['missing_keys'])[0]}"
        )
    if model.config.router == "report" and content["groups"]:
        raise SystemExit("Here the image router selects the expert of the local similarity, in this model the report.")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    np.savez(out, **encode(model.eval(), processor, content))


if __name__ == "__main__":
    main(*sys.argv[1:])
