# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf[sentence]"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""Fine-tune with the Trainer of sentence-transformers, and find images by sentences.

    python examples/finetune_sentence_transformer.py                    # the packaged checkpoint on phantoms
    python examples/finetune_sentence_transformer.py --model you/medmoe --data pairs.csv

The columns of the CSV are `image` (paths) and `caption`.
"""

import argparse

import datasets
import numpy as np
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import medmoe_hf
from medmoe_hf.data import phantom_sample


def phantoms(count: int, seed: int) -> datasets.Dataset:
    """Return drawings with their reports, each report once."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    samples = {one["caption"]: one["image"] for one in (phantom_sample(seed, i, image_size=96) for i in range(count))}
    return datasets.Dataset.from_dict({"image": list(samples.values()), "caption": list(samples)}, features=features)


def found_first(model: SentenceTransformer, pairs: datasets.Dataset) -> dict[str, float]:
    """Search the image of every caption; return the share that is found first, and among the first five."""
    queries, images = model.encode(list(pairs["caption"])), model.encode(list(pairs["image"]))
    found = [[hit["corpus_id"] for hit in hits] for hits in util.semantic_search(queries, images, top_k=5)]
    shares = {f"R@{k}": [row in listed[:k] for row, listed in enumerate(found)] for k in (1, 5)}
    return {name: round(float(np.mean(hit)), 3) for name, hit in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a MedMoE checkpoint; default: that of the package")
    parser.add_argument("--data", help="CSV with image and caption; default: synthetic phantoms")
    parser.add_argument("--output", default="runs/sentence-transformer", help="folder for the fine-tuned model")
    parser.add_argument("--steps", type=int, default=12, help="number of steps")
    parser.add_argument("--train-all", action="store_true", help="train the backbone and the text encoder as well")
    arguments = parser.parse_args()

    model = SentenceTransformer(arguments.model or medmoe_hf.pretrained(), trust_remote_code=True)
    if arguments.data:
        pairs = datasets.load_dataset("csv", data_files=arguments.data, split="train")
        parts = pairs.cast_column("image", datasets.Image()).train_test_split(0.2, seed=0)
        train, test = parts["train"], parts["test"]
    else:
        train, test = phantoms(96, seed=11), phantoms(40, seed=12)
        # Smaller images than the checkpoint was trained with, for the sake of time.
        model[0].processor.image_processor.size = {"height": 96, "width": 96}

    network = model[0].model
    if not arguments.train_all:
        network.vision_model.backbone.requires_grad_(False)
        network.text_model.requires_grad_(False)
    before = found_first(model, test)
    loss = MultipleNegativesRankingLoss(
        model, scale=20.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    settings = SentenceTransformerTrainingArguments(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        warmup_steps=2,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    SentenceTransformerTrainer(model, settings, train_dataset=train, loss=loss).train()
    print(f"Images of {len(test)} sentences, before training: {before}; after: {found_first(model, test)}")

    model.save_pretrained(arguments.output)
    again = SentenceTransformer(arguments.output, trust_remote_code=True)
    difference = np.abs(again.encode(test["caption"][:4]) - model.encode(test["caption"][:4])).max()
    print(f"Saved to {arguments.output}; loaded again, embeddings differ by {difference:.1e}.")


if __name__ == "__main__":
    main()
