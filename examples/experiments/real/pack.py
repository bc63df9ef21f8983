"""Makes the checkpoint that is published of a trained folder: half precision, code, golden outputs, card.

    python examples/experiments/real/pack.py TRAINED OUT --run RUN [--recipe train.yaml] [--force]
        [--into medmoe_hf/checkpoints/small]

OUT is complete and was loaded in a process without this package, whose outputs were compared; it is at most 40 MB.
Only with --into it is copied into the package too. The cost of half precision is printed as the largest differences
of the outputs; measure OUT on `val` and compare it with TRAINED before anything is measured on `test`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from card import write
from safetensors.torch import load_file, save_file

import medmoe_hf.model
from medmoe_hf.common.files import atomic_dir
from medmoe_hf.errors import PublishError
from medmoe_hf.hub import verify, write_golden
from medmoe_hf.hub.folder_checks import GOLDEN, check_folder

LARGEST = 40_000_000
"""Bytes of `model.safetensors`."""

_KEPT = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
_WEIGHTS = "model.safetensors"


def halve(source: Path, target: Path) -> None:
    """Writes weights in half precision; integers stay as they are.

    Args:
        source: Weights as safetensors.
        target: File to write, which may be the same one.

    Raises:
        PublishError: If a weight is too large for half precision.
    """
    tensors = load_file(source)
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    wrong = [name for name, value in half.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise PublishError(f"{source}: {wrong[0]} does not fit into half precision, whose largest number is 65504.")
    save_file(half, target, metadata={"format": "pt"})


def copy_code(folder: Path) -> None:
    """Copies the current model code into a checkpoint."""
    for path in sorted(Path(medmoe_hf.model.__file__).parent.glob("*_medmoe.py")):
        shutil.copyfile(path, folder / path.name)


def differences(first: Path, second: Path) -> dict[str, float]:
    """Returns the largest difference of each output in two golden files, relative to its largest value."""
    one, other = load_file(first), load_file(second)
    return {
        name: float((one[name].double() - other[name].double()).abs().max() / one[name].double().abs().max())
        for name in one
        if name.startswith("output.") and one[name].is_floating_point()
    }


def pack(
    trained: Path, out: Path, run: Path, recipe: Path | None = None, repo: str | None = None, force: bool = False
) -> dict[str, float]:
    """Writes a complete checkpoint.

    Args:
        trained: Folder that `medmoe train` wrote.
        out: Folder to create.
        run: Folder with the results, for the card.
        recipe: Training YAML, whose hash the card has.
        repo: Hub id for the card's code examples.
        force: Whether to replace `out`.

    Returns:
        Largest relative difference of each output to those of full precision.

    Raises:
        PublishError: If a file is missing, the weights are too large, or the checkpoint does not load by itself.
    """
    with atomic_dir(out, force) as folder:
        for name in _KEPT:
            if (trained / name).is_file():
                shutil.copyfile(trained / name, folder / name)
        shutil.copyfile(trained / _WEIGHTS, folder / _WEIGHTS)
        copy_code(folder)
        # transformers loads in the type that the configuration names: on a CPU half precision would be slow.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        full = write_golden(folder).rename(folder / "full.safetensors")
        halve(folder / _WEIGHTS, folder / _WEIGHTS)
        size = (folder / _WEIGHTS).stat().st_size
        if size > LARGEST:
            raise PublishError(
                f"The weights have {size / 1e6:.1f} MB in half precision, more than {LARGEST / 1e6:g} MB."
            )
        report = verify(folder, record=True)
        if not report.ok:
            raise PublishError(f"{trained} has other outputs in a process without this package: {report}")
        found = differences(full, folder / GOLDEN)
        full.unlink()
        write(folder, run, trained / "training.json", repo, recipe)
        problems = check_folder(folder)
        if problems:
            raise PublishError("The checkpoint cannot be published:\n" + "\n".join(problems))
    return found


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
    found = pack(given.trained, given.out, given.run, given.recipe, given.repo, given.force)
    size = (given.out / _WEIGHTS).stat().st_size
    print(f"{given.out}: {size / 1e6:.1f} MB of weights; largest differences by half precision:")
    print("\n".join(f"  {name.removeprefix('output.')}: {value:.1e}" for name, value in found.items()))
    if given.into is not None:
        with atomic_dir(given.into, force=True) as folder:
            shutil.copytree(given.out, folder, dirs_exist_ok=True)
        print(f"Copied to {given.into}.")


if __name__ == "__main__":
    main()
