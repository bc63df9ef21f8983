"""Fails if the quickstart's report falls short of what the README promises.

python .ci/check_quickstart.py quickstart/report.json
"""

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    report = json.loads(path.read_text())
    before, after = report["before"], report["after"]
    right = sum(scan["routed_to"] == scan["modality"] for scan in before["scans"])
    promises = [
        ("at most three minutes", report["total_seconds"] <= 180),
        ("first answer within ten seconds", before["first_answer_seconds"] <= 10),
        ("at least eight of ten real scans routed right", len(before["scans"]) == 10 and right >= 8),
        ("fine-tuning tells tissues apart", after["tissue_accuracy"] >= max(0.9, before["tissue_accuracy"])),
        ("a picture", (path.parent / "quickstart.png").stat().st_size > 100_000),
    ]
    for name, kept in promises:
        print(f"{'ok    ' if kept else 'BROKEN'} {name}")
    if not all(kept for _, kept in promises):
        raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
