"""What is measured: each task's images, classes, and the sentences that describe a class.

A task selects rows of the manifest by columns (`where`); so does each of its classes. A class's prompts are all
combinations of the task's templates with the class's names. Templates and names were written, not searched for.

Chance is 1 / number of classes in balanced accuracy and 0.5 in AUROC. The baselines of all tasks with a probe are
linear probes on the features of the bare ImageNet backbone and on 16x16 gray pixels, trained on the same rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from manifest import Row, matching

from medmoe_hf.data import MODALITIES
from medmoe_hf.errors import SourceError
from medmoe_hf.evaluation.dataset import EvaluationSet

Where = Mapping[str, Sequence[str]]


def _templates(technique: str, other: str, part: str) -> tuple[str, ...]:
    """Sentences about a body part, with two names of the technique."""
    return f"{technique} of the {part}: {{}}.", f"{part} {other} showing {{}}.", f"{{}}, {part} {technique}.", "{}."


_CHEST = _templates("X-ray", "radiograph", "chest")
_KNEE = _templates("X-ray", "radiograph", "knee")
_CHEST_CT = _templates("CT scan", "CT", "chest")
_BRAIN = _templates("MRI", "magnetic resonance image", "brain")
_BREAST = _templates("ultrasound image", "ultrasound", "breast")
_LUNG = _templates("histopathology image", "H&E stained section", "lung")
_COLON = _templates("histopathology image", "H&E stained section", "colon")
_RETINA = ("Fundus photograph showing {}.", "Retinal photograph: {}.", "{}, fundus photograph.", "{}.")

_NORMAL = ("no finding", "no abnormality", "normal")


@dataclass(frozen=True)
class Choice:
    """A class of a task.

    Attributes:
        names: What the templates are filled with.
        where: Column -> accepted cells; rows of the class.
    """

    names: Sequence[str]
    where: Where


def labelled(names: Sequence[str], *labels: str) -> Choice:
    """Returns a class of the rows with one of these labels."""
    return Choice(names, {"label": labels})


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        title: Name in tables.
        where: Column -> accepted cells, for all classes.
        classes: Name -> class.
        templates: Sentences with `{}` for a name of a class.
        external: Whether the images are in the split `external`; otherwise in `val` and `test`.
        probe: Whether linear probes are trained; not where the answer is nearly always right, or without train rows.
        note: What limits the conclusions.
        answered_by: Task that a checkpoint brings along for these images too; its classes correspond to these, in
            order. Empty if it brings this one.
    """

    title: str
    where: Where
    classes: Mapping[str, Choice]
    templates: Sequence[str]
    external: bool = False
    probe: bool = False
    note: str = ""
    answered_by: str = ""

    def prompts(self) -> dict[str, list[str]]:
        """Returns the sentences of each class, without repetitions."""
        return {
            name: list(
                dict.fromkeys(
                    _capitalized(template.format(word)) for template in self.templates for word in choice.names
                )
            )
            for name, choice in self.classes.items()
        }

    def rows(self, rows: Sequence[Row], splits: Sequence[str]) -> tuple[list[Row], np.ndarray]:
        """Selects the images of the task in some splits.

        Args:
            rows: The manifest.
            splits: Names of splits.

        Returns:
            N rows, and (N,) indices of their classes.

        Raises:
            SourceError: If a row belongs to two classes.
        """
        found, labels = [], []
        inside = matching(rows, {**self.where, "split": splits})
        members = [{id(row) for row in matching(inside, choice.where)} for choice in self.classes.values()]
        for row in inside:
            own = [index for index, ids in enumerate(members) if id(row) in ids]
            if len(own) > 1:
                names = [list(self.classes)[index] for index in own]
                raise SourceError(f"{row['file']} belongs to two classes of a task: {' and '.join(names)}.")
            if own:
                found.append(row)
                labels.append(own[0])
        return found, np.array(labels, dtype=np.int64)

    def present(self, rows: Sequence[Row], splits: Sequence[str]) -> "list[str]":
        """Returns the names of the classes that have images in these splits."""
        _, labels = self.rows(rows, splits)
        return [name for index, name in enumerate(self.classes) if (labels == index).any()]


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


