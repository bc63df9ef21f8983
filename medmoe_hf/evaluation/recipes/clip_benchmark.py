"""Reads sets in the webdataset layout of CLIP_benchmark."""

from io import BytesIO
from pathlib import Path

from PIL import Image

from medmoe_hf.data.clip_benchmark import read_names, split_shards
from medmoe_hf.data.fields import IMAGE_FIELDS, find_field
from medmoe_hf.errors import PathNotFoundError, RecipeError, ShardError, SourceError
from medmoe_hf.evaluation.dataset import Split
from medmoe_hf.evaluation.recipes.copies import LocalCopy, Row, expert_id
from medmoe_hf.evaluation.recipes.schema import ClipBenchmarkLayout, Recipe


def read_clip_benchmark(recipe: Recipe, layout: ClipBenchmarkLayout, folder: Path, copy: LocalCopy) -> None:
    """Reads the splits of a folder into `copy`, with its classes and a sentence per class and template.

    The files of the images are in memory, and are decoded when they are needed.
    """
    try:
        classes, templates = read_names(folder)
    except (PathNotFoundError, SourceError) as error:
        copy.problems.append(str(error))
        return
    copy.class_prompts = {name: [template.format(c=name) for template in templates] for name in classes}
    for split, name in layout.splits.items():
        if split != "test" and not (folder / name).is_dir():
            continue
        try:
            copy.add(split, _rows(recipe, folder, split, name, classes, templates[0]), [])
        except (PathNotFoundError, SourceError, ShardError, RecipeError) as error:
            copy.add(split, [], [str(error)])


def _rows(recipe: Recipe, folder: Path, split: Split, name: str, classes: list[str], template: str) -> list[Row]:
    rows = []
    for shard in split_shards(folder, name, classes, template):
        for number in range(len(shard)):
            sample = shard.read(shard.locate(number))
            field = find_field(sample, None, IMAGE_FIELDS)
            try:
                if field is None:
                    raise ValueError("no image")
                image = Image.open(BytesIO(sample[field]))
            except (OSError, ValueError) as error:
                raise RecipeError(
                    f"{shard.name}: the image of {sample['__key__']} cannot be read: {error}."
                ) from error
            modality = expert_id(recipe.modality, None)
            rows.append(Row(image, split, label=sample["label"], modality=modality, part=folder.resolve().name))
        if shard.truncated:
            raise RecipeError(f"{shard.name} is truncated. Copy it again.")
    return rows
