"""`push_to_hub` of the classes themselves."""

import pytest

from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer

REPO = "user/medmoe"


def weights(hub, revision="main"):
    return {name for name in hub.repo().files(revision) if "safetensors" in name}


def test_a_model_and_a_processor_push_themselves(hub, small_config, tmp_path):
    tokenizer = MedMoETokenizer.from_words(["chest", "fundus"], max_length=24)
    model = MedMoEModel(small_config(text_config={"vocab_size": len(tokenizer)}))
    processor = MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    first = model.push_to_hub(REPO, private=True)
    processor.push_to_hub(REPO)
    assert hub.repo().private
    assert weights(hub) == {"model.safetensors"}
    assert {"processor_config.json", "tokenizer.json", "processing_medmoe.py"} <= hub.repo().files().keys()
    before = len(hub.repo().commits)
    model.push_to_hub(REPO, max_shard_size="600kB", commit_message="Shards")
    state = hub.repo().commits[hub.repo().branches["main"]]
    assert (state.title, len(hub.repo().commits)) == ("Shards", before + 1)
    assert "model.safetensors" not in weights(hub)
    assert "model.safetensors.index.json" in weights(hub)
    assert "processor_config.json" in state.files
    assert weights(hub, first.oid) == {"model.safetensors"}
    model.push_to_hub(REPO, revision="next")
    assert weights(hub, "next") == {"model.safetensors"} != weights(hub)
    pull = model.push_to_hub(REPO, create_pr=True)
    assert weights(hub, pull.pr_revision) == {"model.safetensors"} != weights(hub)
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == hub.repo().files("next")["model.safetensors"]


def test_a_push_of_a_model_that_is_cut_off_changes_nothing(hub, small_config):
    model = MedMoEModel(small_config())
    model.push_to_hub(REPO)
    state = hub.repo().branches["main"]
    hub.cut_commit()
    with pytest.raises(Exception, match=r"reset|disconnected|broken"):
        model.push_to_hub(REPO, max_shard_size="600kB")
    assert hub.repo().branches["main"] == state
    model.push_to_hub(REPO, max_shard_size="600kB")
    assert "model.safetensors" not in weights(hub)
