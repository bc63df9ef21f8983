"""`push_to_hub` of the classes themselves."""

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

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


def test_files_of_others_stay_beside_the_weights(hub, small_config):
    """Of the files that the new folder lacks, only those that `save_pretrained` wrote are stale."""
    others = {
        "adapter_model.safetensors": b"1",
        "golden.safetensors": b"2",
        "strangers.safetensors": b"3",
        "model.fp16.safetensors": b"4",
        "model-final.safetensors": b"5",
        "adapter.safetensors.index.json": b"6",
        "old/model.safetensors": b"7",
        "LICENSE": b"8",
    }
    stale = {
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
    }
    hub.create(REPO, files={**others, **stale})
    MedMoEModel(small_config()).push_to_hub(REPO)
    files = hub.repo().files()
    assert {name: files.get(name) for name in others} == others
    assert not stale.keys() & files.keys()
    assert "model.safetensors" in files


def test_a_push_of_a_model_does_not_undo_somebody_elses(hub, small_config, monkeypatch):
    model = MedMoEModel(small_config())
    model.push_to_hub(REPO)
    listed = huggingface_hub.HfApi.list_repo_files

    def meanwhile(self, *args, **kwargs):
        found = listed(self, *args, **kwargs)
        repo, head = hub.repo(), hub.repo().branches["main"]
        state = repo.commits[head]
        theirs = type(state)({**state.files, "config.json": b"theirs"}, "Theirs", head, "user")
        repo.branches["main"] = repo.add(theirs)
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", meanwhile)
    with pytest.raises(HfHubHTTPError, match="412"):
        model.push_to_hub(REPO)
    assert hub.repo().files()["config.json"] == b"theirs"
