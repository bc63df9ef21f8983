"""Copies the current model code into the checkpoints that the package contains.

python .ci/refresh_checkpoints.py     (after every change in medmoe_hf/model)

A checkpoint is published with its own copy of the code, so the copies must not fall behind. Weights, configuration and
golden outputs stay as they are: `medmoe verify small` shows whether the new code still computes the recorded outputs.
"""

import argparse
from pathlib import Path

from medmoe_hf.common.packaged import copy_model_code

PACKAGE = Path(__file__).resolve().parents[1] / "medmoe_hf"


def main() -> None:
    for folder in sorted(path.parent for path in (PACKAGE / "checkpoints").glob("*/config.json")):
        print(f"{folder.relative_to(PACKAGE.parent)}: {copy_model_code(folder)} files of code")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    main()
