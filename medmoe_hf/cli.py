"""The `medmoe` command: parses arguments and hands them on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from medmoe_hf.common.console import close_bars, hide_foreign_bars

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
    from medmoe_hf.errors import Interrupted, ShardError, StreamError, TrainingError
    from medmoe_hf.training import TrainConfig, plan
    from medmoe_hf.training import train as run

    with _errors_of("train", TrainingError, StreamError, ShardError):
        read = TrainConfig.from_yaml(config)
        if dry_run:
            typer.echo(str(plan(read)))
            return
        try:
            record = run(read, resume)
        except Interrupted as interruption:
            close_bars()
            if _main_process():
                typer.echo(f"medmoe train: {interruption}", err=True)
            raise typer.Exit(128 + interruption.signal) from interruption
    if _main_process():
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
    problems: Annotated[
        Path | None, typer.Option(help="Read every pair, and write a CSV of all that cannot be used, with reasons.")
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Read every pair, and count what this share of subjects would hold out."),
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read, where every pair is read.")] = 0,
) -> None:
    """Count and show what each source holds, and every problem. Captions are printed: mind who reads along."""
    from medmoe_hf.data.inspection import inspect_sources
    from medmoe_hf.data.sources import load_sources

    with _errors_of("data inspect"):
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
    seen = any(report.looked_at for report in reports)
    typer.echo(f"Contact sheet: {sheet}" if seen else "No contact sheet: no image could be read.")
    if problems is not None:
        typer.echo(f"Problems: {problems}")
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


def _main_process() -> bool:
    """Launchers number the processes that they start."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _errors_of(command: str, *others: type[Exception]) -> Iterator[None]:
    """What a user can mend, in a line and without a traceback; `others` are a command's own."""
    from huggingface_hub.errors import StrictDataclassError  # of a configuration

    mendable: tuple[type[Exception], ...] = (ValueError, ImportError, OSError, StrictDataclassError, *others)
    hide_foreign_bars()
    try:
        yield
    except mendable as error:
        close_bars()
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


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A model and its processor, as `medmoe train` writes them.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; made if it is not there.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repo; by default as the account has it.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="By default main; made if it is not there.")] = None,
    tag: Annotated[str | None, typer.Option(help="A new name for this state.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request, commit nothing.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would change; nothing is sent. Needs no network for the local checks."
        ),
    ] = False,
) -> None:
    """Make a repo hold exactly what a folder holds, in one commit, after checking that it loads anywhere."""
    from medmoe_hf.hub import publish

    with _errors_of("push"):
        report = publish(
            folder,
            repo,
            private=private,
            branch=branch,
            tag=tag,
            message=message,
            create_pr=create_pr,
            dry_run=dry_run,
        )
    typer.echo(str(report))


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="Folder, or user/name on the Hub; its Python files are run.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repo.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="First write the golden outputs of a folder; only of one you trust.")
    ] = False,
) -> None:
    """Check that a published checkpoint gives what it was published with. Exits with 1 if it does not."""
    from medmoe_hf.hub import verify as compare

    with _errors_of("verify"):
        report = compare(source, revision, record=record)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Model folder; its README.md is written.")],
    training: Annotated[Path | None, typer.Option(help="training.json or YAML; by default the folder's.")] = None,
    results: Annotated[Path | None, typer.Option(help="results.json of `medmoe evaluate`.")] = None,
    repo: Annotated[str | None, typer.Option(help="Hub id that the model will have.")] = None,
    base_model: Annotated[list[str] | None, typer.Option(help="Hub id; may be repeated.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights: apache-2.0, say.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id; may be repeated.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that somebody else wrote.")] = False,
) -> None:
    """Write a folder's model card; what nobody states reads "not stated"."""
    from medmoe_hf.hub.card import build_card, write_card

    with _errors_of("card"):
        made = build_card(
            folder,
            training=training,
            results=results,
            repo=repo,
            base_model=base_model,
            license=license,
            datasets=dataset,
        )
        path = write_card(folder, made, force)
    typer.echo(f"Wrote {path}.")


@data.command("push")
def push_sources(
    sources: Annotated[Path, typer.Argument(help="YAML file with a list of sources.")],
    repo: Annotated[str, typer.Argument(help="user/name of the dataset.")],
    format: Annotated[Literal["parquet", "webdataset"], typer.Option(help="Of its files.")] = "parquet",
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a file.")] = 1000,
    license: Annotated[str | None, typer.Option(help="Of the data: cc-by-4.0, say.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new dataset; by default as the account has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove other files under data/, and a card of somebody else's.")
    ] = False,
    i_have_removed_identifiers: Annotated[
        bool, typer.Option("--i-have-removed-identifiers", help="Publish though something looks like an identifier.")
    ] = False,
) -> None:
    """Publish sources as a dataset on the Hub."""
    from medmoe_hf.data.sources import load_sources
    from medmoe_hf.errors import StreamError
    from medmoe_hf.hub.publish_data import push_data

    with _errors_of("data push", StreamError):
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
        )
    typer.echo(f"Published: {address}")


@app.command()
def demo(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder or Hub id; by default what MEDMOE_MODEL says.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 7860,
) -> None:
    """Show a checkpoint in the browser. Its code is run: only those that you trust."""
    typer.echo("Loading the libraries ...")
    with _errors_of("demo"):
        from medmoe_hf.hub.space.app import launch

        launch(checkpoint, port)


