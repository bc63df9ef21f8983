# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf[train]"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""Train on two processes from streamed shards, interrupt the run, and resume it.

    python examples/train_on_two_processes.py

Writes phantom shards and trains on them with data workers, negatives from both processes, an exponential moving
average, evaluations and TensorBoard logs. Stops the run with SIGTERM, as a cluster would, resumes it with
`--resume auto`, and loads the result.
On GPUs: `accelerate launch --config_file examples/accelerate/ddp.yaml -m medmoe_hf.cli train run.yaml`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from medmoe_hf import MedMoEModel
from medmoe_hf.data import write_webdataset

STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("two-processes"), help="new folder for all results")
    output = parser.parse_args().output
    output.mkdir(parents=True)

    write_webdataset(output / "shards", shards=4, samples_per_shard=150, image_size=64)
    run = {
        "output_dir": str(output / "model"),
        "model": {"preset": "tiny"},
        "data": {
            "train": {"kind": "webdataset", "files": [str(output / "shards" / "*.tar")]},
            "evaluation": {"kind": "phantom", "seed": 1, "image_size": 64},
            "num_workers": 1,
        },
        "max_steps": STEPS,
        "batch_size": 16,  # per process: each pair is contrasted with 31 others
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "ema_decay": 0.95,
        "evaluate_every": 20,
        "evaluation_samples": 96,
        "checkpoints": {"every_steps": 20},
        "log_every": 5,
    }
    config = output / "run.yaml"
    config.write_text(yaml.safe_dump(run, sort_keys=False))

    # On CPUs `accelerate launch` starts one process only; Accelerate also detects processes started by torchrun.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "medmoe_hf.cli"]
    command += ["train", str(config), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    checkpoints = output / "model-run" / "checkpoints"

    first = subprocess.Popen(command, env=environment)
    while first.poll() is None and not any(checkpoints.glob("step-*")):
        time.sleep(0.5)
    print(f"\nSending SIGTERM; checkpoints: {sorted(path.name for path in checkpoints.glob('step-*'))}.")
    first.send_signal(signal.SIGTERM)
    first.wait()

    subprocess.run(command, env=environment, check=True)
    record = json.loads((output / "model" / "training.json").read_text())
    print(f"\nResumed after step {record['resumed'][0]}. Total: {record['steps']} steps, {record['samples']} pairs.")
    for measured in record["evaluations"]:
        print(
            f"step {measured['step']:3}: held-out loss {measured['loss']:.2f}, routing by image "
            f"{measured['routing_image']:.2f}, text to image R@5 {measured['text_to_image_r5']:.2f} of 96"
        )
    logs = list((output / "model-run" / "logs").rglob("events.*"))
    print(f"TensorBoard: tensorboard --logdir {output / 'model-run' / 'logs'} ({len(logs)} files)")
    MedMoEModel.from_pretrained(output / "model")


if __name__ == "__main__":
    main()
