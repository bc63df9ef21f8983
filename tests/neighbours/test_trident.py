"""TRIDENT reads patches of a slide, encodes them by our model, writes features, and pools those that we wrote."""

import numpy as np
import pytest
from PIL import Image

h5py = pytest.importorskip("h5py", reason='pip install "medmoe_hf[trident]"')
# The package `trident` on PyPI is another one.
slides = pytest.importorskip("trident.wsi_objects.ImageWSI", reason="TRIDENT, from its repository")

from trident.patch_encoder_models.load import CustomInferenceEncoder  # noqa: E402
from trident.slide_encoder_models.load import MeanSlideEncoder  # noqa: E402

from medmoe_hf.inference.encoders import load_encoder  # noqa: E402
from medmoe_hf.inference.patches import patch_encoder, write_patch_features  # noqa: E402


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "slide.png"
    small = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC).save(path)
    return path


def contents(path):
    with h5py.File(path, "r") as file:
        return {name: (file[name][:], dict(file[name].attrs)) for name in file}


@pytest.mark.filterwarnings("ignore")
def test_features_equal_ours_and_ours_are_read(saved, slide, tmp_path):
    wsi = slides.ImageWSI(slide_path=str(slide), mpp=0.25, lazy_init=False)
    # no tissue was segmented: the whole slide is read
    wsi.gdf_contours = None
    coords = wsi.extract_tissue_coords(target_mag=20, patch_size=64, save_coords=str(tmp_path / "coords"))
    encoder = CustomInferenceEncoder(**patch_encoder(saved.folder)._asdict())
    theirs = contents(
        wsi.extract_patch_features(
            patch_encoder=encoder, coords_path=coords, save_features=str(tmp_path / "theirs"), device="cpu"
        )
    )
    places, attributes = theirs["coords"]
    assert len(places) == 12
    # its own reader, which resizes patches
    read = wsi.create_patcher(patch_size=64, src_mag=40, dst_mag=20, custom_coords=places, pil=True)
    patches = [read[index][0] for index in range(len(places))]
    features = load_encoder(saved.folder).encode_images(patches)
    np.testing.assert_allclose(theirs["features"][0], features.numpy(), rtol=0, atol=1e-5)
    assert len(np.unique(features.numpy().round(4), axis=0)) == 12

    path = tmp_path / "ours" / "slide.h5"
    settings = {"patch_size": 64, "level0_magnification": 40, "target_magnification": 20}
    write_patch_features(path, features, places, **settings)
    ours = contents(path)
    for name, (values, facts) in ours.items():
        np.testing.assert_allclose(values, theirs[name][0], rtol=0, atol=1e-5)
        assert values.dtype == theirs[name][0].dtype
        assert facts == {key: value for key, value in theirs[name][1].items() if key != "savetodir"}
    assert attributes["patch_size_level0"] == 128

    pooled = wsi.extract_slide_features(
        patch_features_path=str(path),
        slide_encoder=MeanSlideEncoder(model_name="mean-resnet50"),
        save_features=str(tmp_path / "pooled"),
        device="cpu",
    )
    np.testing.assert_allclose(contents(pooled)["features"][0], features.mean(dim=0).numpy(), rtol=0, atol=1e-5)
