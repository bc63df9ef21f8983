"""Zero-shot classification with a MedMoE checkpoint: by the stock pipeline, and with several prompts per class.

python examples/zero_shot.py                           # the model of train_from_scratch.py on unseen phantoms
python examples/zero_shot.py --model you/medmoe --image scan.png --labels "a chest x-ray with effusion" "a normal ..."
"""

import argparse

from PIL import Image
from transformers import pipeline

from medmoe_hf.data import FINDINGS, MODALITIES, phantom_sample, zero_shot_prompts
from medmoe_hf.evaluation.zero_shot import ZeroShotClassifier
from medmoe_hf.inference.encoders import load_encoder


def with_pipeline(model: str, image: Image.Image, labels: list[str]) -> None:
    """Classify one image with the stock pipeline, which needs no import of `medmoe_hf`."""
    classifier = pipeline("zero-shot-image-classification", model=model, trust_remote_code=True)
    for answer in classifier(image, candidate_labels=labels, hypothesis_template="{}")[:3]:
        print(f"  {answer['score']:.3f}  {answer['label']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="scratch/model", help="folder or Hub id")
    parser.add_argument("--image", help="image file; default: synthetic phantoms")
    parser.add_argument("--labels", nargs="+", help="sentences to choose from")
    arguments = parser.parse_args()
    if arguments.image:
        if not arguments.labels:
            parser.error("--image needs --labels")
        with_pipeline(arguments.model, Image.open(arguments.image), arguments.labels)
        return

    sample = phantom_sample(7, 0)
    prompts = zero_shot_prompts(MODALITIES[sample["modality"]])
    print(f"One phantom, with the pipeline. Its report: {sample['caption']}")
    with_pipeline(arguments.model, sample["image"], [sentences[0] for sentences in prompts.values()])

    print("\nForty phantoms per modality, several prompts per class (the prompts are encoded once):")
    encoder = load_encoder(arguments.model)
    for number, modality in enumerate(MODALITIES):
        samples = [phantom_sample(7, index, modalities=[modality]) for index in range(40)]
        classify = ZeroShotClassifier(encoder, zero_shot_prompts(modality))
        best = classify([sample["image"] for sample in samples]).argmax(dim=1).tolist()
        right = sum(classify.classes[label] == sample["finding"] for label, sample in zip(best, samples, strict=True))
        print(f"  {MODALITIES[number]:<16}{right}/40 correct; classes: {', '.join(FINDINGS[modality])}")


if __name__ == "__main__":
    main()
