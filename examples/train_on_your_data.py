# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf[dicom,train]"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""From a folder of images and a CSV to a fine-tuned model and a prediction.

    python examples/train_on_your_data.py [--model FOLDER] [--output runs/mine] [--push user/name]

The script first writes the files that a hospital's export would have: a folder of DICOM and PNG files, and a CSV with
the file, patient, modality and report of each. The images are crops of real ones that Python packages ship (CT and MR
files of pydicom, a retina photograph and a stained section of scikit-image). The steps after that are those for your
own data:

1. `medmoe data inspect` reads all files and reports what they hold and what is wrong with them;
2. `medmoe train` fine-tunes the model for a few steps and validates it on held-out patients;
3. the model routes one file, and scores how well each of several reports fits it;
4. with `--push`, the model and its card go to a private repository on the Hub.

This shows the workflow, not a result: four images cannot teach a model anything about medicine.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import skimage
import torch
import yaml
from PIL import Image
from transformers import AutoModel, AutoProcessor

REPORTS = {
    "ct": ("Axial CT of the abdomen without contrast.", "Unenhanced abdominal CT slice."),
    "mri": ("Sagittal MRI, normal marrow signal.", "MR image without abnormality."),
    "fundus": ("Color fundus photograph with microaneurysms.", "Fundus photograph of a diabetic eye."),
    "histopathology": ("Immunohistochemistry stained section.", "Microscopy of a stained tissue section."),
}


def make_export(folder: Path, copies: int = 12) -> Path:
    """Write images and `reports.csv`; each crop plays the role of another patient."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for modality, name in (("ct", "CT_small.dcm"), ("mri", "MR_small.dcm")):
        for copy in range(copies):
            scan = pydicom.dcmread(pydicom.data.get_testdata_file(name))
            side = int(0.85 * min(scan.Rows, scan.Columns))
            y, x = rng.integers(0, scan.Rows - side), rng.integers(0, scan.Columns - side)
            crop = np.ascontiguousarray(scan.pixel_array[y : y + side, x : x + side])
            scan.Rows, scan.Columns, scan.PixelData = side, side, crop.tobytes()
            scan.PatientName, scan.PatientID = "", f"{modality}-{copy}"
            rows.append((f"images/{modality}-{copy}.dcm", REPORTS[modality][copy % 2], modality, scan.PatientID))
            scan.save_as(folder / rows[-1][0])
    for modality, name in (("fundus", "retina.jpg"), ("histopathology", "ihc.png")):
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for copy in range(copies):
            side = int(0.8 * min(image.size))
            x, y = int(rng.integers(0, image.width - side)), int(rng.integers(0, image.height - side))
            rows.append((f"images/{modality}-{copy}.png", REPORTS[modality][copy % 2], modality, f"{modality}-{copy}"))
            image.crop((x, y, x + side, y + side)).resize((256, 256)).save(folder / rows[-1][0])
    with open(folder / "reports.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "report", "modality", "patient"), *rows])
    return folder / "reports.csv"


def run(*command: str) -> None:
    print("\n$ medmoe", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "medmoe_hf.cli", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", help="checkpoint to start from: folder, Hub id or small")
    parser.add_argument("--output", type=Path, default=Path("runs/mine"), help="new folder for all results")
    parser.add_argument("--steps", type=int, default=60, help="number of training steps")
    parser.add_argument("--push", metavar="REPO", help="user/name on the Hub (run `hf auth login` first)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    table = make_export(arguments.output / "export")

    columns = {"image": "path", "caption": "report", "modality": "field:modality", "subject": "patient"}
    sources = arguments.output / "sources.yaml"
    sources.write_text(yaml.safe_dump([{"kind": "csv", "name": "my hospital", "files": [str(table)], **columns}]))
    run("data", "inspect", str(sources), "--sheet", str(arguments.output / "contact_sheet.png"))

    config = {
        "output_dir": str(arguments.output / "model"),
        "model": {"from_pretrained": arguments.model},
        "data": {"train": str(sources), "validation_share": 0.25, "num_workers": 0},
        "max_steps": arguments.steps,
        "batch_size": 16,
        "learning_rate": 3e-4,
        "warmup_steps": 5,
        "evaluate_every": max(1, arguments.steps // 2),
    }
    (arguments.output / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run("train", str(arguments.output / "train.yaml"))

    # The processor reads the DICOM file itself.
    model = AutoModel.from_pretrained(arguments.output / "model", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(arguments.output / "model", trust_remote_code=True)
    scan = pydicom.data.get_testdata_file("CT_small.dcm")
    reports = [first for first, _ in REPORTS.values()]
    with torch.no_grad():
        routed = model.route(**processor(images=scan, return_tensors="pt"))
        scores = model(**processor(images=scan, text=reports, return_tensors="pt")).logits_per_image[0].softmax(dim=0)
    print(f"\nCT_small.dcm is routed to {routed.modality[0]} ({routed.probabilities.max():.2f}). Reports by fit:")
    for report, score in sorted(zip(reports, scores.tolist(), strict=True), key=lambda pair: -pair[1]):
        print(f"  {score:.2f}  {report}")

    if arguments.push:
        run("card", str(arguments.output / "model"), "--repo", arguments.push)
        run("push", str(arguments.output / "model"), arguments.push, "--private")


if __name__ == "__main__":
    main()
