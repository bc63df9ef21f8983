"""The `medmoe` command: parses arguments and calls the package.

Commands import what they need when they are called, so that `--help` does not load torch.
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from medmoe_hf import __version__
from medmoe_hf.cli import convert, data, evaluate, search
from medmoe_hf.cli.errors import errors_of, is_main_process
from medmoe_hf.cli.options import DEFAULT_MODEL, Force, Out, shares
from medmoe_hf.cli.predict import predict
from medmoe_hf.common.console import close_bars, set_up_logging
from medmoe_hf.errors import ArgumentError

logger = logging.getLogger(__name__)
app = typer.Typer(
    help="MedMoE for Hugging Face: train, publish and evaluate modality-specialised medical image-text models.",
    no_args_is_help=True,
    # Rich tracebacks print local variables, and those may hold patient data.
    pretty_exceptions_show_locals=False,
)

app.add_typer(data.app, name="data")
app.add_typer(convert.app, name="convert")
app.add_typer(evaluate.app, name="evaluate")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medmoe_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show results and errors only, without progress bars.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """MedMoE for Hugging Face: train, publish and evaluate modality-specialised medical image-text models."""
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet are mutually exclusive.")
    set_up_logging(verbose, quiet)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the keys of medmoe_hf.training.TrainConfig.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: model.preset=tiny; may be repeated."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Checkpoint to resume from; auto: the newest of this run, if there is one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run two steps and print the plan; write nothing.")
    ] = False,
) -> None:
    """Train a dual encoder. SIGTERM and Ctrl-C write a checkpoint before the run ends."""
    from medmoe_hf.errors import Interrupted
    from medmoe_hf.training import TrainConfig, plan
    from medmoe_hf.training import train as run

    with errors_of("train"):
        settings = TrainConfig.from_yaml(config, set_ or ())
        if dry_run:
            typer.echo(str(plan(settings)))
            return
        try:
            record = run(settings, resume)
        except Interrupted as interruption:
            close_bars()
            if is_main_process():
                typer.echo(f"medmoe train: {interruption}", err=True)
            raise typer.Exit(128 + interruption.signal) from interruption
    if is_main_process():
        typer.echo(f"Trained {record.steps} steps on {record.samples} pairs in {record.seconds:.0f} s.")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter that `medmoe train` wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base model; by default the one that the adapter names.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Merge a LoRA adapter into its base model, and write a complete model folder."""
    from medmoe_hf.training.adapters import merge_adapter

    with errors_of("merge"):
        merge_adapter(adapter, out, base, force)
    typer.echo(f"Wrote {out}.")


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder for the tar files.")],
    shards: Annotated[int, typer.Option(min=1, help="Number of tar files.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Samples per tar file.")] = 1000,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    image_size: Annotated[int, typer.Option(min=48, help="Height and width of the images in pixels.")] = 224,
) -> None:
    """Write synthetic image-report pairs as WebDataset tar files."""
    from medmoe_hf.data import write_webdataset

    with errors_of("phantom"):
        paths = write_webdataset(out, shards=shards, samples_per_shard=samples, seed=seed, image_size=image_size)
    typer.echo(f"Wrote {len(paths)} tar files with {samples} samples each to {out}.")