_NO_PNEUMONIA = labelled((*_NORMAL, "clear lungs"), "no finding")
_PNEUMONIA = labelled(("pneumonia", "signs of pneumonia", "lung infection"), "pneumonia")
_KNEE_NORMAL = ("normal knee", "healthy knee", "no osteoarthritis")
_SEVERE = labelled(("severe osteoarthritis", "severe knee osteoarthritis"), "severe knee osteoarthritis")
_BENIGN_BREAST = labelled(("benign breast lesion", "benign breast tumour", "benign mass"), "benign breast lesion")
_MALIGNANT_BREAST = labelled(
    ("malignant breast lesion", "malignant breast tumour", "breast cancer"), "malignant breast lesion"
)
_GLAUCOMA = labelled(("glaucoma", "glaucomatous optic nerve damage"), "glaucoma")
_RETINOPATHY = labelled(("diabetic retinopathy", "signs of diabetic retinopathy"), "diabetic retinopathy")
_HEALTHY_RETINA = labelled((*_NORMAL, "healthy retina"), "no finding")

_MODALITY_WORDS = {
    "xray": ("An X-ray.", "A radiograph."),
    "ct": ("A CT scan.", "A computed tomography slice."),
    "mri": ("An MRI scan.", "A magnetic resonance image."),
    "ultrasound": ("An ultrasound image.", "A sonogram."),
    "histopathology": ("A histology section.", "An H&E stained microscopy image."),
    "fundus": ("A fundus photograph.", "A photograph of the retina."),
}
_REGION_NOTE = "Most regions come from one source each, so that scanners may be told apart instead of organs."


def _region(names: Sequence[str], *body_parts: str) -> Choice:
    return Choice(names, {"body_part": body_parts})


_REGIONS: dict[str, dict[str, Choice]] = {
    "xray": {"chest": _region(("the chest", "the lungs"), "chest"), "knee": _region(("the knee",), "knee")},
    "ct": {
        "chest": _region(("the chest", "the lungs"), "chest"),
        "abdomen": _region(("the abdomen",), "abdomen"),
        "head": _region(("the head", "the brain"), "head"),
    },
    "mri": {
        "head": _region(("the head", "the brain"), "head"),
        "heart": _region(("the heart",), "heart"),
    },
    "ultrasound": {
        "breast": _region(("the breast",), "breast"),
        "ovary": _region(("the ovary",), "ovary"),
        "nerve": _region(("a peripheral nerve", "a nerve"), "limb and neck nerve region"),
    },
    "histopathology": {
        "lung": _region(("the lung", "lung tissue"), "lung"),
        "colon": _region(("the colon", "colorectal tissue"), "colon"),
        "oral mucosa": _region(("the oral mucosa", "the mouth"), "oral mucosa"),
    },
}
_OTHER_REGIONS: dict[str, dict[str, Choice]] = {
    "mri": {"spine": _region(("the lumbar spine", "the spine"), "lumbar spine")},
    "ultrasound": {"neck": _region(("the neck with the carotid artery", "the common carotid artery"), "neck")},
    "histopathology": {
        "breast": _region(("the breast", "breast tissue"), "breast"),
        "lymph node": _region(("a lymph node",), "lymph node"),
    },
}
_REGION_TEMPLATES = {
    "xray": ("X-ray of {}.", "Radiograph of {}."),
    "ct": ("CT of {}.", "Axial CT slice of {}."),
    "mri": ("MRI of {}.", "Magnetic resonance image of {}."),
    "ultrasound": ("Ultrasound of {}.", "Sonogram of {}."),
    "histopathology": ("Histology of {}.", "H&E stained section of {}."),
}


