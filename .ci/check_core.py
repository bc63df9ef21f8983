"""Fails unless the core dependencies alone load the packaged checkpoint, answer on a PNG, and encode one in bulk.

python .ci/check_core.py     (in an environment made by `pip install -e .`, without extras)
"""

import csv
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = ("sklearn", "matplotlib", "tensorboard", "pydicom", "nibabel", "peft", "gradio", "onnx", "faiss", "mkdocs")


def main() -> None:
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    if present:
        raise SystemExit(f"This environment has more than the core dependencies: {', '.join(present)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import numpy as np
        import torch
        from PIL import Image
        from transformers import AutoModel, AutoProcessor

        import medmoe_hf

        pixels = np.random.default_rng(0).integers(0, 256, (96, 80), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "scan.png")
        model = AutoModel.from_pretrained(medmoe_hf.pretrained(), trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(medmoe_hf.pretrained(), trust_remote_code=True)
        inputs = processor(images=str(folder / "scan.png"), text=["Chest radiograph."], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image
        assert logits.shape == (1, 1)
        assert bool(torch.isfinite(logits).all())

        with open(folder / "scans.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "caption"), ("scan.png", "Chest radiograph.")])
        (folder / "sources.yaml").write_text(f"- {{kind: csv, files: ['{folder / 'scans.csv'}']}}\n", encoding="utf-8")
        subprocess.run(["medmoe", "encode", str(folder / "sources.yaml"), str(folder / "out")], check=True)
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, medmoe_hf; print('torch' in sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert loaded.stdout.strip() == "False", "`import medmoe_hf` loads torch"
    print("ok: the core dependencies are enough")


if __name__ == "__main__":
    main()
