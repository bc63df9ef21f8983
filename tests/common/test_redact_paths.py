"""Absolute paths are cut down to their last part, and nothing else is touched."""

from medmoe_hf.common.files import redact_paths


def test_only_absolute_paths_lose_their_folders():
    record = {
        "output_dir": "/home/anna/runs/first",
        "data": {"train": [{"kind": "webdataset", "files": ["/data/p-{000..012}.tar::/data/b/*.tar", "near/*.tar"]}]},
        "resumed": (3, 5),
        "home": "~/models/swin",
        "windows": "C:\\Users\\anna\\model",
        "share": "\\\\server\\scans\\x.tar",
        "model": {"from_pretrained": "user/medmoe", "preset": None, "rate": 1e-3},
        "caption": "left/right: no effusion",
        "root": "/",
        "skipped": {"/a/t.csv: missing image": 2, "/b/t.csv: missing image": 3, 7: "/c/d", "near/t.csv": 1},
    }
    assert redact_paths(record) == {
        "output_dir": "first",
        "data": {"train": [{"kind": "webdataset", "files": ["p-{000..012}.tar::*.tar", "near/*.tar"]}]},
        "resumed": [3, 5],
        "home": "swin",
        "windows": "model",
        "share": "x.tar",
        "model": {"from_pretrained": "user/medmoe", "preset": None, "rate": 1e-3},
        "caption": "left/right: no effusion",
        "root": "/",
        "skipped": {"t.csv: missing image": 2, "t.csv: missing image (2)": 3, 7: "d", "near/t.csv": 1},
    }
