"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from medmoe_hf.common.packaged import PACKAGED

DEFAULT_MODEL = PACKAGED[0]
"""What commands use when no model is named."""

Out = Annotated[Path, typer.Argument(help="Folder to create.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
