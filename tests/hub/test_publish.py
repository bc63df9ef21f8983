"""Pushes to a Hub on this machine: what a repo holds afterwards, what is left when a push breaks off, what is said.

MEDMOE_PYTHONS names, as PATH does, the Pythons with which a pushed checkpoint is to load; by default it is this one.
"""

import importlib
import os
import shutil
import socket
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from loopback_hub import Account
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medmoe_hf.errors import PublishError
from medmoe_hf.hub import golden as golden_module
from medmoe_hf.hub.access import explained
from medmoe_hf.hub.folder_checks import published_files
from medmoe_hf.hub.golden import RELATIVE_TOLERANCE, compare_with_golden, write_golden
from medmoe_hf.hub.publishing import publish, verify
from medmoe_hf.model import (
    MedMoEForImageClassification,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
)
from medmoe_hf.model.saving_medmoe import SENTENCE_TRANSFORMERS_FILES

# Under its name the package has the function.
module = importlib.import_module("medmoe_hf.hub.publishing")
REPO = "user/medmoe"
TEXTS = ["a chest x-ray of pneumonia", "an axial ct of the head", "fundus"]
LABELS = ["pneumonia", "no finding", "haemorrhage"]


def changed(model, seed):
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    tokenizer = MedMoETokenizer.from_words([*TEXTS, *LABELS], max_length=24)
    return MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer)


