"""Scores of MedMNIST's own evaluator, and the result files that it names and reads."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.errors import MissingPackageError
from medmoe_hf.evaluation.recipes.schema import MedMNISTLayout
from medmoe_hf.evaluation.results import Result


def standard_results(
    results: Sequence[Result], layout: MedMNISTLayout, data_dir: str | Path, output: str | Path
) -> dict[str, tuple[float, float]]:
    """Scores results by `medmnist.Evaluator`, which also writes its standard file for each of them.

    The files are named `FLAG[_SIZE]_test_[AUC]0.000_[ACC]0.000@RUN.csv`; RUN is model, protocol, variant and number of
    the run in letters, digits and hyphens. `Evaluator.parse_and_evaluate` reads them.

    Args:
        results: Results of a clean set, as `evaluate` returns them.
        layout: That of its recipe.
        data_dir: Folder of the npz file.
        output: Folder to create.

    Returns:
        Run -> AUC and ACC.

    Raises:
        MissingPackageError: The package `medmnist` is not installed.
        PathExistsError: `output` exists.

    Example:
        ```python
        recipe = load_recipe("medmnist:breastmnist_224")
        results = evaluate(["small"], "medmnist:breastmnist_224", "medmnist")
        print(standard_results(results, recipe.layout, "medmnist", "breast"))
        ```
    """
    try:
        from medmnist.evaluator import Evaluator
    except ImportError as error:
        raise MissingPackageError(
            'MedMNIST\'s evaluator needs its package: pip install "medmoe_hf[medmnist]"'
        ) from error
    evaluator: Any = Evaluator(layout.flag, "test", size=layout.size, root=str(data_dir))
    scores: dict[str, tuple[float, float]] = {}
    with atomic_dir(output, force=False) as partial:
        for result in results:
            for variant, probabilities in result.probabilities.items():
                for number in range(probabilities.shape[1]):
                    words = f"{result.model} {result.protocol} {variant} {number}"
                    run = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")
                    found = evaluator.evaluate(np.ascontiguousarray(probabilities[:, number]), str(partial), run)
                    scores[run] = (float(found.AUC), float(found.ACC))
    return scores