@app.command()
def init(
    out: Out,
    preset: Annotated[str, typer.Option(help="Preset: paper, plus, official, small or tiny.")],
    vision: Annotated[
        str | None,
        typer.Option(
            help="Image encoder: folder, Hub id or file of a Swin; timm/NAME of any hierarchical model; or "
            "timm/NAME@FILE with the weights of a local file."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text encoder: folder or Hub id of any BERT-like model.")] = None,
    text_layers: Annotated[
        int | None, typer.Option(min=1, help="Number of first layers of --text to keep; by default all.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, Hub id or vocab.txt; by default that of --text.")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="Corpus to which a WordPiece vocabulary is reduced: text file with one text per line, or YAML file "
            "of sources."
        ),
    ] = None,
    vocabulary_size: Annotated[
        int | None,
        typer.Option(min=1, help="Number of tokens to keep: more than the corpus needs, the most frequent first."),
    ] = None,
    projection_dim: Annotated[int | None, typer.Option(min=1, help="Width of the shared space.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a field of the configuration: vision_config.image_size=224; may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the new weights.")] = 0,
    force: Force = False,
) -> None:
    """Create a new model of a preset from published image and text encoders."""
    from medmoe_hf.common.yaml_files import set_values
    from medmoe_hf.errors import ConvertError
    from medmoe_hf.hub import init_model

    with errors_of("init"):
        overrides = {} if projection_dim is None else {"projection_dim": projection_dim}
        report = init_model(
            out,
            preset,
            vision=vision,
            text=text,
            text_layers=text_layers,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            vocabulary_size=vocabulary_size,
            overrides=set_values(overrides, set_ or (), ConvertError),
            seed=seed,
            force=force,
        )
    typer.echo(f"{report}\nWrote {out}.")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a model and its processor; or a Hub id, with --out.")],
    data: Annotated[Path, typer.Option("--data", help="YAML file with a list of sources that have labels.")],
    task: Annotated[Path, typer.Option("--task", help="YAML file with a task, or a list of tasks.")],
    out: Annotated[Path | None, typer.Option(help="Folder to create; by default MODEL is written anew.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Use the rows with this value of the field `split`; never the test data.")
    ] = None,
    allow_test: Annotated[
        bool, typer.Option("--allow-test", help="Accept a split or file that is called test or external.")
    ] = False,
    coverage: Annotated[float, typer.Option(help="Share of images whose prediction set holds their class.")] = 0.9,
    sensitivity: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=SHARE", help="Wanted sensitivity of a class, such as pneumonia=0.95."),
    ] = None,
    prevalence: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=SHARE", help="Share of a class where the model will be used."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Number of bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of folds and bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    num_workers: Annotated[int, typer.Option(min=0, help="Number of processes that read.")] = 0,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples that may be unusable.")
    ] = 0.05,
    force: Force = False,
) -> None:
    """Fit probabilities, thresholds and prediction sets of tasks on labelled images, and store them in the model."""
    from medmoe_hf.data.sources import load_sources
    from medmoe_hf.evaluation.calibrate import calibrate as run
    from medmoe_hf.inference.task_files import read_task_file

    with errors_of("calibrate"):
        report = run(
            model,
            load_sources(data),
            read_task_file(task),
            out,
            split=split,
            allow_test=allow_test,
            coverage=coverage,
            sensitivity=shares(sensitivity or (), "--sensitivity"),
            prevalence=shares(prevalence or (), "--prevalence"),
            resamples=resamples,
            seed=seed,
            batch_size=batch_size,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
            force=force,
        )
    typer.echo(str(report))


@app.command("fit-rejector")
def fit_rejector(
    model: Annotated[str, typer.Argument(help="Folder of a model and its processor; or a Hub id, with --out.")],
    data: Annotated[Path, typer.Option("--data", help="YAML file with a list of sources that should be accepted.")],
    out: Annotated[Path | None, typer.Option(help="Folder to create; by default MODEL is written anew.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Fit on the rows with this value of the field `split`, such as train.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Set the limits by the rows with this value of the field `split`, which the model was not trained "
            "on, such as val; by default by a fifth of the subjects of the others."
        ),
    ] = None,
    accept: Annotated[float, typer.Option(help="Share of new images like these that is accepted.")] = 0.95,
    allow_test: Annotated[
        bool, typer.Option("--allow-test", help="Accept a split or file that is called test or external.")
    ] = False,
    max_images: Annotated[int, typer.Option(min=1, help="Images of each of the two parts that are read.")] = 5000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of images and subjects.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    num_workers: Annotated[int, typer.Option(min=0, help="Number of processes that read.")] = 0,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples that may be unusable.")
    ] = 0.05,
    force: Force = False,
) -> None:
    """Fit what makes a model refuse images that are unlike those it knows, and store it in the model."""
    from medmoe_hf.data.sources import load_sources
    from medmoe_hf.evaluation.rejector import add_rejector

    with errors_of("fit-rejector"):
        report = add_rejector(
            model,
            load_sources(data),
            out,
            split=split,
            held_out=held_out,
            accept=accept,
            allow_test=allow_test,
            max_images=max_images,
            seed=seed,
            batch_size=batch_size,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
            force=force,
        )
    typer.echo(str(report))