@pytest.fixture(scope="module")
def saved(small_config, processor, tmp_path_factory):
    """Folders: a model in one file, the same model with other weights in shards, a classifier."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    words = {"vocab_size": len(processor.tokenizer)}
    model = changed(MedMoEModel(small_config(similarity="mean", text_config=words)), 1)
    model.save_pretrained(folder / "single")
    changed(model, 2).save_pretrained(folder / "sharded", max_shard_size="600kB")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    changed(MedMoEForImageClassification(small_config(**names)), 3).save_pretrained(folder / "classifier")
    for name in ("single", "sharded", "classifier"):
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "single", tmp_path / "folder")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved / "sharded", tmp_path / "sharded")


@pytest.fixture
def loads(monkeypatch):
    """Takes every folder for one that loads; what happens while it loads may be set. Gives the folders loaded."""
    seen = []
    monkeypatch.setattr(module, "write_golden", lambda folder: None)
    monkeypatch.setattr(module, "compare_with_golden", lambda folder: seen.append(folder) or {"output.logits": 0.0})
    return seen


def contents(folder):
    return {name: path.read_bytes() for name, path in published_files(folder).items()}


def held(hub, revision="main", name=REPO):
    """What a repo holds, but for the file that the Hub itself has put there."""
    return {path: data for path, data in hub.repo(name).files(revision).items() if path != ".gitattributes"}


def actions(report):
    return {change.path: change.action for change in report.changes}


# What a repo holds


def test_a_new_repo_holds_the_folder(hub, folder, loads):
    report = publish(folder, REPO, private=True, message="First")
    assert held(hub) == contents(folder)
    assert ".gitattributes" in hub.repo().files()
    assert hub.repo().private
    assert report.commit == hub.repo().branches["main"]
    assert hub.repo().commits[report.commit].title == "First"
    assert report.created
    assert loads == [folder]
    assert {change.path: change.size for change in report.changes if change.action == "add"} == {
        name: len(data) for name, data in contents(folder).items()
    }
    assert str(report.commit) in str(report)


def test_a_folder_of_an_earlier_version_gets_what_sentence_transformers_reads(hub, folder, loads):
    for name in SENTENCE_TRANSFORMERS_FILES:
        (folder / name).unlink()
    publish(folder, REPO)
    assert SENTENCE_TRANSFORMERS_FILES.keys() <= held(hub).keys()
    assert held(hub) == contents(folder)


def test_shards_replace_a_single_file_in_one_commit(hub, folder, sharded, loads):
    first = publish(folder, "medmoe")
    hub_count = len(hub.repo().commits)
    (sharded / "losses_medmoe.py").write_text("# new\n")
    second = publish(sharded, "medmoe")
    assert held(hub) == contents(sharded)
    assert "model.safetensors" not in held(hub)
    assert "model.safetensors.index.json" in held(hub)
    assert held(hub, first.commit) == contents(folder)
    assert len(hub.repo().commits) == hub_count + 1
    found = actions(second)
    assert found["model.safetensors"] == "delete"
    assert found["losses_medmoe.py"] == "replace"
    assert found["tokenizer.json"] == "keep"
    back = publish(folder, REPO)
    assert held(hub) == contents(folder)
    assert {path for path, action in actions(back).items() if action == "delete"} == {
        name for name in contents(sharded) if "model" in name and name.endswith((".safetensors", ".index.json"))
    }


def test_old_code_and_stray_files_go(hub, folder, loads):
    old = {"old_medmoe.py": b"1", "sub/old.json": b"{}", "pytorch_model.bin": b"2", "README.md": b"old"}
    hub.create(REPO, files={**old, "config.json": b'{"model_type": "medmoe"}'})
    report = publish(folder, REPO)
    assert held(hub) == contents(folder)
    assert {path for path, action in actions(report).items() if action == "delete"} == old.keys()


def test_the_same_again_is_no_commit(hub, folder, loads):
    first = publish(folder, REPO)
    before = len(hub.repo().commits)
    second = publish(folder, REPO)
    assert second.commit == first.commit
    assert len(hub.repo().commits) == before
    assert set(actions(second).values()) == {"keep"}
    # Of the same size, so that only its content can tell, once in LFS and once not.
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("64", "46"))
    third = actions(publish(folder, REPO))
    assert {path for path, action in third.items() if action != "keep"} == {"model.safetensors", "config.json"}
    assert held(hub) == contents(folder)


def test_a_dry_run_sends_nothing(hub, folder, sharded, loads):
    report = publish(folder, "user/new", dry_run=True)
    assert hub.sent() == []
    assert hub.repos == {}
    assert set(actions(report).values()) == {"add"}
    assert "into a new repo" in str(report)
    assert "Nothing was sent" in str(report)
    publish(folder, REPO)
    state, sent = dict(held(hub)), hub.sent()
    report = publish(sharded, REPO, dry_run=True, tag="v1", branch="next")
    assert hub.sent() == sent
    assert held(hub) == state
    assert report.commit is None
    line = next(line for line in str(report).splitlines() if line.endswith("  model.safetensors"))
    assert line.startswith("delete")
    assert f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB" in line


def test_a_dry_run_without_a_token(hub, folder, loads, monkeypatch):
    publish(folder, REPO)
    monkeypatch.delenv("HF_TOKEN")
    assert set(actions(publish(folder, REPO, dry_run=True)).values()) == {"keep"}
    with pytest.raises(PublishError, match=r"The owner of medmoe is missing: use user/medmoe"):
        publish(folder, "medmoe", dry_run=True)


# Branches, tags, pull requests


def test_branches_and_tags(hub, folder, sharded, loads):
    first = publish(folder, REPO, tag="v1")
    second = publish(sharded, REPO, branch="next", tag="v2")
    assert held(hub) == contents(folder) == held(hub, "v1")
    assert held(hub, "next") == contents(sharded) == held(hub, "v2")
    assert hub.repo().commits[second.commit].parent == first.commit
    assert hub.repo().tags == {"v1": first.commit, "v2": second.commit}
    # The same again may well follow a push whose answer was lost.
    assert publish(sharded, REPO, branch="next", tag="v2").commit == second.commit
    loads.clear()
    with pytest.raises(PublishError, match=f"has a tag v1 already, at {first.commit}"):
        publish(sharded, REPO, branch="next", tag="v1")
    assert loads == []
    with pytest.raises(PublishError, match="has a tag v1 already"):
        publish(sharded, REPO, tag="v1")
    assert held(hub) == contents(folder)


def test_a_pull_request_changes_nothing_yet(hub, folder, sharded, loads):
    publish(folder, REPO)
    report = publish(sharded, REPO, create_pr=True, token="hf_other")
    assert report.url == f"{hub.url}/{REPO}/discussions/1"
    assert held(hub) == contents(folder)
    assert held(hub, "refs/pr/1") == contents(sharded)
    with pytest.raises(PublishError, match="a pull request needs a repo"):
        publish(folder, "user/none", create_pr=True)
    for options in ({"branch": "next"}, {"tag": "v1"}):
        with pytest.raises(PublishError, match="leave out the branch and the tag"):
            publish(folder, REPO, create_pr=True, **options)


# Pushes that break off


def test_a_push_that_is_cut_off_can_be_repeated(hub, folder, sharded, loads):
    publish(folder, REPO)
    state = hub.repo().branches["main"]
    hub.cut_commit()
    with pytest.raises(PublishError, match=r"broke off .* either unchanged or completely updated"):
        publish(sharded, REPO, tag="v2")
    assert hub.repo().branches["main"] == state
    assert held(hub) == contents(folder)
    assert hub.repo().tags == {}
    report = publish(sharded, REPO, tag="v2")
    assert held(hub) == contents(sharded) == held(hub, "v2")
    assert hub.repo().commits[report.commit].parent == state


def test_a_push_whose_answer_is_lost_can_be_repeated(hub, folder, sharded, loads):
    publish(folder, REPO)
    hub.cut_commit(applied=True)
    with pytest.raises(PublishError, match="either unchanged or completely updated"):
        publish(sharded, REPO, tag="v2")
    assert held(hub) == contents(sharded)
    state = hub.repo().branches["main"]
    assert publish(sharded, REPO, tag="v2").commit == state == hub.repo().tags["v2"]


def test_the_first_push_is_cut_off(hub, folder, loads):
    hub.cut_commit()
    with pytest.raises(PublishError, match="either unchanged or completely updated"):
        publish(folder, REPO)
    assert held(hub) == {}
    publish(folder, REPO)
    assert held(hub) == contents(folder)


def test_somebody_else_pushes_in_the_meantime(hub, folder, sharded, loads, monkeypatch):
    publish(folder, REPO)

    def meanwhile(place):
        monkeypatch.setattr(module, "compare_with_golden", lambda place: {"output.logits": 0.0})
        (other := place.parent / "other").mkdir()
        shutil.copytree(folder, other, dirs_exist_ok=True)
        (other / "README.md").write_text("# Theirs\n")
        publish(other, REPO)
        return {"output.logits": 0.0}

    monkeypatch.setattr(module, "compare_with_golden", meanwhile)
    with pytest.raises(PublishError, match="somebody else has pushed in the meantime"):
        publish(sharded, REPO)
    assert held(hub)["README.md"] == b"# Theirs\n"
    publish(sharded, REPO)
    assert held(hub) == contents(sharded)


# What stops a push


def test_what_is_found_in_the_folder_stops_it_first(hub, folder, loads):
    (folder / "last.ckpt").write_bytes(b"x")
    (folder / "train.yaml").write_text("data: /" + "home/someone\n")
    with pytest.raises(PublishError) as caught:
        publish(folder, REPO)
    assert "  last.ckpt: weights that are not safetensors" in str(caught.value)
    assert "  train.yaml, line 1: an absolute path" in str(caught.value)
    assert hub.requests == []
    assert loads == []


def test_other_numbers_stop_it(hub, folder, loads, monkeypatch):
    found = {"output.logits": 2 * RELATIVE_TOLERANCE, "output.image_embeds": 0.0}
    monkeypatch.setattr(module, "compare_with_golden", lambda folder: found)
    with pytest.raises(PublishError, match=r"installed: output.logits differ .* save the model and the processor"):
        publish(folder, REPO)
    assert hub.sent() == []


def test_no_token(hub, folder, loads, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=r"no token .* `hf auth login`"):
        publish(folder, REPO)
    assert loads == []
    publish(folder, REPO, token="hf_write")
    assert held(hub) == contents(folder)


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        (REPO, {"token": "hf_nobody"}, "token is not valid"),
        (REPO, {"token": "hf_read"}, "The token of user is read-only"),
        (REPO, {"token": "hf_other"}, r"has no permission \(You don't have the rights .* write access to user"),
        ("clinic/medmoe", {}, "has no permission"),
        ("user/a/b", {}, "neither a folder nor the id of a repo on the Hub"),
        ("user/bert", {}, r"name user/bert is taken: .* \(model type bert\)"),
        ("user/stuff", {}, "name user/stuff is taken"),
        ("user/public", {"private": True}, "exists and is public"),
        ("user/hidden", {"private": False}, "exists and is private"),
        ("user/public", {"token": "hf_other"}, "has no permission"),
    ],
)
def test_what_the_hub_refuses(hub, folder, loads, repo, options, message):
    hub.create("user/bert", files={"config.json": b'{"model_type": "bert"}'})
    hub.create("user/stuff", files={"thesis.pdf": b"1"})
    hub.create("user/public", files={"README.md": b"# Soon"})
    hub.create("user/hidden", private=True)
    states = {name: dict(place.branches) for name, place in hub.repos.items()}
    with pytest.raises(PublishError, match=message):
        publish(folder, repo, **options)
    assert {name: dict(place.branches) for name, place in hub.repos.items()} == states


def test_an_organization_one_belongs_to(hub, folder, loads):
    hub.accounts["hf_write"] = Account("user", organizations=("clinic",))
    publish(folder, "clinic/medmoe")
    assert held(hub, name="clinic/medmoe") == contents(folder)


def test_no_network(hub, folder, loads, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="unset HF_HUB_OFFLINE"):
        publish(folder, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens not
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for call in (lambda: publish(folder, REPO), lambda: verify(REPO)):
            with pytest.raises(PublishError, match=r"the connection to http://127.0.0.1:\d+ failed"):
                call()
    assert loads == []


def test_a_dry_run_without_a_network_checks_what_it_can(hub, folder, loads, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for repo in (REPO, "medmoe"):
        loads.clear()
        report = publish(folder, repo, dry_run=True, private=True, tag="v1")
        assert loads == [folder]
        assert actions(report) == dict.fromkeys(contents(folder), "send")
        text = str(report)
        assert f"NOT checked, as the Hub was not reached: whether {repo} exists, is private" in text
        assert "unset HF_HUB_OFFLINE" in text
        assert text.endswith("Nothing was sent.")
    assert hub.requests == []
    (folder / "last.ckpt").write_bytes(b"x")
    with pytest.raises(PublishError, match=r"last.ckpt: weights that are not safetensors"):
        publish(folder, REPO, dry_run=True)
    (folder / "last.ckpt").unlink()
    monkeypatch.setattr(module, "compare_with_golden", lambda folder: {"output.logits": float("nan")})
    with pytest.raises(PublishError, match=r"output.logits differ"):
        publish(folder, REPO, dry_run=True)


@pytest.fixture
def storage(hub, monkeypatch):
    """Large files go to the storage; gives a function that chooses the protocol. Nobody waits between attempts."""
    hub.large_files = True
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    return lambda protocol: monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", protocol == "lfs")


def test_large_files_go_by_lfs(hub, storage, folder, loads):
    storage("lfs")
    publish(folder, REPO)
    assert held(hub) == contents(folder)
    assert any(path.startswith("/storage/") for _, path in hub.requests)


@pytest.mark.parametrize(
    ("protocol", "refused_by", "status", "message"),
    [
        (
            "lfs",
            "storage",
            403,
            r"\(localhost:\d+\) answered 403 to model.safetensors, .* proxy or firewall",
        ),
        (
            "lfs",
            "storage",
            500,
            r"\(localhost:\d+\) failed repeatedly with status 500 at model.safetensors. .* push again",
        ),
        ("xet", "storage", 401, r"storage .*\(localhost:\d+\) answered 401 .* HF_HUB_DISABLE_XET=1"),
        ("xet", "storage", 403, r"storage .*\(localhost:\d+\) answered 403 .* HF_HUB_DISABLE_XET=1"),
        (
            "xet",
            "token",
            401,
            r"no permission to upload large files \(HTTP status 401\).*user has no storage",
        ),
        (
            "xet",
            "token",
            403,
            r"no permission to upload large files \(HTTP status 403\).*user has no storage",
        ),
    ],
)
def test_what_the_storage_refuses(hub, storage, folder, loads, protocol, refused_by, status, message):
    hub.create(REPO)
    storage(protocol)
    if refused_by == "storage":
        hub.storage_refusal = (status, "AccessDenied")
    else:
        hub.xet_token_refusal = (status, "quota")
    with pytest.raises(PublishError, match=message) as error:
        publish(folder, REPO)
    assert "The repo is unchanged" in str(error.value)
    assert "Run the same command again" not in str(error.value)
    assert "Signature" not in str(error.value)  # the addresses are signed, and are as good as a token
    assert held(hub) == {}


def test_a_batch_that_the_storage_refuses(hub):
    message = "LFS batch API returned errors:\nEncountered error for file with OID 0a1b: `Quota exceeded"
    with pytest.raises(PublishError, match=r"refuses them: Quota exceeded\."), explained(REPO):
        raise ValueError(message)
    with pytest.raises(RuntimeError, match="a bug"), explained(REPO):
        raise RuntimeError("a bug")


def test_verify_names_what_it_cannot_find(hub, folder, loads, monkeypatch):
    publish(folder, REPO, private=True)
    assert verify(REPO).ok
    assert verify(REPO).commit == hub.repo().branches["main"]
    with pytest.raises(PublishError, match="has no revision v9"):
        verify(REPO, "v9")
    with pytest.raises(PublishError, match="has no revisions"):
        verify(folder, "v9")
    for token in ("hf_other", None):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(PublishError, match=r"no repo user/medmoe at .* If it is private, log in"):
            verify(REPO, token=token)
    hub.create("user/gated").gated = True
    hub.repo("user/gated").commits[hub.repo("user/gated").branches["main"]].files["a"] = b"1"
    with pytest.raises(PublishError, match="is gated"):
        verify("user/gated", token="hf_other")


# The golden input


def test_the_golden_file(folder, processor):
    place = write_golden(folder)
    golden, model = load_file(place), MedMoEModel.from_pretrained(folder)
    images = [Image.fromarray(image.numpy()) for image in golden["images"]]
    assert images[0].size == (80, 96)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(golden["input.pixel_values"], pixels)
    with torch.no_grad():
        expected = model(
            **{name.removeprefix("input."): value for name, value in golden.items() if name.startswith("input.")}
        )
    outputs = {name for name in golden if name.startswith("output.")}
    assert outputs >= {"output.logits_per_image", "output.image_embeds", "output.text_embeds", "output.expert_ids"}
    for name in outputs:
        torch.testing.assert_close(golden[name], expected[name.removeprefix("output.")])
    content = place.read_bytes()
    # What differs by rounding is left as it is; what belongs to other weights is not.
    with safe_open(place, "pt") as file:
        metadata = file.metadata()
    golden["output.image_embeds"] *= 1 + 0.1 * RELATIVE_TOLERANCE
    save_file(golden, place, metadata)
    rounded = place.read_bytes()
    assert write_golden(folder).read_bytes() == rounded != content
    golden["output.image_embeds"] *= 1 + 3 * RELATIVE_TOLERANCE
    save_file(golden, place, metadata)
    assert write_golden(folder).read_bytes() == content
    place.write_bytes(b"broken")
    assert write_golden(folder).read_bytes() == content


def test_a_golden_file_needs_a_model_that_works(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    name = "vision_model.router.fc1.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(PublishError, match=f"the weights lack {name}"):
        write_golden(folder)
    save_file({**tensors, name: tensors[name] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PublishError, match=r"output.router_logits .* is not finite"):
        write_golden(folder)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(PublishError, match="names no MedMoE model"):
        write_golden(tmp_path)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    MedMoETokenizer.from_words(TEXTS * 2 + [f"word{i}" for i in range(90)]).save_pretrained(folder)
    with pytest.raises(PublishError, match="does not accept the outputs of its processor"):
        write_golden(folder)
    with pytest.raises(PublishError, match=r"no golden.safetensors to compare with"):
        compare_with_golden(folder)


@pytest.fixture
def clean_process(monkeypatch):
    """In place of the process, a function of the golden tensors makes what it would have found."""

    def use(change):
        def run(command, **_):
            *_, golden, out = command
            tensors = {name: value for name, value in load_file(golden).items() if name != "images"}
            save_file(change(tensors), out)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(golden_module.subprocess, "run", run)

    return use


def with_output(name, function):
    return lambda tensors: {**tensors, name: function(tensors[name])}


def one_nan(value):
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


@pytest.mark.parametrize(
    ("function", "difference"),
    [
        (lambda value: value, 0.0),
        (lambda value: value + 5e-5 * value.abs().max(), 5e-5),
        (lambda value: value + 2e-4 * value.abs().max(), 2e-4),
        (lambda value: value * 1.05, 0.05),
        (one_nan, float("inf")),
        (lambda value: value * float("nan"), float("inf")),
        (lambda value: value[:1], float("inf")),
    ],
)
def test_how_far_outputs_may_be_off(folder, clean_process, function, difference):
    """A relative difference of 1e-4 is what is documented; nothing that is no number passes."""
    write_golden(folder)
    clean_process(with_output("output.image_embeds", function))
    report = verify(folder)
    assert report.differences["output.image_embeds"] == pytest.approx(difference, rel=0.05)
    assert report.differences["output.text_embeds"] == 0
    assert report.ok == (difference < 1e-4)
    assert ("WRONG" in str(report)) == (difference > 1e-4)


def test_a_nan_in_the_golden_file_is_no_agreement(folder, clean_process):
    place = write_golden(folder)
    with safe_open(place, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(place)
    tensors["output.image_embeds"] = one_nan(tensors["output.image_embeds"])
    save_file(tensors, place, metadata)
    clean_process(lambda tensors: tensors)
    assert not verify(folder).ok


def test_verify_can_record_the_golden_outputs_first(hub, folder, sharded, clean_process):
    clean_process(lambda tensors: tensors)
    with pytest.raises(PublishError, match=r"no golden.safetensors .* `medmoe verify FOLDER --record` writes it"):
        verify(folder)
    assert verify(folder, record=True).ok
    recorded = load_file(folder / "golden.safetensors")
    model = MedMoEModel.from_pretrained(folder)
    with torch.no_grad():
        found = model.get_image_features(recorded["input.pixel_values"], modality=None)
    assert recorded["output.image_embeds"].shape == found.pooler_output.shape
    # Of other weights it is written anew.
    shutil.copy(folder / "golden.safetensors", sharded)
    verify(sharded, record=True)
    assert not torch.equal(
        load_file(sharded / "golden.safetensors")["output.image_embeds"], recorded["output.image_embeds"]
    )
    with pytest.raises(PublishError, match=r"--record writes golden.safetensors into a folder"):
        verify("user/none", record=True)


@pytest.mark.slow
def test_a_clean_process_sees_what_is_wrong(saved, folder, sharded):
    classifier = shutil.copytree(saved / "classifier", folder.parent / "classifier")
    for place in (folder, classifier):
        write_golden(place)
    report = verify(classifier)
    assert report.ok, str(report)
    assert "output.logits" in report.differences
    # Other weights under an old golden file.
    shutil.copy(folder / "golden.safetensors", sharded)
    report = verify(sharded)
    assert not report.ok
    assert report.differences["output.image_embeds"] > RELATIVE_TOLERANCE
    assert report.differences["input.pixel_values"] == 0
    assert "WRONG" in str(report)
    # Code that needs this package.
    code = folder / "losses_medmoe.py"
    source = code.read_text()
    code.write_text(f"{source}\ntry:\n    from medmoe_hf.common import files\nexcept ValueError:\n    pass\n")
    with pytest.raises(PublishError, match=r"(?s)does not load where .* it is not installed here"):
        compare_with_golden(folder)


# Loaded from the Hub by a process that has never seen this package

EVERYTHING = """
import sys
sys.modules["medmoe_hf"] = None
import torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline
remote = {"trust_remote_code": True}
pictures = [Image.open(f"{i}.png") for i in range(3)]
found = {"transformers": transformers.__version__}