def _region_tasks() -> dict[str, Task]:
    found = {}
    for modality, regions in _REGIONS.items():
        where, templates = {"modality": (modality,)}, _REGION_TEMPLATES[modality]
        found[f"region-{modality}"] = Task(f"Body region, {modality}", where, regions, templates, note=_REGION_NOTE)
        found[f"region-{modality}-external"] = Task(
            f"Body region, {modality}, other sources",
            where,
            {**regions, **_OTHER_REGIONS.get(modality, {})},
            templates,
            external=True,
            note=f"{_REGION_NOTE} Classes without images are offered as wrong answers.",
            answered_by="" if modality in _OTHER_REGIONS else f"region-{modality}",
        )
    return found


TASKS: dict[str, Task] = {
    "pneumonia-children": Task(
        "Pneumonia, chest X-rays of children",
        {"source": ("kermany-cxr",)},
        {"no finding": _NO_PNEUMONIA, "pneumonia": _PNEUMONIA},
        _CHEST,
        probe=True,
    ),
    "pneumonia-adults": Task(
        "Pneumonia, chest X-rays of adults",
        {"source": ("nih-cxr14",)},
        {"no finding": _NO_PNEUMONIA, "pneumonia": _PNEUMONIA},
        _CHEST,
        probe=True,
        note="Labels were mined from reports.",
    ),
    "knee-severe": Task(
        "Knee osteoarthritis, severe or normal",
        {"source": ("knee-oa",)},
        {"normal": labelled(_KNEE_NORMAL, "normal knee"), "severe": _SEVERE},
        _KNEE,
        probe=True,
    ),
    "knee-osteoarthritis": Task(
        "Knee osteoarthritis, at least mild or not",
        {"source": ("knee-oa",)},
        {
            "none or doubtful": labelled(
                (*_KNEE_NORMAL, "doubtful osteoarthritis"), "normal knee", "doubtful knee osteoarthritis"
            ),
            "at least mild": labelled(
                ("mild osteoarthritis", "moderate osteoarthritis", "severe osteoarthritis"),
                "mild knee osteoarthritis",
                "moderate knee osteoarthritis",
                "severe knee osteoarthritis",
            ),
        },
        _KNEE,
    ),
    "knee-grades": Task(
        "Knee osteoarthritis, 5 grades",
        {"source": ("knee-oa",)},
        {
            "normal": labelled(_KNEE_NORMAL, "normal knee"),
            "doubtful": labelled(
                ("doubtful osteoarthritis", "doubtful knee osteoarthritis"), "doubtful knee osteoarthritis"
            ),
            "mild": labelled(("mild osteoarthritis", "mild knee osteoarthritis"), "mild knee osteoarthritis"),
            "moderate": labelled(
                ("moderate osteoarthritis", "moderate knee osteoarthritis"), "moderate knee osteoarthritis"
            ),
            "severe": _SEVERE,
        },
        _KNEE,
        probe=True,
    ),
    "lung-ct": Task(
        "Lung CT, 3 classes",
        {"source": ("iq-othnccd",)},
        {
            "no finding": labelled((*_NORMAL, "normal lungs"), "no finding"),
            "benign": labelled(("benign lung nodule", "benign pulmonary nodule"), "benign lung nodule"),
            "malignant": labelled(
                ("malignant lung tumour", "malignant lung tumor", "lung cancer"), "malignant lung tumour"
            ),
        },
        _CHEST_CT,
        probe=True,
        note="Subjects are derived, not known.",
    ),
    "ct-contrast": Task(
        "CT with or without contrast medium",
        {"source": ("tcia-siim-ct",)},
        {
            "without": labelled(("non-contrast", "without contrast", "without intravenous contrast"), "non-contrast"),
            "with": labelled(("contrast-enhanced", "with contrast", "with intravenous contrast"), "contrast-enhanced"),
        },
        ("CT scan of the chest or abdomen: {}.", "CT, {}.", "{}, CT scan.", "{}."),
        probe=True,
    ),
    "ct-window": Task(
        "CT in a lung window or a soft-tissue window",
        {"source": ("tcia-siim-ct",)},
        {
            "lung window": Choice(("lung window",), {"view": ("axial, lung window",)}),
            "soft window": Choice(("soft window", "soft-tissue window"), {"view": ("axial, soft window",)}),
        },
        ("CT scan of the chest or abdomen, {}.", "Axial CT, {}.", "{}."),
    ),
    "brain-tumour": Task(
        "Brain tumour, 3 classes",
        {"source": ("brain-tumor-mri",)},
        {
            "glioma": labelled(("glioma", "glioma, a brain tumour"), "glioma"),
            "meningioma": labelled(("meningioma", "meningioma, a tumour of the meninges"), "meningioma"),
            "pituitary tumour": labelled(
                ("pituitary tumour", "pituitary tumor", "pituitary adenoma"), "pituitary tumour"
            ),
        },
        _BRAIN,
        probe=True,
        note="Subjects are derived, not known.",
    ),
    "breast-ultrasound": Task(
        "Breast ultrasound, 3 classes",
        {"source": ("busi",)},
        {
            "normal": labelled((*_NORMAL, "normal breast", "no lesion"), "normal breast"),
            "benign": _BENIGN_BREAST,
            "malignant": _MALIGNANT_BREAST,
        },
        _BREAST,
        probe=True,
        note="Subjects are derived, not known.",
    ),
    "breast-malignancy": Task(
        "Breast ultrasound, malignant or benign lesion",
        {"source": ("busi",)},
        {"benign": _BENIGN_BREAST, "malignant": _MALIGNANT_BREAST},
        _BREAST,
        note="Subjects are derived, not known.",
    ),
    "lung-histology": Task(
        "Lung histology, 3 classes",
        {"source": ("lc25000-lung",)},
        {
            "benign": labelled(("benign lung tissue", "normal lung tissue", "no tumour"), "benign lung tissue"),
            "adenocarcinoma": labelled(("lung adenocarcinoma", "adenocarcinoma of the lung"), "lung adenocarcinoma"),
            "squamous cell carcinoma": labelled(
                ("lung squamous cell carcinoma", "squamous cell carcinoma of the lung"), "lung squamous cell carcinoma"
            ),
        },
        _LUNG,
        probe=True,
        note="Tiles are augmented copies of few slides; subjects are derived, not known.",
    ),
    "colon-histology": Task(
        "Colon histology, polyp or neoplasia",
        {"source": ("ebhi-seg",)},
        {
            "polyp": labelled(("colorectal polyp", "polyp of the colon"), "colorectal polyp"),
            "neoplasia": labelled(("colorectal neoplasia", "neoplasia of the colon"), "colorectal neoplasia"),
        },
        _COLON,
        note="Very few images.",
    ),
    "glaucoma": Task(
        "Glaucoma",
        {"source": ("hygd",)},
        {"no glaucoma": labelled(("no glaucoma", "no sign of glaucoma"), "no glaucoma"), "glaucoma": _GLAUCOMA},
        _RETINA,
        probe=True,
        note='"No glaucoma" does not mean healthy.',
    ),
    "cataract-severity": Task(
        "Cataract on fundus photographs, at least moderate or not",
        {"source": ("csdi",)},
        {
            "at most mild": Choice(
                ("mild cataract", "minimal cataract"),
                {"view": ("severity: minimal", "severity: mild")},
            ),
            "at least moderate": Choice(
                ("moderate cataract", "severe cataract"),
                {"view": ("severity: moderate", "severity: severe")},
            ),
        },
        _RETINA,
        note="Very few images.",
    ),
    "fundus-diseases": Task(
        "Fundus diseases, a source for each",
        {"source": ("csdi", "hygd", "idrid")},
        {
            "cataract": labelled(("cataract", "clouding by a cataract"), "cataract"),
            "diabetic retinopathy": _RETINOPATHY,
            "glaucoma": _GLAUCOMA,
        },
        _RETINA,
        note="Each disease comes from one camera, so that cameras may be told apart instead of diseases.",
    ),
    "fundus-external": Task(
        "Fundus diseases, another camera, 3 classes",
        {"source": ("hrf-full",)},
        {"no finding": _HEALTHY_RETINA, "diabetic retinopathy": _RETINOPATHY, "glaucoma": _GLAUCOMA},
        _RETINA,
        external=True,
    ),
    "glaucoma-external": Task(
        "Glaucoma, another camera",
        {"source": ("hrf-full",)},
        {
            "no finding": labelled((*_HEALTHY_RETINA.names, "no glaucoma", "no sign of glaucoma"), "no finding"),
            "glaucoma": _GLAUCOMA,
        },
        _RETINA,
        external=True,
        answered_by="glaucoma",
    ),
    "retinopathy-external": Task(
        "Diabetic retinopathy, another camera",
        {"source": ("hrf-full",)},
        {"no finding": _HEALTHY_RETINA, "diabetic retinopathy": _RETINOPATHY},
        _RETINA,
        external=True,
    ),
    "modality": Task(
        "Modality by its name, no router",
        {},
        {name: Choice(_MODALITY_WORDS[name], {"modality": (name,)}) for name in MODALITIES},
        ("{}",),
    ),
    "modality-external": Task(
        "Modality by its name, no router, other sources",
        {},
        {name: Choice(_MODALITY_WORDS[name], {"modality": (name,)}) for name in MODALITIES},
        ("{}",),
        external=True,
        answered_by="modality",
    ),
    **_region_tasks(),
}
"""Name -> task, in the order of the tables. No folder of the layout needs to have the images of all."""


