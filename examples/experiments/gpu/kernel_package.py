"""Write the Triton kernels of the local loss as a folder for the library `kernels` of Hugging Face.

    python examples/experiments/gpu/kernel_package.py outputs/medmoe-local-loss

The folder has what kernel-builder reads (build.toml, torch-ext/) and what `kernels` loads (build/torch-cuda/). The
code is copied from the package; an upload needs nothing else.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

NAME, VERSION, LICENSE = "medmoe-local-loss", 1, "Apache-2.0"
MODULES = "local_loss_kernel_medmoe", "local_loss_triton_medmoe"
EXPORTS = "MAX_TEMP1", "MAX_WORDS", "fused_gloria_logits", "kernel_bytes"
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cuda"]

[general.hub]
repo-id = "OWNER/{NAME}"

[torch-noarch]
"""
README = f"""---
library_name: kernels
license: {LICENSE.lower()}
---

# GLoRIA's local loss, forward and backward

Triton kernels for the similarity of word and region embeddings (Huang et al., ICCV 2021) of every image with every
caption; scores and probabilities never reach memory.

```python
from kernels import get_kernel

kernel = get_kernel("OWNER/{NAME}", version={VERSION}, trust_remote_code=True)
logits = kernel.fused_gloria_logits(local_embeds, word_embeds, word_mask, 4.0, 5.0, 10.0)
```

`local_embeds` (B, D, H, W), `word_embeds` (N, W, D) and `word_mask` (N, W) give (B, N). Needs torch and its Triton.
"""


def package_code() -> dict[str, str]:
    """The files of the package by name, the modules as they are."""
    names = ",\n    ".join(EXPORTS)
    listed = ",\n    ".join(f'"{name}"' for name in EXPORTS)
    opening = f'"""Triton kernels of GLoRIA\'s local loss."""\n\nfrom .{MODULES[0]} import (\n    {names},\n)\n'
    files = {"__init__.py": f"{opening}\n__all__ = [\n    {listed},\n]\n"}
    for name in MODULES:
        spec = importlib.util.find_spec(f"medmoe_hf.model.{name}")
        assert spec is not None
        assert spec.origin is not None
        files[f"{name}.py"] = Path(spec.origin).read_text(encoding="utf-8")
    return files


def write(folder: Path) -> None:
    """Writes the folder; its files are overwritten, others left alone."""
    code = package_code()
    # Several versions may be loaded in one process, each under the name of its content.
    content = hashlib.sha256("\0".join(f"{name}\0{code[name]}" for name in sorted(code)).encode()).hexdigest()
    module = NAME.replace("-", "_")
    metadata = {
        "name": NAME,
        "id": f"_{module}_cuda_{content[:7]}",
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    files = {f"torch-ext/{module}/{name}": text for name, text in code.items()}
    files |= {f"build/torch-cuda/{name}": text for name, text in code.items()}
    files |= {"build/torch-cuda/metadata.json": json.dumps(metadata, indent=2) + "\n"}
    for name, text in (files | {"build.toml": BUILD, "README.md": README}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
