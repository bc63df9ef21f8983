"""Checks a folder of real scans before anything is trained on it.

    python examples/experiments/real/check.py --data ../shared/real --out real/check.json

Files must exist with the hashes of the manifest, a subject and an image must be in one split each, and a source of
`external` in no other. The JSON holds what was found and the hash of every file. Ends with status 1 for a problem.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manifest import DOUBTFUL, SPLITS, Row, for_training, is_share_alike, read_manifest, sha256

from medmoe_hf.common.console import progress
from medmoe_hf.common.files import atomic_write

SHOWN = 20


def file_problems(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for each file that is missing, differs from its hash, or is listed twice."""
    problems = [
        f"{name}: listed {count} times." for name, count in Counter(r["file"] for r in rows).items() if count > 1
    ]
    for row in progress(rows, "hashes", unit="file"):
        path = folder / row["file"]
        if not path.is_file():
            problems.append(f"{row['file']}: missing.")
        elif sha256(path) != row["sha256"]:
            problems.append(f"{row['file']}: its SHA-256 is not that of the manifest; the file has changed.")
    return problems


def split_problems(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for each subject, image or external source that is on both sides of a split."""
    problems = []
    for column, what in (("subject", "the subject"), ("sha256", "the image with the SHA-256")):
        splits: dict[str, set[str]] = {}
        for row in rows:
            splits.setdefault(row[column], set()).add(row["split"])
        problems += [
            f"{what} {key} is in several splits: {', '.join(sorted(own))}."
            for key, own in splits.items()
            if len(own) > 1
        ]
    inside = {row["source"] for row in rows if row["split"] != "external"}
    problems += [
        f"the source {source} is external, but has images in other splits."
        for source in sorted({row["source"] for row in rows if row["split"] == "external"} & inside)
    ]
    return problems


def source_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns counts, subjects, license and status of each source of each modality, in the order of the manifest."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["modality"], row["source"]), []).append(row)
    trained = {(row["modality"], row["source"]) for row in for_training(rows)}
    return [
        {
            "modality": modality,
            "source": source,
            "licence": "; ".join(sorted({row["licence"] for row in own})),
            "images": len(own),
            "subjects": len({row["subject"] for row in own}),
            **{split: sum(row["split"] == split for row in own) for split in SPLITS},
            "trained_on": (modality, source) in trained,
            "share_alike": any(is_share_alike(row) for row in own),
            "doubt": DOUBTFUL.get(source),
        }
        for (modality, source), own in groups.items()
    ]


def check(folder: str | Path) -> dict[str, Any]:
    """Checks a folder.

    Args:
        folder: Folder with `manifest.csv`.

    Returns:
        `problems`, a sentence each; `sources`, see `source_table`; `manifest`, its SHA-256; `train_files`, the number
        of images that may be trained on; `files`, path -> SHA-256 as found.
    """
    folder = Path(folder)
    rows = read_manifest(folder)
    problems = [*split_problems(rows), *file_problems(folder, rows)]
    return {
        "problems": problems,
        "manifest": sha256(folder / "manifest.csv"),
        "sources": source_table(rows),
        "train_files": len(for_training(rows)),
        "files": {row["file"]: row["sha256"] for row in rows} if not problems else {},
    }


def report(found: dict[str, Any]) -> str:
    """Returns what was found as lines of text."""
    lines = [f"{'source':26} {'modality':15} " + " ".join(f"{split:>8}" for split in SPLITS)]
    lines += [
        f"{one['source']:26} {one['modality']:15} " + " ".join(f"{one[split]:8}" for split in SPLITS)
        for one in found["sources"]
    ]
    totals = [sum(one[split] for one in found["sources"]) for split in SPLITS]
    lines.append(f"{'all':42} " + " ".join(f"{total:8}" for total in totals))
    excluded = sorted({one["source"] for one in found["sources"] if one["share_alike"]})
    lines.append(
        f"\nFor training: {found['train_files']} images. Left out, share-alike: {', '.join(excluded) or 'none'}."
    )
    doubts = {one["source"]: one["doubt"] for one in found["sources"] if one["doubt"]}
    lines += ["Terms in doubt:", *(f"  {source}: {doubt}." for source, doubt in doubts.items())] if doubts else []
    problems = found["problems"]
    lines.append(f"\n{len(problems)} problems." if problems else "\nNo problem.")
    lines += [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more, in the JSON.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    found = check(given.data)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(given.out) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(report(found))
    if found["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
