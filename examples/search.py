# /// script
# requires-python = ">=3.10"
# dependencies = ["medmoe_hf[search]"]
#
# [tool.uv.sources]
# medmoe_hf = { path = ".." }
# ///
"""Encode a few hundred image-text pairs to disk, and search them by text and by image.

python examples/search.py                              # with the checkpoint of the package, or by --model

The same from the command line: `medmoe encode sources.yaml embeds --model FOLDER`, then `medmoe search embeds --text
"a large pleural effusion"`, or `--image scan.png --modality ct`.
"""

import argparse
import tempfile
from pathlib import Path

from medmoe_hf.data import phantom_sample, write_webdataset
from medmoe_hf.data.sources import WebDatasetSource
from medmoe_hf.search import EmbeddingIndex, encode_sources, search

QUERIES = ("a pleural effusion on a chest radiograph", "abdominal ct with a liver metastasis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", help="folder, Hub id or small")
    parser.add_argument("--samples", type=int, default=300, help="number of pairs")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_webdataset(Path(folder) / "data", shards=1, samples_per_shard=arguments.samples, seed=7)
        source = WebDatasetSource(kind="webdataset", name="phantoms", files=[f"{folder}/data/*.tar"])
        embeds = Path(folder) / "embeds"
        # Captions are not written by default, because they may contain PHI; these are synthetic.
        # After an interruption, the same call resumes.
        print(encode_sources([source], embeds, arguments.model, samples_per_shard=100, keep_captions=True))

        for text in QUERIES:
            print(f'\nImages for "{text}":')
            for hit in search(embeds, text, k=3):
                print(f"  {hit}")

        sample = phantom_sample(7, 5)
        sample["image"].save(Path(folder) / "scan.png")
        print(f"\nImages similar to the one with the report: {sample['caption']}")
        for hit in search(embeds, image=Path(folder) / "scan.png", k=3):
            print(f"  {hit}")
        first = search(embeds, image=Path(folder) / "scan.png", k=1)[0]
        if not first.key.endswith("/000000005"):
            raise SystemExit("The nearest neighbour of an indexed image is not the image itself.")

        modality = EmbeddingIndex(embeds).manifest["modalities"][1]
        print(f'\nImages for "{QUERIES[0]}", only those routed to {modality}:')
        for hit in search(embeds, QUERIES[0], modality=modality, k=3):
            print(f"  {hit}")


if __name__ == "__main__":
    main()
