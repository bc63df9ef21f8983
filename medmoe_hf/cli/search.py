"""`medmoe encode` and `medmoe search`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medmoe_hf.cli.errors import errors_of, is_main_process
from medmoe_hf.cli.options import DEFAULT_MODEL
from medmoe_hf.errors import ArgumentError


def encode(
    context: typer.Context,
    sources: Annotated[Path, typer.Argument(help="YAML file with a list of sources.")],
    out: Annotated[Path, typer.Argument(help="Folder to create, or to continue after an interruption.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id.")] = DEFAULT_MODEL,
    batch_size: Annotated[int, typer.Option(min=1, help="Images, and texts, per batch.")] = 64,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Pairs per file.")] = 2048,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="Data type of the embeddings on disk.")
    ] = "float16",
    keep_captions: Annotated[
        bool, typer.Option("--keep-captions", help="Write the reports too. They may contain PHI.")
    ] = False,
    num_workers: Annotated[
        int, typer.Option(min=0, help="Number of processes that read, per process that encodes.")
    ] = 0,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples that may be unusable.")
    ] = 0.05,
    layout: Annotated[
        Literal["parquet", "eva"],
        typer.Option(help="`eva`: images with labels as kaiko-eva reads them, a file each and manifest.csv."),
    ] = "parquet",
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Split to write, with layout eva.")] = "train",
) -> None:
    """Write image and report embeddings of sources as Parquet files. Run again, it continues where it stopped."""
    from medmoe_hf.data.sources import load_sources

    with errors_of("encode"):
        others = ("split",) if layout == "parquet" else ("samples_per_shard", "dtype", "keep_captions")
        for name in others:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise ArgumentError(f"--{name.replace('_', '-')} does not go with --layout {layout}.")
        if layout == "eva":
            from medmoe_hf.search.eva import encode_for_eva

            count = encode_for_eva(
                load_sources(sources),
                out,
                model,
                split,
                batch_size=batch_size,
                num_workers=num_workers,
                max_bad_fraction=max_bad_fraction,
            )
            typer.echo(f"{count} images encoded as {split} of {out}.")
            return
        from medmoe_hf.search import encode_sources

        record = encode_sources(
            load_sources(sources),
            out,
            model,
            batch_size=batch_size,
            samples_per_shard=samples_per_shard,
            dtype=dtype,
            keep_captions=keep_captions,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
        )
    if is_main_process():
        typer.echo(str(record))


def search(
    out: Annotated[Path, typer.Argument(help="Folder that `medmoe encode` wrote.")],
    text: Annotated[str | None, typer.Option(help="Text to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to search for instead.")] = None,
    among: Annotated[
        Literal["images", "reports"],
        typer.Option(help="What to search. Reports are shown if `medmoe encode` kept them (--keep-captions)."),
    ] = "images",
    modality: Annotated[str | None, typer.Option(help="Search only images that are routed to this expert.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Number of results.")] = 10,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of the model, if it was moved.")] = None,
) -> None:
    """Find the pairs nearest to a text or an image. Warning: prints captions, if kept, which may contain PHI."""
    from medmoe_hf.search import hits_table
    from medmoe_hf.search import search as find

    with errors_of("search"):
        hits = find(out, text, image, among=among, modality=modality, k=k, model=model)
    typer.echo(hits_table(hits, among) if hits else f"No image of {out} is routed to {modality}.")
