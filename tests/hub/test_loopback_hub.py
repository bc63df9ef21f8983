"""The Hub that other tests push to: the clients, unmodified, take it for one."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import Account, blob_id

REPO = "user/medmoe"


@pytest.fixture
def api(hub):
    return HfApi()


def commit(api, files=None, delete=(), **options):
    operations = [CommitOperationAdd(path, content) for path, content in (files or {}).items()]
    operations += [CommitOperationDelete(path) for path in delete]
    return api.create_commit(REPO, operations, commit_message="A commit", **options)


def test_git_names_blobs_the_same(tmp_path):
    content = b"\x00one\r\ntwo\n"
    (tmp_path / "file").write_bytes(content)
    named = subprocess.run(
        ["git", "hash-object", "--no-filters", str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert blob_id(content) == named.stdout.strip()


def test_who_a_token_belongs_to(hub, api):
    hub.accounts["hf_org"] = Account("user", organizations=("clinic",))
    found = api.whoami("hf_org")
    assert (found["name"], [org["name"] for org in found["orgs"]]) == ("user", ["clinic"])
    assert api.whoami("hf_read")["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("hf_nobody")


def test_repos_are_made_once_and_where_one_may(hub, api):
    assert api.create_repo("medmoe", private=True).repo_id == REPO
    assert hub.repo(REPO).private
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="rights to create a model"):
        api.create_repo("clinic/medmoe")
    hub.accounts["hf_write"].organizations = ("clinic",)
    assert api.create_repo("clinic/medmoe", repo_type="dataset").repo_id == "clinic/medmoe"
    assert hub.repo("clinic/medmoe", "dataset").files().keys() == {".gitattributes"}


def test_commits_are_whole_and_old_ones_stay(hub, api):
    api.create_repo(REPO)
    first = commit(api, {"config.json": b"{}", "folder/a b.txt": b"one", "old.txt": b"old"})
    second = commit(api, {"folder/a b.txt": b"two"}, ["old.txt"], parent_commit=first.oid)
    assert hub.repo().files().keys() == {".gitattributes", "config.json", "folder/a b.txt"}
    assert hub.repo().files(first.oid)["old.txt"] == b"old"
    assert api.model_info(REPO).sha == second.oid
    assert [line.commit_id for line in api.list_repo_commits(REPO)][:2] == [second.oid, first.oid]
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, {"config.json": b"[]"}, parent_commit=first.oid)
    with pytest.raises(EntryNotFoundError):
        commit(api, {"config.json": b"[]"}, ["old.txt"])
    assert hub.repo().branches["main"] == second.oid
    # The same again is no commit: the client compares with what preupload tells.
    assert commit(api, {"config.json": b"{}"}).oid == second.oid


def test_folders_go_up_and_come_down(hub, api, tmp_path):
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    content = {"one.txt": b"1", "deep/two.bin": bytes(range(256)), "deep/er/model.safetensors": b"3" * 5000}
    for path, data in content.items():
        (source / path).write_bytes(data)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=source)
    down = snapshot_download(REPO, local_dir=tmp_path / "down")
    assert {path: (tmp_path / "down" / path).read_bytes() for path in content} == content
    assert down == str(tmp_path / "down")
    hub.page_size = 2
    listed = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert listed.keys() == {*content, ".gitattributes", "deep", "deep/er"}
    assert listed["one.txt"].blob_id == blob_id(b"1")
    assert listed["deep/er/model.safetensors"].lfs.size == 5000
    assert {entry.path for entry in api.list_repo_tree(REPO, "deep")} == {"deep/two.bin", "deep/er"}
    assert [entry.size for entry in api.get_paths_info(REPO, ["deep/two.bin", "nothing"])] == [256]
    api.upload_folder(repo_id=REPO, folder_path=source / "deep", delete_patterns="*.txt")
    assert "one.txt" not in hub.repo().files()
    api.delete_folder("deep", REPO)
    assert hub.repo().files().keys() == {".gitattributes", "two.bin", "er/model.safetensors"}


def test_branches_tags_and_pull_requests(hub, api):
    api.create_repo(REPO)
    first = commit(api, {"a": b"1"}).oid
    api.create_branch(REPO, branch="wip/next")
    api.create_tag(REPO, tag="v1", revision=first)
    second = commit(api, {"a": b"2"}, revision="wip/next").oid
    pull = commit(api, {"a": b"3"}, create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    commit(api, {"b": b"4"}, revision=pull.pr_revision)
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "wip/next": second}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first)]
    wanted = {"main": b"1", "v1": b"1", "wip/next": b"2", "refs/pr/1": b"3", second: b"2", second[:8]: b"2"}
    for revision, content in wanted.items():
        with open(hf_hub_download(REPO, "a", revision=revision), "rb") as file:
            assert file.read() == content
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="wip/next")
    with pytest.raises(RevisionNotFoundError):
        commit(api, {"a": b"5"}, revision=first)
    assert hub.repo().files()["a"] == b"1"


def test_what_is_missing_is_told_apart(hub, api):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/nothing", "a")
    hub.create(REPO, files={"a": b"1"})
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "b")
    assert not api.file_exists(REPO, "b")
    assert api.file_exists(REPO, "a")


def test_private_and_gated_repos(hub, api):
    hub.create(REPO, private=True, files={"a": b"1"})
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            hf_hub_download(REPO, "a", token=token)
        assert not isinstance(caught.value, GatedRepoError)
    hf_hub_download(REPO, "a", token="hf_read")
    with pytest.raises(HfHubHTTPError, match="403"):
        commit(api, {"a": b"2"}, token="hf_read")
    hub.create("user/gated", files={"a": b"1"}).gated = True
    for token in (False, "hf_other"):
        with pytest.raises(GatedRepoError):
            hf_hub_download("user/gated", "a", token=token)
    assert api.model_info("user/gated", token="hf_other").gated == "auto"
    hub.accounts["hf_other"].accepted = ("user/gated",)
    hf_hub_download("user/gated", "a", token="hf_other")


def test_a_commit_that_is_cut_off(hub, api):
    api.create_repo(REPO)
    before = hub.repo().branches["main"]
    hub.cut_commit(2)
    after = commit(api, {"a": b"1"}).oid
    with pytest.raises(Exception, match=r"reset|disconnected|broken"):
        commit(api, {"a": b"2" * 1_000_000})
    assert hub.repo().branches["main"] == after != before
    hub.cut_commit(applied=True)
    with pytest.raises(Exception, match=r"reset|disconnected|broken"):
        commit(api, {"a": b"3"})
    assert hub.repo().files()["a"] == b"3"
    assert commit(api, {"a": b"4"}).oid == hub.repo().branches["main"]


def test_parts_of_files(hub):
    import httpx2

    hub.create(REPO, files={"a": b"0123456789"})
    with httpx2.Client() as client:
        for asked, status, content in (
            ("bytes=2-4", 206, b"234"),
            ("bytes=7-", 206, b"789"),
            ("bytes=-2", 206, b"89"),
            ("bytes=8-100", 206, b"89"),
            ("bytes=10-", 416, b""),
        ):
            answer = client.get(f"{hub.url}/{REPO}/resolve/main/a", headers={"Range": asked})
            assert (answer.status_code, answer.content) == (status, content)
            assert answer.headers["Content-Range"].endswith("/10")


def test_cards_need_yaml_that_can_be_read(hub, api):
    api.create_repo(REPO)
    commit(api, {"README.md": b"---\npipeline_tag: zero-shot-image-classification\n---\n# A model\n"})
    assert api.model_info(REPO).pipeline_tag == "zero-shot-image-classification"
    with pytest.raises(ValueError, match="Metadata is no YAML"):
        commit(api, {"README.md": b"---\na: [\n---\n"})


# Without the interpreter's end, in which pyarrow's threads abort now and then (apache/arrow#45214).
STREAM = """
import os
from datasets import load_dataset
lines = load_dataset("user/pairs", split="train", streaming=True)
print([line["caption"] for line in lines], flush=True)
print(sum(len(line["jpg"]) for line in load_dataset("user/pairs", "other", split="train", streaming=True)), flush=True)
os._exit(0)
"""


def test_datasets_stream(hub, tmp_path):
    files = {}
    for index in range(2):
        captions = [f"caption {index} {row}" for row in range(3)]
        pq.write_table(pa.table({"caption": captions}), tmp_path / "part.parquet")
        files[f"data/train-{index:05}-of-00002.parquet"] = (tmp_path / "part.parquet").read_bytes()
    pq.write_table(pa.table({"jpg": [b"x" * 70_000] * 10}), tmp_path / "part.parquet")
    files["other/train-00000-of-00001.parquet"] = (tmp_path / "part.parquet").read_bytes()
    configs = "- config_name: default\n  data_files: data/train-*\n- config_name: other\n  data_files: other/train-*\n"
    files["README.md"] = f"---\nconfigs:\n{configs}---\n".encode()
    hub.create("user/pairs", "dataset", private=True, files=files)
    run = subprocess.run(
        [sys.executable, "-c", STREAM],
        env=hub.environment(tmp_path / "child", "hf_read"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [str([f"caption {i} {j}" for i in range(2) for j in range(3)]), "700000"]
