"""`medmoe predict`."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from medmoe_hf.cli.errors import errors_of
from medmoe_hf.cli.options import DEFAULT_MODEL, window_of
from medmoe_hf.common.files import check_output
from medmoe_hf.errors import ArgumentError


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """In the block, SIGTERM ends the command as Ctrl-C does, so that what was downloaded is deleted."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def predict(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Files and folders (with their subfolders): DICOM, NIfTI, pictures. Or addresses of DICOMweb: "
            "https://SERVER/PREFIX/studies/UID[/series/UID]."
        ),
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub id. Its Python files are not run.")] = DEFAULT_MODEL,
    labels: Annotated[
        str | None,
        typer.Option(help='Labels to compare, separated by commas: "no finding, pneumonia"; by default by modality.'),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Instead of --labels: YAML or JSON file of labels and sentences, or a task of the model."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Phrase to look for, with a heat-map; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to create, for prediction.json, prediction.csv, report.html and heat-maps."),
    ] = None,
    trust_header: Annotated[
        bool, typer.Option("--trust-header", help="Select the expert by the header's modality, not by the router.")
    ] = False,
    pooling: Annotated[
        Literal["attention", "top-k", "mean"], typer.Option(help="How scores of slices are pooled.")
    ] = "attention",
    plane: Annotated[
        Literal["axial", "coronal", "sagittal"] | None, typer.Option(help="Plane of the slices of NIfTI volumes.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="For CT and NIfTI: a name such as lung, CENTRE,WIDTH, or three names separated by commas."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Slices per batch.")] = 16,
    keep_identifiers: Annotated[
        bool, typer.Option("--keep-identifiers", help="Write UIDs and names of files. They may identify a person.")
    ] = False,
    dicom: Annotated[
        bool,
        typer.Option("--dicom", help="Also write Secondary Captures and Structured Reports; with --keep-identifiers."),
    ] = False,
    max_files: Annotated[int, typer.Option(min=1, help="Greatest number of files from addresses.")] = 5000,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Greatest size of these files.")] = 4096,
    max_seconds: Annotated[int, typer.Option(min=1, help="Longest time of their download.")] = 3600,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Decode files in a process of its own, with limits: for untrusted files.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of --out if it exists.")] = False,
) -> None:
    """Predict whole studies: routing, labels, key slices and heat-maps. Prints a table; --out writes a report."""
    with errors_of("predict"), _ended_cleanly():
        if out is not None:
            check_output(out, force, "prediction.json", paths)
        if dicom and not (out and keep_identifiers):
            raise ArgumentError(
                "--dicom needs --out and --keep-identifiers: the files name the patient of the images."
            )
        from medmoe_hf.inference.dicomweb import DownloadLimits
        from medmoe_hf.inference.studies import predict as run
        from medmoe_hf.inference.studies import summary, write_predictions
        from medmoe_hf.inference.studies.dicom_out import need_highdicom

        if dicom:
            need_highdicom()
        studies = run(
            paths,
            model=model,
            labels=None if labels is None else [label.strip() for label in labels.split(",")],
            task=task,
            text=text,
            trust_header=trust_header,
            pooling=pooling,
            plane=plane,
            window=window_of(window),
            batch_size=batch_size,
            limits=DownloadLimits(max_files, max_megabytes, max_seconds),
            isolate=isolate,
        )
        try:
            typer.echo(summary(studies))
            if out is not None:
                files = write_predictions(studies, out, keep_identifiers=keep_identifiers, dicom=dicom, force=force)
                typer.echo(f"Wrote {out}: {', '.join(path.name for path in files)}.")
                if len(studies) > 1 and not keep_identifiers:
                    typer.echo(
                        "Studies have numbers in place of names; --keep-identifiers also writes the files' names."
                    )
        finally:
            studies.close()
