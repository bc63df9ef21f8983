"""Data recipes: how a public data set is laid out on a user's disk, and how it is scored.

A recipe is a YAML file in `recipe_files/`, or one of the user's own. It specifies which files are expected, what their
columns mean, which classes there are, the prompts of each, where the data come from and what they share with common
training data. No recipe downloads anything: `check_recipe` reports what a copy lacks, `open_recipe` reads one.
"""

from medmoe_hf.errors import RecipeError
from medmoe_hf.evaluation.dataset import Box, EvaluationSet, joined
from medmoe_hf.evaluation.recipes.opening import WARNING, check_recipe, open_recipe
from medmoe_hf.evaluation.recipes.schema import (
    BoxesLayout,
    ClipBenchmarkLayout,
    FolderLayout,
    JoinedTable,
    MedMNISTLayout,
    PhantomLayout,
    Recipe,
    TableLayout,
    load_recipe,
    recipe_names,
)

__all__ = [
    "WARNING",
    "Box",
    "BoxesLayout",
    "ClipBenchmarkLayout",
    "EvaluationSet",
    "FolderLayout",
    "JoinedTable",
    "MedMNISTLayout",
    "PhantomLayout",
    "Recipe",
    "RecipeError",
    "TableLayout",
    "check_recipe",
    "joined",
    "load_recipe",
    "open_recipe",
    "recipe_names",
]
