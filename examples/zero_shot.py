"""Zero-shot labels for images with any MedMoE checkpoint, by the stock pipeline and by hand.

python examples/zero_shot.py                           # on the quickstart's model and a few unseen phantoms
python examples/zero_shot.py --model you/medmoe --image scan.png --labels "a chest x-ray with effusion" "a normal ..."
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from medmoe_hf.data import FINDINGS, MODALITIES, phantom_sample, zero_shot_prompts


def with_pipeline(model: str, image: Image.Image, labels: list[str]) -> None:
    """One image, a handful of labels: no code of ours is needed."""
    classifier = pipeline("zero-shot-image-classification", model=model, trust_remote_code=True)
    for answer in classifier(image, candidate_labels=labels, hypothesis_template="{}")[:3]:
        print(f"  {answer['score']:.3f}  {answer['label']}")


@torch.no_grad()
def by_hand(model: str, images: list[Image.Image], prompts: dict[str, list[str]]) -> list[str]:
    """Several prompts a class, averaged: more robust than one label a class. Gives each image's class."""
    medmoe = AutoModel.from_pretrained(model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    pixels = processor(images=images, return_tensors="pt")
    # Only the global embedding is needed here, not the local maps.
    embeds = torch.nn.functional.normalize(medmoe.get_image_features(**pixels, local=False).pooler_output, dim=-1)
    classes = []
    for sentences in prompts.values():
        features = medmoe.get_text_features(**processor(text=sentences, return_tensors="pt")).pooler_output
        classes.append(torch.nn.functional.normalize(features, dim=-1).mean(dim=0))
    scores = embeds @ torch.nn.functional.normalize(torch.stack(classes), dim=-1).T
    return [list(prompts)[index] for index in scores.argmax(dim=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="quickstart/model", help="folder or Hub id")
    parser.add_argument("--image", help="an image file; without it, phantoms are drawn")
    parser.add_argument("--labels", nargs="+", help="sentences to choose from")
    arguments = parser.parse_args()
    if arguments.image:
        if not arguments.labels:
            parser.error("--image needs --labels")
        with_pipeline(arguments.model, Image.open(arguments.image), arguments.labels)
        return

    sample = phantom_sample(7, 0)
    prompts = zero_shot_prompts(MODALITIES[sample["modality"]])
    print(f"One phantom, by pipeline. Its report: {sample['caption']}")
    with_pipeline(arguments.model, sample["image"], [sentences[0] for sentences in prompts.values()])

    print("\nForty phantoms of each modality, by hand, several prompts a class:")
    for number, modality in enumerate(MODALITIES):
        samples = [phantom_sample(7, index, modalities=[modality]) for index in range(40)]
        predicted = by_hand(arguments.model, [item["image"] for item in samples], zero_shot_prompts(modality))
        right = sum(name == item["finding"] for name, item in zip(predicted, samples, strict=True))
        print(f"  {MODALITIES[number]:<16}{right}/40 right of {', '.join(FINDINGS[modality])}")


if __name__ == "__main__":
    main()
