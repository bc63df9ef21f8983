"""Recipes: each opens a tiny copy in the real layout, and a wrong copy is reported with the way to fix it.

The copies are written here from the data sets' own documentation, not from the recipes.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from medmoe_hf.data.phantom import FINDINGS, phantom_sample, write_webdataset, zero_shot_prompts
from medmoe_hf.errors import RecipeError
from medmoe_hf.evaluation.recipes import (
    WARNING,
    EvaluationSet,
    check_recipe,
    joined,
    load_recipe,
    open_recipe,
    recipe_names,
)
from medmoe_hf.evaluation.report import summary
from medmoe_hf.evaluation.results import Interval, Result
from medmoe_hf.model.modalities_medmoe import MODALITIES

CLASSES = {
    "chexpert_5x200": ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"],
    "rsna_pneumonia": ["Normal", "Pneumonia"],
    "thyroid_us": ["benign", "malignant"],
    "breast_us": ["benign", "malignant"],
    "acl_mri": ["no", "yes"],
    "meniscus_mri": ["n", "p"],
}
ORGANS = [
    "heart",
    "left lung",
    "right lung",
    "liver",
    "spleen",
    "pancreas",
    "left kidney",
    "right kidney",
    "bladder",
    "left femoral head",
    "right femoral head",
]
CLASSES |= {f"organs_{view}": ORGANS for view in ("axial", "coronal", "sagittal")}
COUNTS = {"chexpert_5x200": 1000, "thyroid_us": 72, "breast_us": 156, "acl_mri": 208}
COUNTS |= {f"organs_{view}": 618 for view in ("axial", "coronal", "sagittal")}
METRICS = dict.fromkeys(CLASSES, "accuracy") | dict.fromkeys(
    ("thyroid_us", "breast_us", "acl_mri", "meniscus_mri"), "macro_auroc"
)
XRAY, CT, MRI, ULTRASOUND = 0, 1, 2, 3


def write_csv(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")


def write_images(folder: Path, *names: str, size: tuple[int, int] = (8, 6)) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 90).save(folder / name)
    return [str(folder / name) for name in names]


def only(name: str, folder: Path) -> EvaluationSet:
    (found,) = open_recipe(load_recipe(name), folder)
    assert found.name == name
    return found


def problems(name: str, folder: Path) -> str:
    return "\n".join(check_recipe(load_recipe(name), folder))


# The copies


def chexpert(folder: Path) -> list[str]:
    write_csv(
        folder / "chexpert_5x200.csv",
        """imgpath,Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion
        CheXpert-v1.0/train/patient00011/study1/view1_frontal.jpg,0,1,0,0,0
        CheXpert-v1.0/train/patient00012/study3/view1_frontal.jpg,0.0,0.0,0.0,0.0,1.0
        CheXpert-v1.0/train/patient00011/study2/view1_frontal.jpg,1,0,0,0,0""",
    )
    return write_images(
        folder / "CheXpert-v1.0/train",
        "patient00011/study1/view1_frontal.jpg",
        "patient00012/study3/view1_frontal.jpg",
        "patient00011/study2/view1_frontal.jpg",
    )


def rsna(folder: Path) -> list[str]:
    write_csv(folder / "rsna_train.csv", "path,label\nstage_2_train_images/a.png,Normal")
    write_csv(folder / "rsna_val.csv", "path,label\nstage_2_train_images/b.png,0")
    write_csv(
        folder / "rsna_test.csv", "path,label\nstage_2_train_images/c.png,Pneumonia\nstage_2_train_images/d.png,1"
    )
    return write_images(folder / "stage_2_train_images", "a.png", "b.png", "c.png", "d.png")


def acl(folder: Path) -> list[str]:
    tables = {
        "train": "images/1001_sagittal_12.000000.png,yes\nimages/1001_sagittal_13.000000.png,yes",
        "val": "images/0455_sagittal_9.000000.png,no",
        "test": "images/1054_sagittal_19.000000.png,no",
    }
    for split, rows in tables.items():
        write_csv(folder / f"acl/dataframe/{split}_fold1.csv", f"filename,acl_label\n{rows}")
    return write_images(
        folder / "acl/images",
        "1001_sagittal_12.000000.png",
        "1001_sagittal_13.000000.png",
        "0455_sagittal_9.000000.png",
        "1054_sagittal_19.000000.png",
    )


def organs(folder: Path) -> list[str]:
    write_csv(
        folder / "annotations.csv",
        """filepath,split,tasks/organ label,original_filepath,original_split
        images/000000.tiff,train,10,LITS Challenge/volume-3.nii,train
        images/000001.tiff,val,0,LITS Challenge/volume-9.nii,train
        images/000002.tiff,test,3,LITS-Challenge-Test-Data/test-volume-5.nii,test
        images/000003.tiff,test,6,LITS-Challenge-Test-Data/test-volume-5.nii,test""",
    )
    return write_images(folder / "images", *(f"00000{number}.tiff" for number in range(4)))


def openi(folder: Path) -> list[str]:
    write_csv(
        folder / "indiana_reports.csv",
        """uid,MeSH,Problems,image,indication,comparison,findings,impression
        1,normal,normal,PA and lateral,,None.,The lungs are clear.,Normal chest.
        2,other,other,Chest,,None.,,Cardiomegaly.
        3,other,other,Chest,,None.,,""",
    )
    write_csv(
        folder / "indiana_projections.csv",
        """uid,filename,projection
        3,3_IM-1384-1001.dcm.png,Frontal
        1,1_IM-0001-4001.dcm.png,Frontal
        1,1_IM-0001-3001.dcm.png,Lateral
        2,2_IM-0652-1001.dcm.png,Frontal""",
    )
    names = ("1_IM-0001-4001.dcm.png", "2_IM-0652-1001.dcm.png", "3_IM-1384-1001.dcm.png")
    return write_images(folder / "images/images_normalized", *names)


MS_CXR_IMAGES = (
    "files/p10/p10032725/s50331901/687754ce-7420bfd3.jpg",
    "files/p11/p11022245/s59566639/a0b1c2d3-11111111.jpg",
)


def ms_cxr(folder: Path) -> list[str]:
    images = [
        {"id": number, "file_name": Path(path).name, "path": path, "width": 40, "height": 30, "num_annotations": 2}
        for number, path in enumerate(MS_CXR_IMAGES, start=1)
    ]
    boxes = [
        (1, 2, "small bilateral effusions", [2, 20, 8, 6]),
        (1, 2, "small bilateral effusions", [30, 20, 9.5, 6]),
        (1, 1, "the heart is enlarged", [10, 12, 18, 14]),
        (2, 1, "cardiomegaly", [8, 10, 20, 15]),
    ]
    content = {
        "info": {"version": "1.1.0"},
        "licenses": [],
        "categories": [{"id": 1, "name": "Cardiomegaly"}, {"id": 2, "name": "Pleural Effusion"}],
        "images": images,
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "label_text": text, "bbox": box, "area": 1}
            for number, (image, category, text, box) in enumerate(boxes)
        ],
    }
    (folder / "MS_CXR_Local_Alignment_v1.1.0.json").write_text(json.dumps(content))
    return write_images(folder, *MS_CXR_IMAGES, size=(40, 30))


def rocov2(folder: Path) -> list[str]:
    write_csv(
        folder / "test_captions.csv",
        """ID,Caption
        ROCOv2_2023_test_000001,"Axial CT of the abdomen, showing a liver mass."
        ROCOv2_2023_test_000002,T2-weighted MRI of the brain.
        ROCOv2_2023_test_000003,Arrow marks the lesion.""",
    )
    return write_images(folder / "test_images/test", *(f"ROCOv2_2023_test_00000{n}.jpg" for n in (1, 2, 3)))


def write_phantoms(folder: Path, samples: int = 24) -> None:
    write_webdataset(folder / "unseen", shards=2, samples_per_shard=samples // 2, seed=2, image_size=48)
    prompts = {modality: zero_shot_prompts(modality) for modality in FINDINGS}
    (folder / "prompts.json").write_text(json.dumps(prompts))


# The recipes themselves


def test_there_is_a_recipe_for_every_set():
    others = {
        "chexpert": ["zero-shot", "linear-probe"],
        "rocov2": ["retrieval"],
        "openi": ["retrieval"],
        "ms_cxr": ["grounding"],
    }
    others["clip_benchmark"] = ["zero-shot", "linear-probe"]
    others["phantoms"] = ["zero-shot", "linear-probe", "retrieval", "grounding", "routing"]
    assert recipe_names() == sorted([*CLASSES, *others])
    assert {name: load_recipe(name).tasks for name in others} == others
    probes = [name for name in CLASSES if "linear-probe" in load_recipe(name).tasks]
    assert {"thyroid_us", "breast_us", "acl_mri", "meniscus_mri"} <= set(probes)
    assert all("zero-shot" in load_recipe(name).tasks for name in CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_prompts_count_and_metric(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.classes == CLASSES[name]
    assert list(recipe.prompts) == CLASSES[name]
    assert recipe.count == COUNTS.get(name)
    assert recipe.metric == METRICS[name]
    sentences = [sentence for texts in recipe.prompts.values() for sentence in texts]
    assert [len(texts) for texts in recipe.prompts.values()] == [10] * len(recipe.classes)
    assert len({sentence.lower() for sentence in sentences}) == len(sentences)
    assert all(sentence[0].isupper() and sentence.endswith(".") and "{" not in sentence for sentence in sentences)


@pytest.mark.parametrize("view", ["axial", "coronal", "sagittal"])
def test_organ_prompts_name_their_view_and_organ_alone(view):
    prompts = load_recipe(f"organs_{view}").prompts
    for organ, sentences in prompts.items():
        side = {"left": "right", "right": "left"}.get(organ.split()[0])
        for sentence in sentences:
            words = sentence.lower().replace("right hemidiaphragm", "").replace("left hemidiaphragm", "")
            assert side is None or side not in words.split()
            others = {other for other in ("axial", "coronal", "sagittal") if other in words} - {view}
            assert not others
        assert sum(organ in sentence for sentence in sentences) >= 7


@pytest.mark.parametrize("name", [*CLASSES, "chexpert", "rocov2", "openi", "ms_cxr", "phantoms"])
def test_recipes_name_source_license_and_overlaps(name):
    recipe = load_recipe(name)
    assert recipe.source
    assert recipe.license
    assert recipe.overlaps
    assert recipe.expected


# Every recipe on its copy


def test_chexpert(tmp_path):
    paths = chexpert(tmp_path)
    found = only("chexpert_5x200", tmp_path)
    assert found.images == paths
    assert found.labels.tolist() == [1, 4, 0]
    assert found.subjects == ["patient00011", "patient00012", "patient00011"]
    assert found.modalities.tolist() == [XRAY] * 3
    assert found.splits.tolist() == ["test"] * 3
    assert found.captions is None
    assert found.boxes is None
    assert found.prompts["Edema"] == load_recipe("chexpert_5x200").prompts["Edema"]
    assert found.facts["metric"] == "accuracy"
    assert "train" in found.facts["overlaps"][0]


def test_rsna(tmp_path):
    paths = rsna(tmp_path)
    found = only("rsna_pneumonia", tmp_path)
    assert found.images == paths
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.splits.tolist() == ["train", "validation", "test", "test"]
    assert found.subjects is None


def test_thyroid(tmp_path):
    for split, row in {"train": "images/130_2.jpg,benign", "val": "images/7_1.jpg,malignant"}.items():
        write_csv(tmp_path / f"thyroid/dataframe/thyroid_{split}_fold1.csv", f"img_dir,label\n{row}")
    rows = "images/296_4.jpg,malignant\nimages/296_5.jpg,malignant"
    write_csv(tmp_path / "thyroid/dataframe/thyroid_test_fold1.csv", f"img_dir,label\n{rows}")
    paths = write_images(tmp_path / "thyroid/images", "130_2.jpg", "7_1.jpg", "296_4.jpg", "296_5.jpg")
    found = only("thyroid_us", tmp_path)
    assert found.images == paths
    assert found.labels.tolist() == [0, 1, 1, 1]
    assert found.subjects == ["130", "7", "296", "296"]
    assert found.modalities.tolist() == [ULTRASOUND] * 4


def test_breast(tmp_path):
    for split, row in {"train": "images/normal (99).png,benign", "val": "images/benign (2).png,benign"}.items():
        write_csv(tmp_path / f"breast/dataframe/breast_{split}_fold1.csv", f"filename,label\n{row}")
    write_csv(
        tmp_path / "breast/dataframe/breast_test_fold1.csv",
        "filename,label\nimages/malignant (1).png,malignant\nimages/normal (3).png,normal",
    )
    names = ("normal (99).png", "benign (2).png", "malignant (1).png", "normal (3).png")
    paths = write_images(tmp_path / "breast/images", *names)
    found = only("breast_us", tmp_path)
    assert found.images == paths
    assert found.labels.tolist() == [0, 0, 1, 0]
    assert found.splits.tolist() == ["train", "validation", "test", "test"]


def test_acl(tmp_path):
    paths = acl(tmp_path)
    found = only("acl_mri", tmp_path)
    assert found.images == paths
    assert found.labels.tolist() == [1, 1, 0, 0]
    assert found.splits.tolist() == ["train", "train", "validation", "test"]
    assert found.subjects == ["1001", "1001", "0455", "1054"]
    assert found.modalities.tolist() == [MRI] * 4


def test_meniscus(tmp_path):
    rows = {"train": "0012_sagittal_13", "val": "0675_sagittal_19", "test": "0032_sagittal_23"}
    for (split, name), label in zip(rows.items(), "npp", strict=True):
        table = tmp_path / f"meniscus/dataframe/meniscus_{split}_fold1.csv"
        write_csv(table, f"img_dir,label\nimages/{name}.000000.png,{label}")
    paths = write_images(tmp_path / "meniscus/images", *(f"{name}.000000.png" for name in rows.values()))
    found = only("meniscus_mri", tmp_path)
    assert found.images == paths
    assert found.labels.tolist() == [0, 1, 1]
    assert found.subjects == ["0012", "0675", "0032"]


@pytest.mark.parametrize("view", ["axial", "coronal", "sagittal"])
def test_organs(tmp_path, view):
    paths = organs(tmp_path)
    found = only(f"organs_{view}", tmp_path)
    assert found.images == paths
    assert [ORGANS[label] for label in found.labels] == ["right femoral head", "heart", "liver", "left kidney"]
    assert found.splits.tolist() == ["train", "validation", "test", "test"]
    assert found.subjects[2] == found.subjects[3] == "LITS-Challenge-Test-Data/test-volume-5.nii"
    assert found.modalities.tolist() == [CT] * 4


def test_rocov2(tmp_path):
    paths = rocov2(tmp_path)
    found = only("rocov2", tmp_path)
    assert found.images == paths
    assert found.captions[0] == "Axial CT of the abdomen, showing a liver mass."
    assert found.modalities.tolist() == [CT, MRI, -100]
    assert found.labels is None
    assert found.classes == []


def test_openi(tmp_path):
    first, second, _ = openi(tmp_path)
    found = only("openi", tmp_path)
    # Frontal views with a text: the third report is empty, and so is missing here though it is first in the table.
    assert found.images == [first, second]
    assert found.captions == ["The lungs are clear. Normal chest.", "Cardiomegaly."]
    assert found.subjects == ["1", "2"]
    assert "1 rows have no text" in problems("openi", tmp_path)


def test_ms_cxr_from_json_and_from_csv(tmp_path):
    first, second = ms_cxr(tmp_path)
    found = only("ms_cxr", tmp_path)
    assert found.images == [first, first, second]
    assert found.phrases == ["small bilateral effusions", "the heart is enlarged", "cardiomegaly"]
    assert found.boxes == [
        [(2.0, 20.0, 10.0, 26.0), (30.0, 20.0, 39.5, 26.0)],
        [(10.0, 12.0, 28.0, 26.0)],
        [(8.0, 10.0, 28.0, 25.0)],
    ]
    assert [found.classes[label] for label in found.labels] == ["Pleural Effusion", "Cardiomegaly", "Cardiomegaly"]
    assert found.subjects == ["p10032725", "p10032725", "p11022245"]
    assert len(found.references) == 3
    assert len(set(found.references[0])) == 10

    (tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json").unlink()
    header = ["dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width", "image_height"]
    with open(tmp_path / "MS_CXR_Local_Alignment_v1.0.0.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for image, category, phrase, box in (
            (0, "Pleural Effusion", "small bilateral effusions", (2, 20, 8, 6)),
            (0, "Pleural Effusion", "small bilateral effusions", (30, 20, 9.5, 6)),
            (0, "Cardiomegaly", "the heart is enlarged", (10, 12, 18, 14)),
            (1, "Cardiomegaly", "cardiomegaly", (8, 10, 20, 15)),
        ):
            path = MS_CXR_IMAGES[image]
            writer.writerow([Path(path).stem, category, phrase, path, *box, 40, 30])
    again = only("ms_cxr", tmp_path)
    assert again.boxes == found.boxes
    assert again.phrases == found.phrases
    # as saved by a spreadsheet with decimal commas
    table = tmp_path / "MS_CXR_Local_Alignment_v1.0.0.csv"
    lines = table.read_text().replace(",", ";").replace("9.5", "9,5")
    table.write_text(lines, encoding="utf-16")
    assert only("ms_cxr", tmp_path).boxes == found.boxes
    assert again.images == found.images


def test_phantoms(tmp_path):
    write_phantoms(tmp_path)
    sets = open_recipe(load_recipe("phantoms"), tmp_path)
    drawn = [phantom_sample(2, index, image_size=48) for index in range(24)]
    assert [one.name for one in sets] == [
        f"phantoms/{name}" for index, name in enumerate(MODALITIES) if any(s["modality"] == index for s in drawn)
    ]
    for one in sets:
        modality = one.name.split("/")[1]
        own = [sample for sample in drawn if MODALITIES[sample["modality"]] == modality]
        assert one.classes == list(FINDINGS[modality])
        assert one.prompts == zero_shot_prompts(modality)
        assert [one.classes[label] for label in one.labels] == [sample["finding"] for sample in own]
        assert one.captions == [sample["caption"] for sample in own]
        assert one.phrases == [sample["finding_word"] for sample in own]
        assert one.boxes == [[tuple(sample["box"])] if sample["box"] else [] for sample in own]
        assert one.references[0] == zero_shot_prompts(modality)["normal"]
        for image, sample in zip(one.images, own, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(sample["image"]))
    whole = joined(sets, "phantoms")
    assert len(whole) == 24
    assert sorted(whole.subjects) == sorted(sample["id"] for sample in drawn)
    assert whole.modalities.tolist() == sorted(sample["modality"] for sample in drawn)
    assert whole.labels is None
    assert whole.classes == []


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_a_recipe_of_your_own_for_folders(tmp_path, metric):
    recipe = {
        "name": "mine",
        "title": "Mine",
        "tasks": ["zero-shot", "linear-probe"],
        "modality": "ultrasound",
        "metric": metric,
        "layout": {
            "kind": "folder",
            "splits": {"train": "train", "test": "test"},
            "folders": {"benign": ["benign", "normal"]},
            "without": ["_mask"],
        },
        "expected": "train/ and test/",
        "source": "here",
        "license": "none",
        "overlaps": ["none"],
        "classes": ["benign", "malignant"],
        "prompts": {"benign": ["A benign mass."], "malignant": ["A malignant mass."]},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    paths = write_images(tmp_path / "data", "train/benign/a.png", "train/normal/b.png", "train/malignant/c.png")
    paths += write_images(tmp_path / "data", "test/benign/d.png", "test/malignant/e.png")
    write_images(tmp_path / "data", "train/benign/a_mask.png")
    (tmp_path / "data/test/normal").mkdir()
    (found,) = open_recipe(load_recipe(tmp_path / "mine.yaml"), tmp_path / "data")
    assert found.images == paths
    assert found.labels.tolist() == [0, 0, 1, 0, 1]
    assert found.split("test").images == paths[3:]
    assert found.facts["metric"] == metric
    # It is in the short table, with its interval.
    facts = found.facts | {"unit": "image"}
    result = Result("zero-shot", "model", "mine", 5, {f"global/{metric}": Interval(0.625, 0.5, 0.75, 5)}, facts)
    shown = summary([result])
    assert metric.replace("_", " ") in shown
    assert "0.625 [0.50, 0.75]" in shown

    shutil.rmtree(tmp_path / "data/test/malignant")
    (message, *_) = check_recipe(load_recipe(tmp_path / "mine.yaml"), tmp_path / "data")
    assert 'for images of "malignant" (next to it: benign, normal)' in message
    assert "Rename" in message


# Wrong copies


def test_a_missing_folder(tmp_path):
    message = problems("acl_mri", tmp_path / "nowhere")
    assert f"There is no folder {tmp_path / 'nowhere'}" in message


def test_a_missing_table_says_what_should_be_there(tmp_path):
    chexpert(tmp_path)
    (tmp_path / "chexpert_5x200.csv").unlink()
    message = problems("chexpert_5x200", tmp_path)
    assert f"{tmp_path / 'chexpert_5x200.csv'} does not exist" in message
    assert "CheXpert-v1.0/train/..." in message
    assert "stanfordmlgroup" in message
    with pytest.raises(RecipeError, match=r"not a usable copy of CheXpert 5x200:\n.*chexpert_5x200.csv"):
        open_recipe(load_recipe("chexpert_5x200"), tmp_path)


def test_a_column_of_another_name(tmp_path):
    chexpert(tmp_path)
    table = tmp_path / "chexpert_5x200.csv"
    table.write_text(table.read_text().replace("imgpath,", "img_path,"))
    message = problems("chexpert_5x200", tmp_path)
    assert 'no column "imgpath", but img_path, Atelectasis' in message
    assert "did you mean img_path?" in message
    assert "Rename the column" in message


def test_rows_of_two_classes_or_none(tmp_path):
    chexpert(tmp_path)
    table = tmp_path / "chexpert_5x200.csv"
    table.write_text(table.read_text().replace("0,1,0,0,0", "0,1,0,1,0").replace("1,0,0,0,0", "0,0,0,0,0"))
    message = problems("chexpert_5x200", tmp_path)
    assert "2 rows cannot be labelled" in message
    assert "1 in Cardiomegaly and Edema, 1 in none of the classes' columns" in message


def test_unknown_labels(tmp_path):
    acl(tmp_path)
    table = tmp_path / "acl/dataframe/test_fold1.csv"
    table.write_text(table.read_text().replace(",no", ",partial"))
    message = problems("acl_mri", tmp_path)
    assert '1 rows cannot be labelled: `acl_label` should contain no, yes, but contain "partial"' in message
    assert "`values`" in message


def test_missing_images_are_counted_and_named(tmp_path):
    paths = chexpert(tmp_path)
    Path(paths[1]).unlink()
    Path(paths[2]).unlink()
    message = problems("chexpert_5x200", tmp_path)
    assert f"2 of 3 images are missing: {paths[1]}, {paths[2]}. Put them into" in message
    assert "`images`" in message


def test_a_copy_without_training_images_can_be_used_for_zero_shot(tmp_path):
    paths = acl(tmp_path)
    (tmp_path / "acl/dataframe/train_fold1.csv").unlink()
    Path(paths[2]).unlink()
    found = check_recipe(load_recipe("acl_mri"), tmp_path)
    assert all(problem.startswith(WARNING) for problem in found)
    assert any(
        "the train split is left out" in problem and "train_fold1.csv does not exist" in problem for problem in found
    )
    assert any("the validation split is left out" in problem and "1 of 1 images" in problem for problem in found)
    assert only("acl_mri", tmp_path).images == paths[3:]


def test_another_count_is_a_warning(tmp_path):
    acl(tmp_path)
    assert problems("acl_mri", tmp_path).startswith(f"{WARNING}the test split has N = 1, the published one has 208")


def test_subjects_in_train_and_test_are_a_warning(tmp_path):
    organs(tmp_path)
    table = tmp_path / "annotations.csv"
    table.write_text(
        table.read_text().replace("LITS Challenge/volume-3.nii", "LITS-Challenge-Test-Data/test-volume-5.nii")
    )
    assert "1 subjects have images in both train and test" in problems("organs_axial", tmp_path)


def test_missing_subjects_are_a_warning(tmp_path):
    paths = organs(tmp_path)
    table = tmp_path / "annotations.csv"
    table.write_text(table.read_text().replace("original_filepath", "volume"))
    assert "2 images have no subject" in problems("organs_axial", tmp_path)
    assert only("organs_axial", tmp_path).subjects == paths


def test_a_split_of_another_name(tmp_path):
    organs(tmp_path)
    table = tmp_path / "annotations.csv"
    table.write_text(table.read_text().replace(",val,", ",valid,"))
    assert '`split` contains "valid"; it must be train, validation or test' in problems("organs_axial", tmp_path)


def test_openi_without_reports(tmp_path):
    openi(tmp_path)
    (tmp_path / "indiana_reports.csv").unlink()
    assert f"{tmp_path / 'indiana_reports.csv'} does not exist" in problems("openi", tmp_path)


def test_ms_cxr_without_annotations_or_with_broken_ones(tmp_path):
    ms_cxr(tmp_path)
    file = tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "images": whole["images"][:1]}))
    assert "is not a COCO file like MS-CXR's: KeyError 2. It needs images" in problems("ms_cxr", tmp_path)
    whole["categories"][0]["name"] = "Fracture"
    file.write_text(json.dumps(whole))
    assert "2 phrases are of Fracture, not of Cardiomegaly" in problems("ms_cxr", tmp_path)
    file.unlink()
    assert "contains none of MS_CXR_Local_Alignment_v1.1.0.json or" in problems("ms_cxr", tmp_path)


def test_ms_cxr_with_images_that_were_made_smaller(tmp_path):
    ms_cxr(tmp_path)
    write_images(tmp_path, MS_CXR_IMAGES[1], size=(20, 15))
    message = problems("ms_cxr", tmp_path)
    assert "1 of 2 images are not the ones that were annotated" in message
    assert "20 x 15 instead of 40 x 30" in message


def test_phantoms_of_another_folder(tmp_path):
    message = problems("phantoms", tmp_path)
    assert f"{tmp_path / 'prompts.json'} is missing" in message
    assert f"No file matches {tmp_path / 'unseen/*.tar'}" in message
    assert "train_from_scratch.py" in message
    write_phantoms(tmp_path, samples=4)
    shard = tmp_path / "unseen/phantom-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    assert f"{shard} is truncated" in problems("phantoms", tmp_path)


def test_phantoms_without_prompts_for_a_finding(tmp_path):
    write_phantoms(tmp_path, samples=12)
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    (tmp_path / "prompts.json").write_text(json.dumps({name: {"normal": prompts[name]["normal"]} for name in prompts}))
    assert "which has no prompts" in problems("phantoms", tmp_path)


# Recipes of your own


def test_unknown_names_and_keys_get_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match=r'no recipe "chexpert5x200". Did you mean chexpert_5x200\?'):
        load_recipe("chexpert5x200")
    with pytest.raises(RecipeError, match=r"Cannot read .*mine.yaml"):
        load_recipe(tmp_path / "mine.yaml")
    content = load_recipe("acl_mri").model_dump()
    content["licens"] = content.pop("license")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match=r"licens: unknown key. Did you mean `license`\?"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {"no": ["No tear."]}}, "`prompts` must hold sentences for each of `classes`"),
        ({"prompts": {"no": ["A knee."], "yes": ["A knee."]}}, "holds 'A knee.' twice"),
        ({"modality": "mammogram"}, "`modality` must be xray"),
        ({"classes": ["no"]}, "`classes` must name two or more"),
        ({"tasks": ["retrieval"]}, "retrieval needs `caption`"),
    ],
)
def test_inconsistent_recipes_are_refused(tmp_path, change, message):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(load_recipe("acl_mri").model_dump() | change, sort_keys=False))
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "mine.yaml")


def test_split_keeps_columns_together(tmp_path):
    paths = acl(tmp_path)
    part = only("acl_mri", tmp_path).split("train")
    assert part.images == paths[:2]
    assert part.labels.tolist() == [1, 1]
    assert part.subjects == ["1001", "1001"]
    assert part.classes == ["no", "yes"]
    unsplit = EvaluationSet("plain", ["a", "b"])
    assert len(unsplit.split("test")) == 2
    assert len(unsplit.split("train")) == 0


def test_recipes_with_former_names_of_keys_still_load(tmp_path):
    content = load_recipe("acl_mri").model_dump()
    content["licence"] = content.pop("license")
    content["layout"]["tables"]["val"] = content["layout"]["tables"].pop("validation")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    read = load_recipe(tmp_path / "mine.yaml")
    assert read.license == load_recipe("acl_mri").license
    assert read.layout.tables["validation"] == "acl/dataframe/val_fold1.csv"
