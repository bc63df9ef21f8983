"""LoRA: few parameters, a folder that PEFT loads on the base, and merged weights that say the same."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_models import SMALL
from test_loop import config
from typer.testing import CliRunner

from medmoe_hf import MedMoEConfig, MedMoEModel, MedMoEProcessor
from medmoe_hf.cli import app
from medmoe_hf.data import phantom_sample
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.training import train
from medmoe_hf.training.adapters import add_lora, merge_adapter
from medmoe_hf.training.config import LoraSection


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, an adapter trained on it for three steps, and a batch."""
    folder = tmp_path_factory.mktemp("lora")
    train(config(folder / "base"))
    run = config(folder / "adapter", model={"from_pretrained": str(folder / "base")}, lora={"rank": 4}, max_steps=3)
    train(run)
    collator = ContrastiveCollator(MedMoEProcessor.from_pretrained(folder / "adapter"))
    return folder, collator([phantom_sample(5, index, image_size=64) for index in range(4)])


def outputs(model, batch):
    with torch.no_grad():
        found = model.eval()(**batch)
    return {name: found[name] for name in ("loss", "image_embeds", "text_embeds", "local_embeds", "router_logits")}


def test_the_folder_loads_on_the_base_and_merged_weights_say_the_same(trained, tmp_path):
    folder, batch = trained
    base = MedMoEModel.from_pretrained(folder / "base")
    before = outputs(base, batch)
    adapted = outputs(peft.PeftModel.from_pretrained(base, str(folder / "adapter")), batch)
    assert (adapted["image_embeds"] - before["image_embeds"]).abs().max() > 1e-4
    result = CliRunner().invoke(app, ["merge", str(folder / "adapter"), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    merged = outputs(MedMoEModel.from_pretrained(tmp_path / "merged"), batch)
    for name, value in adapted.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5, msg=name)
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "training.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.parametrize("targets", [["scale_attention.fc1"], ["vision_model.experts.*.convolution"]])
def test_updates_of_expert_layers(trained, targets):
    folder, batch = trained
    wrapped = add_lora(MedMoEModel.from_pretrained(folder / "base"), LoraSection(targets=targets, train=[]))
    before = outputs(wrapped, batch)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = outputs(wrapped, batch)
    assert (adapted["local_embeds"] - before["local_embeds"]).abs().max() > 1e-3
    merged = outputs(wrapped.merge_and_unload(safe_merge=True), batch)
    for name, value in adapted.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_only_adapters_and_what_is_named_change(trained, tmp_path):
    folder, _ = trained
    merge_adapter(folder / "adapter", tmp_path / "merged")
    base, merged = (load_file(place / "model.safetensors") for place in (folder / "base", tmp_path / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any("q_proj" in name for name in changed)
    assert any(name.startswith("report_router.") for name in changed)
    # experts are frozen, and so are their running statistics
    assert not [name for name in changed if ".experts." in name]


def test_under_two_per_cent_of_the_paper_model_are_trained():
    with torch.device("meta"):
        model = MedMoEModel(MedMoEConfig.from_preset("paper"))
    model.name_or_path = "base"
    wrapped = add_lora(model, LoraSection())
    trainable = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert 0.001 < trainable / whole < 0.02


def test_names_that_fit_nothing_are_refused():
    model = MedMoEModel(MedMoEConfig.from_preset("tiny", **SMALL))
    model.name_or_path = "base"
    with pytest.raises(ValueError, match=r'`lora.targets`: nothing in the model matches "q_prj"'):
        add_lora(model, LoraSection(targets=["q_prj"]))