@app.command("export")
def export_towers(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id of a dual encoder.")],
    out: _Out,
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="Of the files.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Matrix products in 8 bits; for onnx.")] = False,
    force: _Force = False,
) -> None:
    """Both towers as files that need no Python of ours, routing inside; checked against the model."""
    from medmoe_hf.hub.export import export

    with _errors_of("export"):
        report = export(folder, out, format, force, int8)
    typer.echo(f"{report}\nWrote {out}.")


@app.command()
def encode(
    sources: Annotated[Path, typer.Argument(help="YAML file with a list of sources.")],
    out: Annotated[Path, typer.Argument(help="Folder to make, or to go on with after an interruption.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images, and texts, computed at a time.")] = 64,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Pairs in a file.")] = 2048,
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Of the embeddings on disk.")] = "float16",
    keep_captions: Annotated[
        bool, typer.Option("--keep-captions", help="Write the reports too; they may be about patients.")
    ] = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read, for each that encodes.")] = 0,
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of samples that may be broken.")] = 0.05,
) -> None:
    """Write image and report embeddings of sources as parquet; run again, it goes on where it was."""
    from medmoe_hf.data.sources import load_sources
    from medmoe_hf.errors import ShardError, StreamError
    from medmoe_hf.search import encode_sources

    with _errors_of("encode", StreamError, ShardError):
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
    if _main_process():
        typer.echo(str(record))


@app.command()
def search(
    out: Annotated[Path, typer.Argument(help="Folder that `medmoe encode` wrote.")],
    text: Annotated[str | None, typer.Option(help="What to look for, in words.")] = None,
    image: Annotated[Path | None, typer.Option(help="Or an image to find the like of.")] = None,
    among: Annotated[
        Literal["images", "reports"],
        typer.Option(help="What is compared with it; reports are shown if `encode` kept them (--keep-captions)."),
    ] = "images",
    modality: Annotated[str | None, typer.Option(help="Only images that are routed to this expert.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many.")] = 10,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it was moved.")] = None,
) -> None:
    """Find the pairs nearest to a text or an image. Captions, if they were kept, are printed: mind who reads along."""
    from medmoe_hf.search import hits_table
    from medmoe_hf.search import search as find

    with _errors_of("search"):
        hits = find(out, text, image, among=among, modality=modality, k=k, model=model)
    typer.echo(hits_table(hits, among) if hits else f"No image of {out} is routed to {modality}.")


evaluation = typer.Typer(help="Measure models on a copy of a known data set.", no_args_is_help=True)
app.add_typer(evaluation, name="evaluate")

_Recipe = "A name that `medmoe evaluate recipes` lists, or a YAML file."
_Data = Annotated[Path, typer.Option("--data", help="Folder of your copy of the data.")]


def _evaluation_command(protocol: str | None) -> Callable[..., None]:
    def command(
        model: Annotated[
            str, typer.Argument(help="Folder or Hub id of a MedMoE, CLIP or SigLIP; or open_clip:ARCH[:CHECKPOINT].")
        ],
        recipe: Annotated[str, typer.Option(help=_Recipe)],
        data: _Data,
        output: Annotated[Path, typer.Option(help="Folder to make: results.json, results.md and figures.")],
        compare: Annotated[list[str] | None, typer.Option(help="Another model beside it; may be repeated.")] = None,
        resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap intervals.")] = 1000,
        seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap, and of a probe's draws.")] = 0,
        batch_size: Annotated[int, typer.Option(min=1, help="Images in one pass.")] = 32,
        force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")] = False,
    ) -> None:
        from medmoe_hf.evaluation.report import summary
        from medmoe_hf.evaluation.suite import evaluate

        with _errors_of(f"evaluate {protocol or 'all'}"):
            results = evaluate(
                [model, *(compare or [])],
                recipe,
                data,
                None if protocol is None else [protocol],
                output=output,
                resamples=resamples,
                seed=seed,
                batch_size=batch_size,
                force=force,
                report=typer.echo,
            )
        typer.echo(f"\n{summary(results)}\n\nWrote {output}: every metric is in results.md.")

    return command


for _protocol, _help in {
    "zero-shot": "Classify images by sentences.",
    "linear-probe": "Train linear classifiers on 1 %, 10 % and 100 % of the training part, on frozen features.",
    "retrieval": "Find reports by image and images by report.",
    "grounding": "Hold heat-maps of phrases against boxes, and against heat-maps of nonsense.",
    "routing": "Hold the routers' choices against known modalities.",
    "all": "All that the recipe is made for.",
}.items():
    evaluation.command(_protocol, help=_help)(_evaluation_command(None if _protocol == "all" else _protocol))


@evaluation.command()
def check(recipe: Annotated[str, typer.Argument(help=_Recipe)], data: _Data) -> None:
    """Say what your copy of a data set lacks. Exits with 1 if it cannot be used."""
    from medmoe_hf.evaluation.recipes import WARNING, check_recipe, load_recipe

    with _errors_of("evaluate check"):
        problems = check_recipe(load_recipe(recipe), data)
    for problem in problems:
        typer.echo(problem)
    if any(not problem.startswith(WARNING) for problem in problems):
        raise typer.Exit(1)
    typer.echo(f"{data} can be used.")


@evaluation.command("recipes")
def list_recipes() -> None:
    """List the recipes that come with the package."""
    from medmoe_hf.evaluation.recipes import load_recipe, recipe_names

    for name in recipe_names():
        read = load_recipe(name)
        typer.echo(f"{name:<18}{read.title}: {', '.join(read.tasks)}")


if __name__ == "__main__":
    app()