@app.command()
def shrink(
    folder: Annotated[Path, typer.Argument(help="Folder of a model and its processor.")],
    out: Out,
    force: Force = False,
) -> None:
    """Copy a checkpoint with weights in float16, half the size; it still computes in float32. Prints the cost."""
    from medmoe_hf.hub import shrink as run

    with errors_of("shrink"):
        report = run(folder, out, force)
    typer.echo(f"{report}\nWrote {out}.")


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a model and its processor, such as `medmoe train` writes; or small.")
    ],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; created if it does not exist.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository; by default the account's setting."),
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch, by default main; created if it does not exist.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag for the new commit.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would change and send nothing. The local checks need no network."),
    ] = False,
) -> None:
    """Replace the files of a repository by those of a folder, after checking that it loads without this package."""
    from medmoe_hf.hub import publish

    with errors_of("push"):
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
    source: Annotated[str, typer.Argument(help="Folder, small, or user/name on the Hub. Its Python files are run.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Record the reference outputs of a folder that you trust first.")
    ] = False,
) -> None:
    """Check that a checkpoint computes the outputs recorded when it was published. Exits with 1 if it does not."""
    from medmoe_hf.hub import verify as run

    with errors_of("verify"):
        report = run(source, revision, record=record)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Model folder, where README.md is written.")],
    training: Annotated[
        Path | None, typer.Option(help="training.json or YAML file; by default the folder's training.json.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="results.json that `medmoe evaluate` wrote.")] = None,
    repo: Annotated[str | None, typer.Option(help="Hub id that the model will have.")] = None,
    base_model: Annotated[list[str] | None, typer.Option(help="Hub id of a base model; may be repeated.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the weights, such as apache-2.0.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a data set; may be repeated.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a README.md that was not written by this command.")
    ] = False,
) -> None:
    """Write the model card of a folder. Missing information is marked as not stated."""
    from medmoe_hf.hub.card import build_card, write_card

    with errors_of("card"):
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


app.command()(predict)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Folder or Hub id. Its Python files are not run.")] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on. There is no password: mind who reaches it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    max_megabytes: Annotated[
        int, typer.Option(min=1, help="Greatest size of an upload, and of what its zip files hold.")
    ] = 1024,
    max_files: Annotated[
        int, typer.Option(min=1, help="Greatest number of files, and of slices, in an upload.")
    ] = 2000,
    max_seconds: Annotated[int, typer.Option(min=1, help="Longest time of an upload, and of a prediction.")] = 300,
    max_requests: Annotated[int, typer.Option(min=1, help="Number of requests at a time; one is computed.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Slices per batch.")] = 16,
    isolate: Annotated[bool, typer.Option(help="Decode files in processes of their own, with limits.")] = True,
) -> None:
    """Serve predictions of whole studies over HTTP, for this machine only unless --host says otherwise."""
    with errors_of("serve"):
        from medmoe_hf.inference.isolation import DecodingLimits, IsolatedReader
        from medmoe_hf.inference.serving import Limits
        from medmoe_hf.inference.serving import serve as run
        from medmoe_hf.inference.studies import StudyPredictor

        limits = Limits(max_megabytes, max_files, max_seconds, max_requests)
        seconds = min(max_seconds, DecodingLimits().seconds)
        # Before the model, beside which its process imports the libraries.
        with IsolatedReader(DecodingLimits(seconds=seconds)) if isolate else nullcontext() as reader:
            run(StudyPredictor(model, batch_size=batch_size), host, port, limits, reader)


@app.command()
def demo(
    checkpoint: Annotated[str, typer.Argument(envvar="MEDMOE_MODEL", help="Folder or Hub id.")] = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 7860,
    isolate: Annotated[bool, typer.Option(help="Decode files in processes of their own, with limits.")] = True,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also offer tools to assistants, by the Model Context Protocol.")
    ] = False,
    images: Annotated[Path, typer.Option(help="With --mcp: the folder whose pictures assistants may ask about.")] = (
        Path()
    ),
) -> None:
    """Show a checkpoint in the browser, and to assistants. Its Python files are not run."""
    logger.info("Loading the libraries ...")
    with errors_of("demo"):
        from medmoe_hf.common.packaged import packaged_folder
        from medmoe_hf.hub.space.app import launch

        try:
            extend = None
            if mcp:
                from medmoe_hf.hub.mcp_tools import offer

                extend = offer(images)
            launch(packaged_folder(checkpoint), port, isolate, extend)
        except ValueError as error:  # the page's code runs without this package, so it has no errors of ours
            raise ArgumentError(str(error)) from error


@app.command("export")
def export_towers(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id of a dual encoder; or small.")],
    out: Out,
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="File format.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Quantize matrix products to 8 bits; onnx only.")] = False,
    force: Force = False,
) -> None:
    """Export both encoders, with routing, to files that run without this package, and compare their outputs."""
    from medmoe_hf.hub.export import export

    with errors_of("export"):
        report = export(folder, out, format, force, int8)
    typer.echo(f"{report}\nWrote {out}.")


app.command()(search.encode)
app.command()(search.search)
