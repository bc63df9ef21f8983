"""Images in a folder per class, and the folder that `examples/train_from_scratch.py` writes."""

import json
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

from PIL import Image

from medmoe_hf.data.shards import TarShard
from medmoe_hf.errors import RecipeError, ShardError
from medmoe_hf.evaluation.recipes.copies import LocalCopy, Row, expert_id, first_few
from medmoe_hf.evaluation.recipes.schema import FolderLayout, PhantomLayout, Recipe
from medmoe_hf.model.modalities_medmoe import MODALITIES


def read_folders(recipe: Recipe, layout: FolderLayout, folder: Path, copy: LocalCopy) -> None:
    """Reads the splits of a folder layout into `copy`."""
    for split, root in layout.splits.items():
        rows: list[Row] = []
        problems: list[str] = []
        for name in recipe.classes:
            for path in (folder / root / inner for inner in layout.folders.get(name, [name])):
                if not path.is_dir():
                    there = sorted(other.name for other in path.parent.glob("*") if other.is_dir())
                    problems.append(
                        f'There is no folder {path} for images of "{name}" (next to it: {first_few(there) or "none"}'
                        "). Rename yours, or name it under `folders` of a recipe of your own."
                    )
                    continue
                rows += [
                    Row(str(image), split, name, modality=expert_id(recipe.modality, None))
                    for image in sorted(path.iterdir())
                    if image.is_file()
                    and not image.name.startswith(".")
                    and not any(part in image.name for part in layout.without)
                ]
        copy.add(split, rows, problems)


def read_phantoms(layout: PhantomLayout, folder: Path, copy: LocalCopy) -> None:
    """Reads the shards of a phantom layout into `copy`."""
    prompts = folder / layout.prompts
    try:
        copy.prompts = json.loads(prompts.read_text(encoding="utf-8"))
    except OSError:
        copy.problems.append(f"{prompts} is missing. Run examples/train_from_scratch.py; it writes it.")
    except ValueError as error:
        copy.problems.append(f"{prompts} is not valid JSON: {error}. Run examples/train_from_scratch.py again.")
    shards = sorted(folder.glob(layout.shards))
    if not shards:
        copy.problems.append(
            f"No file matches {folder / layout.shards}. Run examples/train_from_scratch.py; it writes shards."
        )
    for path in shards:
        try:
            copy.rows += _phantom_rows(path, copy.prompts)
        except (ShardError, RecipeError) as error:
            copy.problems.append(f"{error} Run examples/train_from_scratch.py again.")


def _phantom_rows(path: Path, prompts: Mapping[str, Mapping[str, list[str]]]) -> Iterator[Row]:
    shard = TarShard(str(path))
    for number in range(len(shard)):
        sample = shard.read(shard.locate(number))
        try:
            facts = json.loads(sample["json"])
            modality, finding, box = int(sample["cls"]), facts["finding"], facts["box"]
            row = Row(
                Image.open(BytesIO(sample["png"])),
                label=finding,
                caption=sample["txt"].decode(),
                subject=facts["id"],
                modality=modality,
                phrase=facts["finding_word"],
                boxes=[(box[0], box[1], box[2], box[3])] if box else [],
            )
        except (KeyError, ValueError, IndexError, OSError) as error:
            expected = "png, txt, cls and json (id, finding, finding_word, box), as in the shards that it writes"
            raise RecipeError(f"{path}: sample {sample['__key__']} lacks {expected}; {error!r}.") from error
        name = MODALITIES[modality] if modality in range(len(MODALITIES)) else None
        if prompts and finding not in prompts.get(name or "", {}):
            raise RecipeError(f"{path}: sample {sample['__key__']} is {name} {finding}, which has no prompts.")
        yield row
    if shard.truncated:
        raise RecipeError(f"{path} is truncated.")
