# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf[dicom]"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""Zero-shot classification with a MedMoE checkpoint: by the stock pipeline, and with several prompts per class.

python examples/zero_shot.py                           # the checkpoint of the package, on scans that packages ship
python examples/zero_shot.py --model you/medmoe --image scan.png --labels "a chest x-ray with effusion" "a normal ..."
"""

import argparse
from pathlib import Path

import pydicom.data
import skimage
from PIL import Image
from transformers import pipeline

import medmoe_hf
from medmoe_hf.evaluation.zero_shot import ZeroShotClassifier
from medmoe_hf.inference.encoders import load_encoder

PICTURES = Path(skimage.__file__).parent / "data"
SCANS = {
    "a CT file of pydicom": pydicom.data.get_testdata_file("J2K_pixelrep_mismatch.dcm"),
    "an MR file of pydicom": pydicom.data.get_testdata_file("examples_overlay.dcm"),
    "an ultrasound file of pydicom": pydicom.data.get_testdata_file("examples_jpeg2k.dcm"),
    "a retina of scikit-image": str(PICTURES / "retina.jpg"),
    "a stained section of scikit-image": str(PICTURES / "ihc.png"),
}
PROMPTS = {
    "X-ray": ["X-ray of the chest", "X-ray of the knee", "radiograph"],
    "CT": ["CT scan of the chest", "CT scan of the head", "computed tomography"],
    "MRI": ["MRI of the brain", "MRI of the abdomen", "magnetic resonance image"],
    "ultrasound": ["ultrasound of the breast", "ultrasound image", "sonogram"],
    "histopathology": ["histopathology image of the lung", "stained section", "microscopy image"],
    "fundus": ["fundus photograph", "retinal photograph"],
}


def with_pipeline(model: str, image: Image.Image, labels: list[str]) -> None:
    """Classify one image with the stock pipeline, which needs no import of `medmoe_hf`."""
    classifier = pipeline("zero-shot-image-classification", model=model, trust_remote_code=True)
    for answer in classifier(image, candidate_labels=labels, hypothesis_template="{}")[:3]:
        print(f"  {answer['score']:.3f}  {answer['label']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hub id; default: the checkpoint of the package")
    parser.add_argument("--image", help="image file; default: scans that packages ship")
    parser.add_argument("--labels", nargs="+", help="sentences to choose from")
    arguments = parser.parse_args()
    model = arguments.model or medmoe_hf.pretrained()
    if arguments.image:
        if not arguments.labels:
            parser.error("--image needs --labels")
        with_pipeline(model, Image.open(arguments.image), arguments.labels)
        return

    print("A retina, with the pipeline:")
    with_pipeline(model, Image.open(PICTURES / "retina.jpg"), [sentences[0] for sentences in PROMPTS.values()])

    print("\nFiles of several kinds, several prompts per class (the prompts are encoded once):")
    classify = ZeroShotClassifier(load_encoder(model), PROMPTS)
    for name, row in zip(SCANS, classify(list(SCANS.values())), strict=True):
        print(f"  {name:<36}{row.max():.3f}  {classify.classes[int(row.argmax())]}")


if __name__ == "__main__":
    main()
