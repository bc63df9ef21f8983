"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Argument(help="Folder to create.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
