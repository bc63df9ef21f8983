"""kaiko-eva: our exported image tower as its ONNXModel, and its data sets on the embeddings that we wrote."""

import json
import multiprocessing

import numpy as np
import pytest
import torch

pytest.importorskip("eva.core", reason='pip install "medmoe_hf[eva]"')

from eva.core.data.datasets import EmbeddingsClassificationDataset
from eva.core.models.wrappers import ONNXModel

from medmoe_hf.data.sources import load_sources
from medmoe_hf.inference.patches import ImageTransform
from medmoe_hf.search.eva import encode_for_eva


@pytest.fixture
def start_method():
    """Its data sets change how Python starts processes."""
    before = multiprocessing.get_start_method()
    yield
    multiprocessing.set_start_method(before, force=True)


def test_its_data_set_reads_our_embeddings(saved, pictures, tmp_path, start_method):
    labels = ["lesion", "normal", "lesion", "cyst", "normal", "cyst"]
    lines = ["image,caption,kind"]
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        picture.save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,caption,{label}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    source = {"kind": "csv", "files": [str(tmp_path / "table.csv")], "label": "kind"}
    (tmp_path / "s.yaml").write_text(json.dumps([source]))
    for split in ("train", "val"):
        encode_for_eva(load_sources(tmp_path / "s.yaml"), tmp_path / "embeddings", saved.folder, split)
    expected = saved.images(pictures)
    for split in ("train", "val"):
        data = EmbeddingsClassificationDataset(str(tmp_path / "embeddings"), "manifest.csv", split=split)
        data.setup()
        assert len(data) == 6
        found, targets = zip(*(data[index] for index in range(6)), strict=True)
        np.testing.assert_allclose(torch.stack(found).numpy(), expected, rtol=0, atol=1e-5)
        assert [int(target) for target in targets] == [0, 1, 0, 2, 1, 2]


@pytest.mark.slow
def test_our_export_is_its_onnx_model(saved, pictures, tmp_path):
    from medmoe_hf.hub.export import export

    export(saved.folder, tmp_path / "exported")
    model = ONNXModel(str(tmp_path / "exported" / "image_tower.onnx"))
    transform = ImageTransform(saved.folder)
    colors = [picture.convert("RGB") for picture in pictures]
    # its vision data sets yield tensors (3, H, W)
    images = [torch.from_numpy(np.array(color)).permute(2, 0, 1) for color in colors]
    found = model(torch.stack([transform(image) for image in images]))
    np.testing.assert_allclose(found.numpy(), saved.images(colors), rtol=0, atol=1e-5)
