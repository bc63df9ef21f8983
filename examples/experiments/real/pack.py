"""Makes the checkpoint that is published of a trained folder: half precision, code, golden outputs, card.

    python examples/experiments/real/pack.py TRAINED OUT --run RUN [--recipe train.yaml] [--force]
        [--into medmoe_hf/checkpoints/small]

OUT is complete, was loaded in a process without this package, whose outputs were compared, and has at most 40 MB of
weights. Only with --into it is copied into the package too. What half precision changes is printed; measure OUT on
`val` and compare it with TRAINED before anything is measured on `test`.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from card import write

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.common.packaged import copy_model_code
from medmoe_hf.errors import PublishError
from medmoe_hf.hub import shrink, verify
from medmoe_hf.hub.folder_checks import check_folder

LARGEST = 40_000_000
"""Bytes of `model.safetensors`."""


def clean_configuration(path: Path) -> None:
    """Removes from a configuration what belongs to the run and not to the model.

    These are the folders of this machine that its parts were loaded from, and `positives: label`, with which a table
    without labels could not be trained on.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("_name_or_path", None)
    config.pop("positives", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def pack(
    trained: Path, out: Path, run: Path, recipe: Path | None = None, repo: str | None = None, force: bool = False
) -> str:
    """Writes a complete checkpoint.

    Args:
        trained: Folder that `medmoe train` wrote.
        out: Folder to create.
        run: Folder with the results, for the card.
        recipe: Training YAML, whose hash the card has.
        repo: Hub id for the card's code examples.
        force: Whether to replace `out`.

    Returns:
        Sizes, and what half precision changes.

    Raises:
        PublishError: If the weights are too large, or the checkpoint cannot be published or does not load by itself.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Under its final name, which the card has as its title.
        folder = Path(scratch) / out.resolve().name
        report = shrink(trained, folder)
        if report.after > LARGEST:
            raise PublishError(f"The weights have {report.after / 1e6:.1f} MB, more than {LARGEST / 1e6:g} MB.")
        clean_configuration(folder / "config.json")
        copy_model_code(folder)
        checked = verify(folder, record=True)
        if not checked.ok:
            raise PublishError(f"{trained} has other outputs in a process without this package:\n{checked}")
        write(folder, run, None, repo, recipe)
        problems = check_folder(folder)
        if problems:
            raise PublishError("The checkpoint cannot be published:\n" + "\n".join(problems))
        copy(folder, out, force)
    return str(report)


def copy(folder: Path, target: Path, force: bool) -> None:
    """Copies a checkpoint to a folder that is complete or absent at any time."""
    with atomic_dir(target, force) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        for path in partial.iterdir():
            # safetensors creates files for their owner only; a package is for all.
            path.chmod(0o644)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trained", type=Path, help="folder of the trained model")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--run", required=True, type=Path, help="folder with the JSON files of the results")
    parser.add_argument("--recipe", type=Path, help="training YAML, whose hash the card has")
    parser.add_argument("--repo", help="Hub id for the code examples of the card")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--into", type=Path, help="folder of the package to copy the checkpoint to")
    given = parser.parse_args(arguments)
    print(pack(given.trained, given.out, given.run, given.recipe, given.repo, given.force))
    if given.into is not None:
        copy(given.out, given.into, force=True)
        print(f"Copied to {given.into}.")


if __name__ == "__main__":
    main()
