"""`medmoe convert`."""

from pathlib import Path
from typing import Annotated

import typer

from medmoe_hf.cli.errors import errors_of
from medmoe_hf.cli.options import Force, Out

app = typer.Typer(help="Convert other checkpoints to model folders.", no_args_is_help=True)

_Checkpoint = Annotated[Path, typer.Argument(help=".ckpt, .pt, .bin or .safetensors file; none of its code is run.")]
_ImageSize = Annotated[
    int, typer.Option(min=64, help="Height and width in pixels of the images that it was trained on.")
]
_TextHeads = Annotated[
    int | None, typer.Option(min=1, help="Number of attention heads of the text encoder; by default width / 64.")
]
_AllowMissing = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of names of tensors that may be missing from the checkpoint; may be repeated."),
]
_CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"
_Tokenizer = Annotated[str, typer.Option(help="Folder, Hub id or vocab.txt.")]


@app.command()
def official(
    checkpoint: _Checkpoint,
    out: Out,
    tokenizer: _Tokenizer = _CLINICAL_BERT,
    official_version: Annotated[
        int, typer.Option(min=1, max=3, help="Variant of the global embedding, which the file does not record.")
    ] = 3,
    image_size: _ImageSize = 224,
    text_heads: _TextHeads = None,
    max_length: Annotated[int, typer.Option(min=3, help="Number of tokens that captions were padded to.")] = 25,
    modality: Annotated[
        list[str] | None, typer.Option(help="Name of an expert; repeat in the order of the experts.")
    ] = None,
    allow_missing: _AllowMissing = None,
    force: Force = False,
) -> None:
    """Convert a checkpoint of the authors' code to a folder that computes the same outputs."""
    from medmoe_hf.hub import convert_official

    with errors_of("convert official"):
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


@app.command()
def medclip(
    checkpoint: _Checkpoint,
    out: Out,
    tokenizer: _Tokenizer = _CLINICAL_BERT,
    preset: Annotated[str, typer.Option(help="Preset of the new model.")] = "paper",
    projection_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the shared space; 512 with preset paper keeps MedCLIP's projections."),
    ] = None,
    image_size: _ImageSize = 224,
    text_heads: _TextHeads = None,
    allow_missing: _AllowMissing = None,
    force: Force = False,
) -> None:
    """Create a new model with MedCLIP's Swin and BERT, the paper's initialisation."""
    from medmoe_hf.hub import convert_medclip

    with errors_of("convert medclip"):
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
