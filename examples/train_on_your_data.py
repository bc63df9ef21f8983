"""From a folder of images and a CSV to a fine-tuned model and a prediction.

    python examples/train_on_your_data.py [--model quickstart/model] [--output runs/mine] [--push user/name]

Stands for a hospital's export. The script first makes one, of real images that Python packages ship (a CT and an MR
file of pydicom, a retina photograph and a stained section of scikit-image): DICOM files and pictures in a folder, and
a CSV that names each file, its patient and its report. Then come the steps that you would take with your own:

1. `medmoe data inspect` on six lines of YAML: what is there, and what is wrong with it;
2. `medmoe train`: a short fine-tune, with patients held out;
3. a prediction for one file: which modality it is, and which of some reports fits best;
4. with `--push`, the model and its card go to a private repository on the Hub.

Two scanners and three patients teach nothing about medicine: what is shown is the way, not a result.
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
    """Writes images and `reports.csv`; crops of the few real images that are here stand for more patients."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    shipped = Path(skimage.__file__).parent / "data"
    for modality, name in (("ct", "CT_small.dcm"), ("mri", "MR_small.dcm")):
        whole = pydicom.dcmread(pydicom.data.get_testdata_file(name))
        for copy in range(copies):
            part = pydicom.dcmread(pydicom.data.get_testdata_file(name))
            side = int(0.85 * min(whole.Rows, whole.Columns))
            y, x = rng.integers(0, whole.Rows - side), rng.integers(0, whole.Columns - side)
            part.Rows = part.Columns = side
            part.PixelData = np.ascontiguousarray(whole.pixel_array[y : y + side, x : x + side]).tobytes()
            part.PatientName, part.PatientID = "", f"{modality}-{copy}"
            rows.append((f"images/{modality}-{copy}.dcm", modality, copy))
            part.save_as(folder / rows[-1][0])
    for modality, name in (("fundus", "retina.jpg"), ("histopathology", "ihc.png")):
        whole = Image.open(shipped / name).convert("RGB")
        for copy in range(copies):
            side = int(0.8 * min(whole.size))
            x, y = rng.integers(0, whole.width - side), rng.integers(0, whole.height - side)
            rows.append((f"images/{modality}-{copy}.png", modality, copy))
            whole.crop((x, y, x + side, y + side)).resize((256, 256)).save(folder / rows[-1][0])
    with open(folder / "reports.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "report", "modality", "patient"])
        for path, modality, copy in rows:
            writer.writerow([path, REPORTS[modality][copy % 2], modality, f"{modality}-{copy}"])
    return folder / "reports.csv"


def run(*command: str) -> None:
    print("\n$ medmoe", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "medmoe_hf.cli", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="quickstart/model", help="checkpoint to start from: folder or Hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/mine"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--push", metavar="REPO", help="user/name on the Hub; log in first: hf auth login")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    table = make_export(arguments.output / "export")

    sources = [
        {
            "kind": "csv",
            "name": "my hospital",
            "files": [str(table)],
            "image": "path",
            "caption": "report",
            "modality": "field:modality",
            "subject": "patient",
        }
    ]
    listed = arguments.output / "sources.yaml"
    listed.write_text(yaml.safe_dump(sources, sort_keys=False))
    run("data", "inspect", str(listed), "--sheet", str(arguments.output / "contact_sheet.png"))

    config = {
        "output_dir": str(arguments.output / "model"),
        "model": {"from_pretrained": arguments.model},
        "data": {"train": str(listed), "validation_share": 0.25, "num_workers": 0},
        "max_steps": arguments.steps,
        "batch_size": 16,
        "learning_rate": 3e-4,
        "warmup_steps": 5,
        "evaluate_every": max(1, arguments.steps // 2),
    }
    (arguments.output / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run("train", str(arguments.output / "train.yaml"))

    # The folder loads like any other, and the file goes in as it is.
    model = AutoModel.from_pretrained(arguments.output / "model", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(arguments.output / "model", trust_remote_code=True)
    scan = pydicom.data.get_testdata_file("CT_small.dcm")
    reports = [sentences[0] for sentences in REPORTS.values()]
    with torch.no_grad():
        routed = model.route(**processor(images=scan, return_tensors="pt"))
        scores = model(**processor(images=scan, text=reports, return_tensors="pt")).logits_per_image[0].softmax(dim=0)
    print(f"\nCT_small.dcm is routed to {routed.modality[0]} ({routed.probabilities.max():.2f}); it fits")
    for report, score in sorted(zip(reports, scores.tolist(), strict=True), key=lambda pair: -pair[1]):
        print(f"  {score:.2f}  {report}")

    if arguments.push:
        run("card", str(arguments.output / "model"), "--repo", arguments.push)
        run("push", str(arguments.output / "model"), arguments.push, "--private")


if __name__ == "__main__":
    main()
