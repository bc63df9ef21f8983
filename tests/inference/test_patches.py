"""MedMoE as the patch encoder of other libraries: what the model itself computes, and the files that they read."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from small_encoders import medmoe_folder

from medmoe_hf.errors import ArgumentError, MissingPackageError
from medmoe_hf.inference.encoders import load_encoder
from medmoe_hf.inference.patches import ImageTransform, patch_encoder, write_patch_features
from medmoe_hf.model import MedMoEModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return medmoe_folder(tmp_path_factory.mktemp("patches") / "medmoe")


@pytest.fixture(scope="module")
def patches():
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (90, 80 + index, 3), dtype=np.uint8)) for index in range(4)]


def test_patches_become_what_the_encoder_computes(folder, patches):
    ours = load_encoder(folder)
    for features in ("embedding", "backbone", "expert", "both"):
        encoder = patch_encoder(folder, features)
        with torch.inference_mode():
            found = encoder.model(torch.stack([encoder.transforms(patch) for patch in patches]))
        right = ours.encode_images(patches) if features == "embedding" else ours.features(patches)[features]
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
        assert encoder.enc_name == f"medmoe-{folder.parent.name}-medmoe-{features}"
        assert encoder.precision == torch.float32
        assert not encoder.model.training


def test_a_modality_sends_all_patches_to_one_expert(folder, patches):
    model = MedMoEModel.from_pretrained(folder).eval()
    routed, fixed = (patch_encoder(folder, "expert", modality=modality) for modality in (None, "histopathology"))
    pixels = torch.stack([routed.transforms(patch) for patch in patches])
    with torch.inference_mode():
        found = fixed.model(pixels)
        expected = model.vision_model(pixels, modality="histopathology").local_embeds.mean(dim=(2, 3))
        assert (routed.model(pixels) - found).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ArgumentError, match="cannot send patches to `modality` oct"):
        patch_encoder(folder, modality="oct")
    with pytest.raises(ArgumentError, match="`features` must be embedding"):
        patch_encoder(folder, "cls")


def test_a_transform_takes_what_loaders_yield_and_can_be_sent_to_workers(folder, patches):
    from torchvision import tv_tensors

    transform = pickle.loads(pickle.dumps(ImageTransform(folder)))
    expected = ImageTransform(folder)(patches[1])
    array = np.array(patches[1])
    for image in (patches[1], array, torch.from_numpy(array).permute(2, 0, 1), tv_tensors.Image(patches[1])):
        found = transform(image)
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)


def test_features_of_patches_are_in_the_layout_of_trident(tmp_path):
    h5py = pytest.importorskip("h5py", reason='pip install "medmoe_hf[trident]"')
    features, coords = torch.randn(5, 8), [(0, 0), (512, 0), (0, 512), (512, 512), (1024, 0)]
    settings = {"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}
    write_patch_features(tmp_path / "features" / "slide.7.h5", features, coords, **settings, overlap=32)
    with h5py.File(tmp_path / "features" / "slide.7.h5", "r") as file:
        assert set(file) == {"features", "coords"}
        assert file["features"].dtype == np.float32
        assert file["coords"].dtype == np.int64
        np.testing.assert_array_equal(file["features"][:], features.numpy())
        np.testing.assert_array_equal(file["coords"][:], coords)
        assert dict(file["coords"].attrs) == {
            **settings, "patch_size_level0": 512, "overlap": 32, "name": "slide.7",
        }  # fmt: skip
    for change, message in (
        ({"coords": coords[:4]}, r"got \(5, 8\) and \(4, 2\)"),
        ({"coords": np.array(coords) + 0.5}, "whole numbers of pixels"),
        ({"path": tmp_path / "slide.hdf5"}, r"ends with \.h5"),
        ({"overlap": 256}, "`overlap` less than `patch_size`"),
    ):
        arguments = {"path": tmp_path / "new.h5", "features": features, "coords": coords, **settings} | change
        with pytest.raises(ArgumentError, match=message):
            write_patch_features(**arguments)
    assert not (tmp_path / "new.h5").exists()


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingPackageError, match=r"medmoe_hf\[trident\]"):
        write_patch_features(
            tmp_path / "a.h5", [[1.0]], [[0, 0]], patch_size=1, level0_magnification=1, target_magnification=1
        )
