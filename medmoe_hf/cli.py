"""The `medmoe` command: parses arguments and hands them on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    resume: Annotated[
        str | None, typer.Option(help="A checkpoint to go on from; auto: the newest of this run, if there is one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Two steps and the plan; nothing is written.")] = False,
) -> None:
    """Train a dual encoder as a YAML file says. SIGTERM and Ctrl-C leave a checkpoint."""
    # Imports inside: `medmoe --help` should not wait for torch.
    from medmoe_hf.data.shards import ShardError
    from medmoe_hf.data.stream import StreamError
    from medmoe_hf.training import Interrupted, TrainConfig, TrainingError, plan
    from medmoe_hf.training import train as run

    main_process = os.environ.get("RANK", "0") == "0"  # launchers number the processes that they start
    try:
        with _errors_of("train"):
            read = TrainConfig.from_yaml(config)
            if dry_run:
                typer.echo(str(plan(read)))
                return
            record = run(read, resume)
    except Interrupted as interruption:
        if main_process:
            typer.echo(f"medmoe train: {interruption}", err=True)
        raise typer.Exit(128 + interruption.signal) from interruption
    except (TrainingError, StreamError, ShardError) as error:
        raise SystemExit(f"medmoe train: {error}") from error
    if main_process:
        typer.echo(f"Trained {record.steps} steps on {record.samples} pairs in {record.seconds:.0f} s.")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter, as `medmoe train` writes it.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of its base; by default where it says.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Add a LoRA adapter to its base: a model folder that needs neither."""
    from medmoe_hf.training.adapters import merge_adapter

    with _errors_of("merge"):
        merge_adapter(adapter, out, base, force)
    typer.echo(f"Wrote {out}.")


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


data = typer.Typer(help="Look at data before training on them.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("inspect")
def inspect_data(
    sources: Annotated[Path, typer.Argument(help="YAML file with a list of sources.")],
    sheet: Annotated[Path, typer.Option(help="Contact sheet to write.")] = Path("contact_sheet.png"),
    samples: Annotated[int, typer.Option(min=1, help="Samples of each source to read.")] = 48,
) -> None:
    """Count and show what each source holds, and every problem. Captions are printed: mind who reads along."""
    from medmoe_hf.data.inspection import inspect_sources
    from medmoe_hf.data.sources import load_sources

    with _errors_of("data inspect"):
        reports = inspect_sources(load_sources(sources), sheet, samples)
    for report in reports:
        typer.echo(f"{report}\n")
    typer.echo(f"Contact sheet: {sheet}")
    if any(report.problems for report in reports):
        raise typer.Exit(1)


@data.command()
def overlap(
    first: Annotated[Path, typer.Argument(help="YAML file with a list of sources, the training data say.")],
    second: Annotated[Path, typer.Argument(help="The same for the test data.")],
    distance: Annotated[int, typer.Option(min=0, max=12, help="Bits of 64 that may differ.")] = 4,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 0,
) -> None:
    """Find images that stand in both lists, equal or looking the same. Exits with 1 if there are any."""
    from medmoe_hf.data.overlap import find_overlap
    from medmoe_hf.data.sources import load_sources

    with _errors_of("data overlap"):
        found = find_overlap(load_sources(first), load_sources(second), distance, num_workers)
    typer.echo(str(found))
    if found.exact or found.near:
        raise typer.Exit(1)


convert = typer.Typer(help="Turn other checkpoints into folders that load anywhere.", no_args_is_help=True)
app.add_typer(convert, name="convert")

_Checkpoint = Annotated[Path, typer.Argument(help=".ckpt, .pt, .bin or .safetensors; no code in it is run.")]
_Out = Annotated[Path, typer.Argument(help="Folder to make.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
_ImageSize = Annotated[int, typer.Option(min=64, help="Side of the images it was trained on.")]
_TextHeads = Annotated[int | None, typer.Option(min=1, help="Attention heads of the BERT; width / 64 by default.")]
_AllowMissing = Annotated[
    list[str] | None, typer.Option(help="Pattern of tensors (in our names) that may be missing; may be repeated.")
]
_CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"
_Tokenizer = Annotated[str, typer.Option(help="Folder, Hub id or vocab.txt.")]


@contextmanager
def _errors_of(command: str) -> Iterator[None]:
    """What a user can mend, in a line and without a traceback."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"medmoe {command}: {error}") from error


@convert.command()
def official(
    checkpoint: _Checkpoint,
    out: _Out,
    tokenizer: _Tokenizer = _CLINICAL_BERT,
    official_version: Annotated[
        int, typer.Option(min=1, max=3, help="Where the global embedding comes from; the file does not say.")
    ] = 3,
    image_size: _ImageSize = 224,
    text_heads: _TextHeads = None,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens that captions were padded to.")] = 25,
    modality: Annotated[list[str] | None, typer.Option(help="Name of an expert; repeat in order.")] = None,
    allow_missing: _AllowMissing = None,
    force: _Force = False,
) -> None:
    """A checkpoint of the authors' code; the folder gives its numbers."""
    from medmoe_hf.hub import convert_official

    with _errors_of("convert official"):
        report = convert_official(
            checkpoint,
            out,
            tokenizer=tokenizer,
            official_version=official_version,
            image_size=image_size,
            text_heads=text_heads,
            max_length=max_length,
            modalities=modality,
            allow_missing=allow_missing or (),
            force=force,
        )
    typer.echo(f"{report}\nWrote {out}.")


@convert.command()
def medclip(
    checkpoint: _Checkpoint,
    out: _Out,
    tokenizer: _Tokenizer = _CLINICAL_BERT,
    preset: Annotated[str, typer.Option(help="Of the new model.")] = "paper",
    projection_dim: Annotated[
        int | None, typer.Option(min=1, help="512 on a paper model keeps MedCLIP's projections too.")
    ] = None,
    image_size: _ImageSize = 224,
    text_heads: _TextHeads = None,
    allow_missing: _AllowMissing = None,
    force: _Force = False,
) -> None:
    """MedCLIP's Swin and BERT in a new model: the paper's initialisation."""
    from medmoe_hf.hub import convert_medclip

    with _errors_of("convert medclip"):
        report = convert_medclip(
            checkpoint,
            out,
            tokenizer=tokenizer,
            preset=preset,
            projection_dim=projection_dim,
            image_size=image_size,
            text_heads=text_heads,
            allow_missing=allow_missing or (),
            force=force,
        )
    typer.echo(f"{report}\nWrote {out}.")


@app.command()
def init(
    out: _Out,
    preset: Annotated[str, typer.Option(help="paper, plus, official or tiny.")],
    vision: Annotated[
        str | None, typer.Option(help="A Swin: folder, Hub id or file; or timm/<name>, any hierarchical model.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Any BERT-like model: folder or Hub id.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder, Hub id or vocab.txt; by default the text's.")] = None,
    projection_dim: Annotated[int | None, typer.Option(min=1, help="Width of the shared space.")] = None,
    seed: Annotated[int, typer.Option(help="Of the new parts.")] = 0,
    force: _Force = False,
) -> None:
    """A new model of a preset, on published towers."""
    from medmoe_hf.hub import init_model

    with _errors_of("init"):
        report = init_model(
            out,
            preset,
            vision=vision,
            text=text,
            tokenizer=tokenizer,
            overrides={} if projection_dim is None else {"projection_dim": projection_dim},
            seed=seed,
            force=force,
        )
    typer.echo(f"{report}\nWrote {out}.")


if __name__ == "__main__":
    app()
