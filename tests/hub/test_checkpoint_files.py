"""Reading checkpoints: the formats, whole objects beside tensors, and files that would run code."""

import io
import os
import pickle
import zipfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medmoe_hf.errors import ConvertError
from medmoe_hf.hub import read_checkpoint, read_state_dict

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.half": torch.ones(2, dtype=torch.bfloat16)}


def same(read):
    assert set(read) == set(TENSORS)
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt", "x.pth"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"epoch": 3, "state_dict": t}, lambda t: {"model": t}])
def test_what_torch_save_writes(tmp_path, name, zipped, wrap):
    torch.save(wrap(TENSORS), tmp_path / name, _use_new_zipfile_serialization=zipped)
    same(read_state_dict(tmp_path / name))


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    same(read_state_dict(tmp_path / "x.safetensors"))


def test_parameters_and_strided_views(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"p": torch.nn.Parameter(base), "v": base.t()[1:]}, tmp_path / "x.pt")
    read = read_state_dict(tmp_path / "x.pt")
    assert torch.equal(read["p"], base)
    assert torch.equal(read["v"], base.t()[1:])


class Stage(Enum):
    FIT = "fit"


@dataclass
class Settings:
    """Stands for the objects of a training library that a Lightning file carries."""

    rate: float
    stage: Stage
    where: Path

    def __setstate__(self, state):
        raise AssertionError("the file's objects were brought to life")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_beside_the_tensors_stay_lifeless(tmp_path, zipped, protocol):
    content = {
        "hyper_parameters": Settings(0.1, Stage.FIT, tmp_path),
        "callbacks": {Stage: [Settings(0.2, Stage.FIT, tmp_path)]},
        "state_dict": TENSORS,
    }
    path = tmp_path / "x.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    same(read_state_dict(path))
    assert type(read_checkpoint(path)["hyper_parameters"]) is not Settings


class Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(target):
    yield Payload(os.system, f"touch {target}")
    yield Payload(exec, f"open({str(target)!r}, 'w')")
    yield Payload(eval, f"open({str(target)!r}, 'w')")
    yield Payload(open, str(target), "w")
    yield Payload(__import__, "os")
    yield Payload(pickle.loads, pickle.dumps(Payload(os.system, f"touch {target}")))


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_files_run_nothing(tmp_path, kind, zipped):
    target = tmp_path / "was_here"
    path = tmp_path / "hostile.ckpt"
    content = {"state_dict": {**TENSORS, "x": list(payloads(target))[kind]}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    same(read_state_dict(path))
    assert not target.exists()


class Unheard:
    """A function of a module that nobody has thought of."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return create, (self.target,)


def create(target):
    Path(target).touch()


def test_an_unknown_function_is_not_called_either(tmp_path):
    target, path = tmp_path / "was_here", tmp_path / "x.ckpt"
    torch.save({"state_dict": TENSORS, "other": Unheard(str(target))}, path)
    same(read_state_dict(path))
    assert not target.exists()


def test_truncated_files(tmp_path):
    whole = io.BytesIO()
    torch.save(TENSORS, whole)
    legacy = io.BytesIO()
    torch.save(TENSORS, legacy, _use_new_zipfile_serialization=False)
    save_file(TENSORS, tmp_path / "whole.safetensors")
    contents = {
        "zip.pt": whole.getvalue(),
        "legacy.pt": legacy.getvalue(),
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes(),
    }
    for name, content in contents.items():
        for share in (0.3, 0.95):
            (tmp_path / name).write_bytes(content[: int(share * len(content))])
            with pytest.raises(ConvertError, match=r"truncated, or no checkpoint .* download it again"):
                read_state_dict(tmp_path / name)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello there")
    with pytest.raises(ConvertError, match="truncated, or no checkpoint"):
        read_state_dict(tmp_path / "text.ckpt")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(ConvertError, match=r"not one that `torch\.save` wrote"):
        read_state_dict(tmp_path / "archive.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ConvertError, match="TorchScript program"):
        read_state_dict(tmp_path / "script.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConvertError, match="holds list, not a dictionary"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ConvertError, match="no named tensors; its top-level keys are: epoch"):
        read_state_dict(tmp_path / "empty.pt")
    with pytest.raises(ConvertError, match=r"nowhere\.pt: there is no such file"):
        read_state_dict(tmp_path / "nowhere.pt")
