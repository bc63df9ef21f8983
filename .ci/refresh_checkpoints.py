"""Copies the current model code into the checkpoints that the package contains.

python .ci/refresh_checkpoints.py     (after every change in medmoe_hf/model)

A checkpoint is published with its own copy of the code, so the copies must not fall behind. Weights, configuration and
golden outputs stay as they are: `medmoe verify small` shows whether the new code still computes the recorded outputs.
"""

import argparse
import shutil
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "medmoe_hf"


def main() -> None:
    code = [*sorted((PACKAGE / "model").glob("*_medmoe.py")), PACKAGE / "model" / "handler.py"]
    for folder in sorted(path.parent for path in (PACKAGE / "checkpoints").glob("*/config.json")):
        for copy in folder.glob("*.py"):
            copy.unlink()
        for path in code:
            shutil.copyfile(path, folder / path.name)
        print(f"{folder.relative_to(PACKAGE.parent)}: {len(code)} files of code")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    main()
