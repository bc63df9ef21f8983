"""`medmoe data`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medmoe_hf.cli.errors import errors_of

app = typer.Typer(help="Inspect data before training on them, and publish them.", no_args_is_help=True)


@app.command("inspect")
def inspect_data(
    sources: Annotated[Path, typer.Argument(help="YAML file with a list of sources.")],
    sheet: Annotated[Path, typer.Option(help="Contact sheet to write.")] = Path("contact_sheet.png"),
    samples: Annotated[int, typer.Option(min=1, help="Samples to read per source.")] = 48,
    problems: Annotated[
        Path | None, typer.Option(help="CSV file to write: every pair that cannot be used, and why. Reads all pairs.")
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of subjects to hold out: count the pairs of each split. Reads all pairs."
        ),
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Number of processes that read, if all pairs are read.")] = 0,
    balance: Annotated[
        str | None,
        typer.Option(help="Also print the shares that these keys lead to in training, such as modality,source,label."),
    ] = None,
    balance_power: Annotated[float | None, typer.Option(min=0, max=1, help="As in a training YAML.")] = None,
) -> None:
    """Count pairs, and show samples and problems per source. Warning: prints captions, which may contain PHI."""
    from medmoe_hf.data.inspection import inspect_sources
    from medmoe_hf.data.sources import load_sources

    with errors_of("data inspect"):
        reports = inspect_sources(
            load_sources(sources),
            sheet,
            samples,
            problems=problems,
            validation_share=validation_share,
            num_workers=num_workers,
        )
    for report in reports:
        typer.echo(f"{report}\n")
    seen = any(report.read for report in reports)
    typer.echo(f"Contact sheet: {sheet}" if seen else "No contact sheet: no image could be read.")
    if problems is not None:
        typer.echo(f"Problems: {problems}")
    if balance is not None:
        from medmoe_hf.data.balancing import DEFAULT_POWER
        from medmoe_hf.data.stream import SampleStream

        with errors_of("data inspect"):
            keys = [key.strip() for key in balance.split(",")]
            power = DEFAULT_POWER if balance_power is None else balance_power
            rows = SampleStream(load_sources(sources), balance=keys, balance_power=power).balanced_rows
        typer.echo(f"\nBalanced by {', '.join(keys)} (power {power:g})")
        for line in rows.lines():
            typer.echo(line)
    if any(report.problems for report in reports):
        raise typer.Exit(1)


@app.command()
def overlap(
    first: Annotated[Path, typer.Argument(help="YAML file with a list of sources, such as the training data.")],
    second: Annotated[Path, typer.Argument(help="YAML file with another list, such as the test data.")],
    distance: Annotated[
        int,
        typer.Option(
            min=0, max=12, help="Number of differing bits, of 64, up to which two images count as near duplicates."
        ),
    ] = 4,
    num_workers: Annotated[int, typer.Option(min=0, help="Number of processes that read.")] = 0,
) -> None:
    """Find images that are in both lists: exact and near duplicates. Exits with 1 if there are any."""
    from medmoe_hf.data.overlap import find_overlap
    from medmoe_hf.data.sources import load_sources

    with errors_of("data overlap"):
        found = find_overlap(load_sources(first), load_sources(second), distance, num_workers)
    typer.echo(str(found))
    if found.exact or found.near:
        raise typer.Exit(1)


_Declared = Annotated[
    bool,
    typer.Option("--i-have-removed-identifiers", help="Write even if something looks like a patient identifier."),
]


@app.command("export")
def export_sources(
    sources: Annotated[Path, typer.Argument(help="YAML file with a list of sources.")],
    folder: Annotated[Path, typer.Argument(help="Folder to create; for clip_benchmark, also one to add a split to.")],
    layout: Annotated[
        Literal["clip_benchmark", "open_clip", "parquet", "webdataset"],
        typer.Option(help="clip_benchmark: tars with classes; open_clip: a CSV; the others: as `data push` uploads."),
    ],
    split: Annotated[str, typer.Option(help="Name of the split, for clip_benchmark.")] = "test",
    template: Annotated[
        list[str] | None,
        typer.Option(help="Sentence with {c} in place of the class, for clip_benchmark; may be repeated."),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per file; open_clip has a file per image.")] = 1000,
    i_have_removed_identifiers: _Declared = False,
) -> None:
    """Write sources to a folder, in a layout that other libraries read."""
    from medmoe_hf.data.sources import load_sources
    from medmoe_hf.errors import ArgumentError

    with errors_of("data export"):
        if layout != "clip_benchmark" and (template or split != "test"):
            raise ArgumentError("--split and --template go with --layout clip_benchmark.")
        if layout in ("parquet", "webdataset"):
            from medmoe_hf.hub.publish_data import export_data

            export_data(load_sources(sources), folder, layout, shard_size, i_have_removed_identifiers)
        elif layout == "open_clip":
            from medmoe_hf.hub.data_layouts import export_open_clip

            export_open_clip(load_sources(sources), folder, i_have_removed_identifiers)
        else:
            from medmoe_hf.hub.data_layouts import export_clip_benchmark

            export_clip_benchmark(
                load_sources(sources), folder, split, template or (), shard_size, i_have_removed_identifiers
            )
    typer.echo(f"Written: {folder}")


@app.command("push")
def push_sources(
    sources: Annotated[Path, typer.Argument(help="YAML file with a list of sources.")],
    repo: Annotated[str, typer.Argument(help="user/name of the data set on the Hub.")],
    format: Annotated[Literal["parquet", "webdataset"], typer.Option(help="File format.")] = "parquet",
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per file.")] = 1000,
    license: Annotated[str | None, typer.Option(help="License of the data, such as cc-by-4.0.")] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new data set; by default the account's setting."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Remove other files under data/, and replace a card that was not written by this command.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check everything, print what would change, and send nothing.")
    ] = False,
    i_have_removed_identifiers: _Declared = False,
) -> None:
    """Publish sources as a data set on the Hub."""
    from medmoe_hf.data.sources import load_sources
    from medmoe_hf.hub.publish_data import push_data

    with errors_of("data push"):
        address = push_data(
            load_sources(sources),
            repo,
            format,
            shard_size,
            i_have_removed_identifiers,
            license=license,
            private=private,
            revision=revision,
            create_pr=create_pr,
            replace=replace,
            dry_run=dry_run,
        )
    typer.echo(address if dry_run else f"Published: {address}")
