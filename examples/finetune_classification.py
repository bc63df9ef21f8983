# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""Fine-tune a MedMoE image tower as a classifier with transformers' Trainer.

    python examples/finetune_classification.py                      # the packaged checkpoint on ultrasound phantoms
    python examples/finetune_classification.py --model you/medmoe --data FOLDER

FOLDER contains one folder of images per class (the `imagefolder` layout).
"""

import argparse
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

import medmoe_hf
from medmoe_hf.data import FINDINGS, phantom_sample


def phantoms(modality: str, count: int, seed: int) -> datasets.Dataset:
    """Return labelled synthetic images, with the columns of an image folder."""
    names = list(FINDINGS[modality])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    samples = [phantom_sample(seed, index, image_size=96, modalities=[modality]) for index in range(count)]
    columns = {
        "image": [sample["image"] for sample in samples],
        "label": [names.index(sample["finding"]) for sample in samples],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a MedMoE checkpoint; default: that of the package")
    parser.add_argument("--data", help="image folder; default: synthetic ultrasound phantoms")
    parser.add_argument("--output", default="runs/classifier", help="folder for the fine-tuned model")
    parser.add_argument(
        "--features", default="both", choices=("backbone", "expert", "both"), help="features that the head reads"
    )
    parser.add_argument("--freeze", action="store_true", help="train the classification head only (linear probe)")
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    arguments = parser.parse_args()
    checkpoint = arguments.model or medmoe_hf.pretrained()

    if arguments.data:
        parts = datasets.load_dataset("imagefolder", data_dir=arguments.data, split="train").train_test_split(
            0.2, seed=0
        )
        train, test = parts["train"], parts["test"]
    else:
        train, test = phantoms("ultrasound", 800, seed=11), phantoms("ultrasound", 200, seed=12)
    names = train.features["label"].names

    processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint,
        trust_remote_code=True,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        classifier_features=arguments.features,
        freeze_vision_model=arguments.freeze,
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = processor(images=[row["image"] for row in rows], return_tensors="pt")
        return {"pixel_values": batch["pixel_values"], "labels": torch.tensor([row["label"] for row in rows])}

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=32,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
    )
    print("Accuracy before training:", trainer.evaluate()["eval_accuracy"])
    trainer.train()
    print(f"Accuracy after training: {trainer.evaluate()['eval_accuracy']} ({len(test)} test images)")
    trainer.save_model(arguments.output)
    processor.save_pretrained(arguments.output)
    print(f"Saved to {arguments.output}. Load it with AutoModelForImageClassification.from_pretrained.")


if __name__ == "__main__":
    main()
