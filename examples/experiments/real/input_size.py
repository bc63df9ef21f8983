"""Copies a trained folder with another side of the images that it reads; the weights stay as they are.

    python examples/experiments/real/input_size.py TRAINED OUT --side 192

Random zooms make structures larger in training than they are in whole images, so that a network often does better on
somewhat larger images than those it was trained on. Measure several sides on `val` with `evaluate.py`, and choose
there. An image takes (side / side of the training)^2 times as long.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.errors import ArgumentError

SMALLEST = 32
"""Pixels: the deepest map of the backbone has one position."""


def change(folder: Path, side: int) -> None:
    """Sets the side in the configurations of a folder.

    Args:
        folder: Folder with `config.json` and `processor_config.json`.
        side: Of the square images that the model reads, in pixels.
    """

    def edit(name: str, part: str, key: str, value: Any) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        content[part][key] = value
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    edit("config.json", "vision_config", "image_size", side)
    edit("processor_config.json", "image_processor", "size", {"height": side, "width": side})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trained", type=Path, help="folder of the trained model")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--side", required=True, type=int, help="of the images, in pixels")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    given = parser.parse_args(arguments)
    if given.side < SMALLEST:
        raise ArgumentError(f"--side {given.side}: give at least {SMALLEST} pixels.")
    with atomic_dir(given.out, given.force) as partial:
        shutil.copytree(given.trained, partial, dirs_exist_ok=True)
        change(partial, given.side)
    print(f"{given.out} reads images of {given.side} x {given.side} pixels.")


if __name__ == "__main__":
    main()