def tasks_of(rows: Sequence[Row], split: str) -> dict[str, Task]:
    """Selects the tasks that can be measured on a split: with images, and of two classes unless it is external."""
    return {
        name: task
        for name, task in TASKS.items()
        if task.external == (split == "external") and len(task.present(rows, [split])) >= (1 if task.external else 2)
    }


def evaluation_set(name: str, rows: Sequence[Row], folder: str | Path, split: str) -> EvaluationSet:
    """Returns the images, labels and prompts of a task in one split.

    Except in `external`, a class without images in this split is no possible answer.

    Args:
        name: Key of `TASKS`.
        rows: The manifest.
        folder: Folder of the manifest.
        split: Name of the split; all its images are for testing.
    """
    task = TASKS[name]
    found, labels = task.rows(rows, [split])
    offered = list(task.classes) if task.external else task.present(rows, [split])
    place = {index: offered.index(own) for index, own in enumerate(task.classes) if own in offered}
    prompts = task.prompts()
    return EvaluationSet(
        name=name,
        images=[str(Path(folder) / row["file"]) for row in found],
        labels=np.array([place[label] for label in labels.tolist()], dtype=np.int64),
        classes=offered,
        prompts={own: prompts[own] for own in offered},
        subjects=[row["subject"] for row in found],
        facts={
            "title": task.title,
            "notes": task.note,
            "split": split,
            "sources": sorted({r["source"] for r in found}),
        },
    )


@dataclass(frozen=True)
class Crossing:
    """A task that is learned on one source and measured on another.

    Attributes:
        title: Name in tables.
        learned: Task whose train rows have the labels.
        measured: Task whose images are measured; its classes correspond to those of `learned`, in order.
        excluded: Sources that are left out of the training.
    """

    title: str
    learned: str
    measured: str
    excluded: Sequence[str] = field(default_factory=tuple)


CROSSINGS: dict[str, Crossing] = {
    "children-to-adults": Crossing(
        "Pneumonia, trained on children, tested on adults", "pneumonia-children", "pneumonia-adults", ("nih-cxr14",)
    ),
    "adults-to-children": Crossing(
        "Pneumonia, trained on adults, tested on children", "pneumonia-adults", "pneumonia-children", ("kermany-cxr",)
    ),
    # hrf-full is in no training split, so the candidate itself has left it out.
    "glaucoma-camera": Crossing("Glaucoma, another camera", "glaucoma", "glaucoma-external"),
}
