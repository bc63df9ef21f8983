# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf[dicom]"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""Real scans, offline, in three minutes: route, label and locate them with the packaged checkpoint, then fine-tune it.

    python examples/quickstart.py [--output quickstart]

The script

1. collects real scans that pydicom, nibabel, matplotlib and scikit-image ship (there is no X-ray among them), as the
   files that an export of your own would have: `scans/`, `scan.png`, `reports.csv`, `test.csv` and `shards/`
   (`experiments/quickstart_data.py`);
2. starts a process that cannot import `medmoe_hf` (`experiments/quickstart_scans.py`), in which the checkpoint says
   which expert reads each scan and which of ten labels fits best, and draws `quickstart.png`;
3. fine-tunes an expert on 24 tiles of a stained section, saves it as `model`, which is ready for the Hub, loads
   that in a new process, and compares both on tiles of the other half of the section.

One section shows how fine-tuning works, not how good a model is.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.quickstart_data import write_scans, write_tiles

from medmoe_hf import pretrained
from medmoe_hf.common.console import hide_foreign_bars
from medmoe_hf.training import TrainConfig, train


def ask(model: str | Path, folder: Path, *options: str) -> dict[str, Any]:
    """Ask a checkpoint about the scans, in a process without this package."""
    script = Path(__file__).parent / "experiments" / "quickstart_scans.py"
    command = [sys.executable, str(script), str(model), str(folder), *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_answers(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        routed = f"{answer['routed_to']} {answer['probability']:.2f}"
        wrong = "" if answer["routed_to"] == answer["modality"] else f"  (it is {answer['modality']})"
        label = f"{answer['label']} {answer['label_probability']:.2f}"
        print(f"  {Path(answer['scan']).name:<24}{routed:<22}{label}{wrong}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="new folder for all results")
    parser.add_argument("--model", help="folder or Hub id; default: the checkpoint of the package")
    parser.add_argument("--steps", type=int, default=30, help="number of training steps")
    arguments = parser.parse_args()
    output = arguments.output
    if output.exists():
        parser.error(f"{output} already exists; remove it or choose another folder with --output")
    hide_foreign_bars()
    started = time.monotonic()
    model = arguments.model or pretrained()
    print(f"Writing scans that Python packages ship to {output} ...", flush=True)
    write_scans(output)
    write_tiles(output)

    print("Loading the checkpoint in a process without medmoe_hf ...", flush=True)
    before = ask(model, output, "--picture", str(output / "quickstart.png"))
    print(f"The first answer took {before['first_answer_seconds']:.1f} s. Expert and best label of each scan:")
    print_answers(before["scans"])

    print("\nFine-tuning on the 24 tiles of reports.csv ...", flush=True)
    columns = {"image": "path", "caption": "report", "modality": "field:modality", "label": "tissue"}
    config = {
        "output_dir": output / "model",
        "model": {"from_pretrained": str(model)},
        "data": {"train": {"kind": "csv", "files": [str(output / "reports.csv")], **columns}, "num_workers": 0},
        # The expert and the projections learn; what routes all modalities does not forget the others.
        "freeze": ["text_model", "vision_model.backbone", "vision_model.router", "report_router"],
        "max_steps": arguments.steps,
        "batch_size": 12,
        "learning_rate": 2e-4,
        "warmup_steps": 3,
    }
    record = train(TrainConfig.from_dict(config))

    print("Loading the fine-tuned model in another process ...", flush=True)
    after = ask(output / "model", output)
    print(
        f"Tiles of the other half told apart (40, chance 0.50): {before['tissue_accuracy']:.2f} before, "
        f"{after['tissue_accuracy']:.2f} after {record.seconds:.0f} s of fine-tuning."
    )
    kept = sum(old["routed_to"] == new["routed_to"] for old, new in zip(before["scans"], after["scans"], strict=True))
    print(f"{kept} of {len(after['scans'])} scans are routed as before.")
    report = {"before": before, "after": after, "total_seconds": round(time.monotonic() - started, 1)}
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['total_seconds']:.0f} s in total. See quickstart.png and report.json in {output}.")


if __name__ == "__main__":
    main()
