"""The example that ends with `--push`, against a Hub on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

from medmoe_hf.data import phantom_vocabulary
from medmoe_hf.hub import verify
from medmoe_hf.model import MedMoEConfig, MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_fine_tune_and_push(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = MedMoETokenizer.from_words(phantom_vocabulary(), max_length=48)
    config = MedMoEConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)})
    MedMoEModel(config).save_pretrained(tmp_path / "start")
    MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(
        tmp_path / "start"
    )
    script = ROOT / "examples" / "train_on_your_data.py"
    with LoopbackHub() as hub:
        found = subprocess.run(
            [
                *(sys.executable, str(script), "--model", str(tmp_path / "start"), "--output", str(tmp_path / "mine")),
                *("--steps", "2", "--push", "user/mine"),
            ],
            env=hub.environment(tmp_path / "home", "hf_write"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr[-3000:]
        repo = hub.repo("user/mine")
        assert repo.private
        files = repo.files()
        assert {"model.safetensors", "golden.safetensors", "modeling_medmoe.py", "README.md"} <= set(files)
        assert str(tmp_path).encode() not in b"".join(content for name, content in files.items() if "safe" not in name)
        card = ModelCard(files["README.md"].decode())
        assert card.data.pipeline_tag == "zero-shot-image-classification"
        assert "user/mine" in card.text
        hub.use(monkeypatch, tmp_path / "another", "hf_write")
        assert verify("user/mine").ok
    assert hub.unknown == []