def logits(kind, repo=REPO, name="logits_per_image", **options):
    model = kind.from_pretrained(repo, **remote, **options)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        return model(**(inputs if name == "logits_per_image" else pixels))[name]

processor = AutoProcessor.from_pretrained(REPO, **remote)
inputs = dict(processor(images=pictures, text=TEXTS, return_tensors="pt"))
pixels = {"pixel_values": inputs["pixel_values"]}
found["processor"] = inputs
found["tokenizer"] = dict(AutoTokenizer.from_pretrained(REPO, **remote)(TEXTS, return_tensors="pt"))
image_processor = AutoImageProcessor.from_pretrained(REPO, **remote)
found["image processor"] = image_processor(pictures, return_tensors="pt")["pixel_values"]
found["config"] = AutoConfig.from_pretrained(REPO, **remote).model_type
found["new"] = logits(AutoModel)
found["zero-shot"] = logits(AutoModelForZeroShotImageClassification)
found["classifier"] = logits(AutoModelForImageClassification, "user/classifier", "logits")
found["v1"] = logits(AutoModel, revision="v1")
found["commit"] = logits(AutoModel, revision=FIRST)
# The code of main is broken now, and that of an older commit is named.
found["code"] = logits(AutoModel, revision="broken", code_revision=SECOND)
try:
    AutoModel.from_pretrained(REPO, revision="broken", **remote)
    found["broken"] = "loaded"
