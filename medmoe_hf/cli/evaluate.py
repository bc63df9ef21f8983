"""`medmoe evaluate`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medmoe_hf.cli.errors import errors_of
from medmoe_hf.cli.options import DEFAULT_MODEL

logger = logging.getLogger(__name__)

app = typer.Typer(help="Evaluate models on your copy of a public data set.", no_args_is_help=True)

_Recipe = "Name from `medmoe evaluate recipes`, or a YAML file."
_Data = Annotated[Path, typer.Option("--data", help="Folder of your copy of the data.")]


_Output = Annotated[Path, typer.Option(help="Folder to create, for results.json, results.md and figures.")]
_Model = Annotated[
    str, typer.Argument(help="Folder or Hub id of a MedMoE, CLIP or SigLIP; or open_clip:ARCH[:CHECKPOINT].")
]
_Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]MODEL", help="Another model, and its name in tables; may be repeated."),
]
_Resamples = Annotated[int, typer.Option(min=1, help="Number of bootstrap resamples.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")]


def _evaluation_command(protocol: str | None) -> Callable[..., None]:
    def command(
        recipe: Annotated[str, typer.Option(help=_Recipe)],
        data: _Data,
        output: _Output,
        model: _Model = DEFAULT_MODEL,
        compare: _Compare = None,
        resamples: _Resamples = 1000,
        seed: Annotated[
            int, typer.Option(min=0, help="Random seed of the bootstrap and of the training subsets of probes.")
        ] = 0,
        batch_size: _BatchSize = 32,
        force: _Force = False,
    ) -> None:
        _run(
            protocol,
            [model, *(compare or [])],
            recipe,
            data,
            output=output,
            resamples=resamples,
            seed=seed,
            batch_size=batch_size,
            force=force,
        )

    return command


def _run(protocol: str | None, models: list[str], recipe: str, data: Path, *, output: Path, **settings: Any) -> None:
    """Evaluates models and prints the short table."""
    with errors_of(f"evaluate {protocol or 'all'}"):
        from medmoe_hf.evaluation.report import summary
        from medmoe_hf.evaluation.suite import evaluate

        protocols = None if protocol is None else [protocol]
        results = evaluate(models, recipe, data, protocols, output=output, report=logger.info, **settings)
    typer.echo(f"\n{summary(results)}\n\nWrote {output}: every metric is in results.md.")


for _protocol, _help in {
    "zero-shot": "Classify images by text prompts.",
    "retrieval": "Retrieve reports by image, and images by report.",
    "grounding": "Compare heatmaps of phrases with bounding boxes, and with heatmaps of a made-up word.",
    "routing": "Compare the routers' choices with the known modalities.",
    "all": "Run all protocols that the recipe supports.",
}.items():
    app.command(_protocol, help=_help)(_evaluation_command(None if _protocol == "all" else _protocol))


@app.command("linear-probe")
def linear_probe_command(
    recipe: Annotated[str, typer.Option(help=_Recipe)],
    data: _Data,
    output: _Output,
    model: _Model = DEFAULT_MODEL,
    compare: _Compare = None,
    by: Annotated[
        Literal["image", "case"],
        typer.Option(help="What is classified: images, or cases (subjects), whose images' features are averaged."),
    ] = "image",
    resamples: _Resamples = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap and of the training subsets.")] = 0,
    batch_size: _BatchSize = 32,
    force: _Force = False,
) -> None:
    """Train linear classifiers on frozen features of 1 %, 10 % and 100 % of the training split."""
    _run(
        "linear-probe",
        [model, *(compare or [])],
        recipe,
        data,
        output=output,
        probe_by=by,
        resamples=resamples,
        seed=seed,
        batch_size=batch_size,
        force=force,
    )


@app.command("robustness")
def robustness_command(
    recipe: Annotated[str, typer.Option(help=_Recipe)],
    data: _Data,
    output: _Output,
    model: _Model = DEFAULT_MODEL,
    compare: _Compare = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Column of the table, such as sex, age or site, whose groups are compared; repeatable."),
    ] = None,
    smallest_group: Annotated[int, typer.Option(min=2, help="Groups of fewer subjects are left out.")] = 20,
    corruptions: Annotated[bool, typer.Option(help="Whether images are corrupted, which takes longest.")] = True,
    severity: Annotated[
        list[int] | None, typer.Option(min=1, max=5, help="Severity of corruptions; repeatable. By default all five.")
    ] = None,
    corrupted_images: Annotated[
        int | None, typer.Option(min=1, help="Number of images to corrupt, drawn by SEED. By default all.")
    ] = None,
    resamples: _Resamples = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap and the corruptions.")] = 0,
    batch_size: _BatchSize = 32,
    force: _Force = False,
) -> None:
    """Measure what corrupted images, other words, missing images and groups do to zero-shot classification."""
    settings: dict[str, Any] = {"smallest_group": smallest_group, "corrupted_images": corrupted_images}
    settings |= {"severities": sorted(set(severity))} if severity else {}
    settings |= {} if corruptions else {"corruptions": ()}
    _run(
        "robustness",
        [model, *(compare or [])],
        recipe,
        data,
        output=output,
        groups=group or [],
        robustness_settings=settings,
        resamples=resamples,
        seed=seed,
        batch_size=batch_size,
        force=force,
    )


@app.command()
def check(recipe: Annotated[str, typer.Argument(help=_Recipe)], data: _Data) -> None:
    """Check your copy of a data set. Exits with 1 if it cannot be used."""
    from medmoe_hf.evaluation.recipes import WARNING, check_recipe, load_recipe

    with errors_of("evaluate check"):
        problems = check_recipe(load_recipe(recipe), data)
    for problem in problems:
        typer.echo(problem)
    if any(not problem.startswith(WARNING) for problem in problems):
        raise typer.Exit(1)
    typer.echo(f"{data} can be used.")


@app.command("recipes")
def list_recipes() -> None:
    """List the recipes that come with the package."""
    from medmoe_hf.evaluation.recipes import load_recipe, recipe_names

    for name in recipe_names():
        entry = load_recipe(name)
        typer.echo(f"{name:<18}{entry.title}: {', '.join(entry.tasks)}")
    typer.echo("medmnist:FLAG[_SIZE], medmnist-c:FLAG: the 2D sets of MedMNIST+ and MedMNIST-C (extra medmnist)")
