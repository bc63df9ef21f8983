"""Fails if the report of examples/train_from_scratch.py falls short of what the README promises.

python .ci/check_scratch.py scratch/report.json
"""

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    report = json.loads(path.read_text())
    pointing, retrieval = report["pointing_game"], report["retrieval"]
    promises = [
        ("image router >= 0.98", report["routing_accuracy"]["image"] >= 0.98),
        ("report router >= 0.98", report["routing_accuracy"]["report"] >= 0.98),
        ("zero-shot accuracy >= 0.80", report["zero_shot_accuracy"]["mean"] >= 0.80),
        ("text to image R@5 >= 10 times chance", retrieval["text_to_image_r5"] >= 10 * retrieval["chance_r5"]),
        ("pointing game >= 0.70", pointing["finding_word"] >= 0.70),
        ("pointing game of a nonsense word <= 0.40", pointing["nonsense_word"] <= 0.40),
        ("three real images routed", len(report["real_images"]) == 3),
    ]
    for name, kept in promises:
        print(f"{'ok    ' if kept else 'BROKEN'} {name}")
    if not all(kept for _, kept in promises):
        raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