except Exception as error:
    found["broken"] = str(error)
try:
    AutoModel.from_pretrained(REPO, token=False, cache_dir="of a stranger", **remote)
    found["private"] = "loaded"
except OSError as error:
    found["private"] = str(error)
task = pipeline("zero-shot-image-classification", model=REPO, **remote)
scores = task(pictures, candidate_labels=LABELS, hypothesis_template="{}")
found["zero-shot pipeline"] = [{line["label"]: line["score"] for line in lines} for lines in scores]
task = pipeline("image-classification", model="user/classifier", **remote)
found["classification pipeline"] = [{line["label"]: line["score"] for line in lines} for lines in task(pictures)]
task = pipeline("image-feature-extraction", model=REPO, **remote)
found["features pipeline"] = torch.tensor(task(pictures, pool=True)).squeeze(1)
torch.save(found, "found.pt")
"""


PYTHONS = list(filter(None, os.environ.get("MEDMOE_PYTHONS", "").split(os.pathsep))) or [sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_everything_loads_from_the_hub_anywhere(hub, folder, sharded, saved, processor, tmp_path, python):
    """The real thing, clean processes included: two pushes, and whatever one may load by."""
    models = {"v1": MedMoEModel.from_pretrained(folder), "new": MedMoEModel.from_pretrained(sharded)}
    classifier = MedMoEForImageClassification.from_pretrained(saved / "classifier")
    first = publish(folder, REPO, private=True, tag="v1")
    second = publish(sharded, REPO)
    assert max(second.differences.values()) <= RELATIVE_TOLERANCE
    assert held(hub) == contents(sharded)
    hub.create("user/classifier", files=contents(saved / "classifier"))
    files = {**hub.repo().files(), "modeling_medmoe.py": b"raise RuntimeError('broken code')\n"}
    repo, state = hub.repo(), hub.repo().commits[second.commit]
    repo.branches["broken"] = repo.add(type(state)(files, "Breaks it", second.commit, "user"))

    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (80, 70 + 10 * i, 3), dtype=np.uint8)) for i in range(3)]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    inputs = dict(processor(images=pictures, text=TEXTS, return_tensors="pt"))
    prompts = dict(processor(images=pictures, text=LABELS, return_tensors="pt"))
    named = (REPO, TEXTS, LABELS, first.commit, second.commit)
    run = subprocess.run(
        [python, "-I", "-c", f"REPO, TEXTS, LABELS, FIRST, SECOND = {named}\n{EVERYTHING}"],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "another home", "hf_read"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    found = torch.load(tmp_path / "found.pt")
    print(f"transformers {found['transformers']} of {python}")

    with torch.no_grad():
        expected = {name: model.eval()(**inputs).logits_per_image for name, model in models.items()}
        scores = models["new"](**prompts).logits_per_image.softmax(dim=1)
        classes = classifier.eval()(inputs["pixel_values"]).logits
        features = models["new"](pixel_values=inputs["pixel_values"]).pooler_output
    assert not torch.allclose(expected["v1"], expected["new"], rtol=1e-2)

    def same(value, wanted):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)

    for name, wanted in {"new": "new", "zero-shot": "new", "code": "new", "v1": "v1", "commit": "v1"}.items():
        same(found[name], expected[wanted])
    same(found["classifier"], classes)
    same(found["features pipeline"], features)
    same(found["processor"], inputs)
    same(found["tokenizer"], {name: value for name, value in inputs.items() if name != "pixel_values"})
    same(found["image processor"], inputs["pixel_values"])
    assert found["config"] == "medmoe"
    assert "broken code" in found["broken"]
    for name, wanted in (("zero-shot", scores), ("classification", classes.softmax(dim=1))):
        lines = [dict(zip(LABELS, line, strict=True)) for line in wanted.tolist()]
        assert found[f"{name} pipeline"] == [pytest.approx(line, abs=1e-5) for line in lines]

    assert f"{REPO} is not a local folder and is not a valid model identifier" in found["private"]
    assert verify(REPO, "v1").ok
