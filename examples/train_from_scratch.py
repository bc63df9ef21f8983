# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf[dicom]"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""Train and evaluate a small MedMoE from scratch on synthetic phantoms: one command, offline.

    python examples/train_from_scratch.py [--output scratch]

The script

1. trains the `tiny` preset on synthetic image-report pairs (phantoms) of six modalities;
2. saves the model as a folder that is ready for the Hub;
3. starts a second process that cannot import `medmoe_hf` (`experiments/phantom_measure.py`), which loads the folder
   with the Auto classes, evaluates the model on unseen phantoms and routes three real images;
4. prints a table, and writes `report.json` and `heatmaps.png` to the output folder.

The numbers show that the software works. They are measured on drawings and say nothing about patients.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from medmoe_hf.common.console import hide_foreign_bars
from medmoe_hf.data import FINDINGS, write_webdataset, zero_shot_prompts
from medmoe_hf.training import TrainConfig, train

TRAIN_SEED, HELD_OUT_SEED, UNSEEN_SEED = 0, 1, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("scratch"), help="new folder for all results")
    parser.add_argument("--steps", type=int, default=1000, help="number of training steps")
    parser.add_argument("--unseen", type=int, default=600, help="number of phantoms to evaluate on")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} already exists; remove it or choose another folder with --output")
    hide_foreign_bars()
    started = time.monotonic()
    side = 64
    config = TrainConfig.from_dict(
        {
            "output_dir": arguments.output / "model",
            "model": {"preset": "tiny"},
            "data": {
                "train": {"kind": "phantom", "seed": TRAIN_SEED, "image_size": side},
                "evaluation": {"kind": "phantom", "seed": HELD_OUT_SEED, "image_size": side},
                "num_workers": 1,
            },
            "max_steps": arguments.steps,
            "batch_size": 32,
            "learning_rate": 2e-3,
            "warmup_steps": 50,
            "evaluate_every": max(arguments.steps // 3, 1),
            "evaluation_samples": 192,
        }
    )
    record = train(config)

    write_webdataset(
        arguments.output / "unseen", shards=1, samples_per_shard=arguments.unseen, seed=UNSEEN_SEED, image_size=side
    )
    prompts = {modality: zero_shot_prompts(modality) for modality in FINDINGS}
    (arguments.output / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    measure = Path(__file__).parent / "experiments" / "phantom_measure.py"
    subprocess.run([sys.executable, str(measure), str(arguments.output)], check=True)
    report_path = arguments.output / "report.json"
    report = json.loads(report_path.read_text())
    report["training"] = {"steps": record.steps, "pairs": record.samples, "seconds": round(record.seconds, 1)}
    report["total_seconds"] = round(time.monotonic() - started, 1)
    report_path.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def print_table(report: dict[str, Any]) -> None:
    """Print the content of `report.json` as a table."""
    count = report["unseen_phantoms"]
    training = report["training"]
    print(f"\nMedMoE from scratch: {training['pairs']} phantom pairs in {training['seconds']:.0f} s of training;")
    print(f"evaluated on {count} unseen phantoms (drawings, not patients), in a process without medmoe_hf\n")

    def row(name: str, value: float, note: str = "") -> None:
        print(f"  {name:<44}{value:>7.3f}  {note}")

    for router, value in report["routing_accuracy"].items():
        row(f"routing accuracy, {router} router", value, "chance 0.167")
    zero_shot = report["zero_shot_accuracy"]
    row("zero-shot finding accuracy, mean", zero_shot["mean"], f"chance {zero_shot['chance']:.3f}")
    for modality, value in zero_shot["by_modality"].items():
        row(f"    {modality}", value)
    retrieval = report["retrieval"]
    for direction in ("text_to_image", "image_to_text"):
        for k in (1, 5):
            chance = f"chance {retrieval[f'chance_r{k}']:.3f}"
            row(f"retrieval {direction.replace('_', ' ')} R@{k}", retrieval[f"{direction}_r{k}"], chance)
    pointing = report["pointing_game"]
    row("pointing game, the finding's word", pointing["finding_word"], f"a random pixel hits {pointing['chance']:.3f}")
    row("pointing game, a nonsense word instead", pointing["nonsense_word"])
    print("\n  real images (the model has seen drawings only):")
    for image in report["real_images"]:
        named = f"{image['routed_to']} with probability {image['probability']:.2f}"
        print(f"    {image['name']:<28} ({image['modality']}) is routed to {named}")
    print(f"\n  {report['total_seconds']:.0f} s in total; see report.json and heatmaps.png\n")


if __name__ == "__main__":
    main()
