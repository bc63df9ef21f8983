"""The `medmoe` command: parses arguments and hands them on."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="MedMoE for Hugging Face: train, publish and evaluate modality-specialised medical image-text models.",
    no_args_is_help=True,
    add_completion=False,
    # Rich tracebacks print local variables, and those may hold patient data.
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Keeps `medmoe` a group of commands."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; its keys are medmoe_hf.training.TrainConfig's.")],
) -> None:
    """Train a dual encoder as a YAML file says."""
    # Imports inside: `medmoe --help` should not wait for torch.
    from medmoe_hf.training import ConfigError, TrainConfig, TrainingError
    from medmoe_hf.training import train as run

    try:
        record = run(TrainConfig.from_yaml(config))
    except (ConfigError, TrainingError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(f"medmoe train: {error}") from error
    typer.echo(f"Trained {record.steps} steps on {record.samples} pairs in {record.seconds:.0f} s.")


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder for the tars.")],
    shards: Annotated[int, typer.Option(min=1, help="Number of tars.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Samples in each tar.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which sequence of samples.")] = 0,
    image_size: Annotated[int, typer.Option(min=48, help="Side of the images in pixels.")] = 224,
) -> None:
    """Write synthetic image-report pairs as webdataset tars."""
    from medmoe_hf.data import write_webdataset

    try:
        paths = write_webdataset(out, shards=shards, samples_per_shard=samples, seed=seed, image_size=image_size)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f"medmoe phantom: {error}") from error
    typer.echo(f"Wrote {len(paths)} tars with {samples} samples each to {out}.")
