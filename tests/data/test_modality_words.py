"""The modality from words: on our sentences, captions of phantoms, and reports of real chest radiographs."""

import importlib.util
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from medmoe_hf.data.modality_words import modality_from_text
from medmoe_hf.data.phantom import phantom_sample
from medmoe_hf.model.modalities_medmoe import MODALITIES

XRAY, CT, MRI, US, HISTO, FUNDUS = MODALITIES

SENTENCES = [
    # the technique is named
    ("Frontal and lateral views of the chest show clear lungs.", XRAY),
    ("Portable CXR: the tube ends above the carina.", XRAY),
    ("PA and lateral views. No effusion.", XRAY),
    ("Lateral radiograph of the left knee with a joint effusion.", XRAY),
    ("A chest film after drain removal.", XRAY),
    ("Screening mammogram with a spiculated mass.", XRAY),
    ("X ray of the hand, fracture of the fifth metacarpal.", XRAY),
    ("ct of the abdomen with a renal stone", CT),
    ("Computed tomography (CT) of the liver in the portal venous phase.", CT),
    ("HRCT with honeycombing at both bases.", CT),
    ("Axial contrast-enhanced CT image showing a splenic laceration.", CT),
    ("CTA of the aorta with a type B dissection.", CT),
    ("MRI of the left knee, torn medial meniscus.", MRI),
    ("Magnetic resonance imaging shows a pituitary adenoma.", MRI),
    ("Axial FLAIR with periventricular lesions.", MRI),
    ("A T1-weighted coronal view of the hippocampus.", MRI),
    ("DWI: acute infarct in the left thalamus.", MRI),
    ("Sagittal MR of the lumbar spine.", MRI),
    ("Transverse sonogram of the thyroid.", US),
    ("Color Doppler of the portal vein.", US),
    ("Abdominal US with gallstones.", US),
    ("Transthoracic echocardiogram with severe MR.", US),
    ("Endoscopic ultrasound of the pancreas with a small cyst.", US),
    ("H&E, x200: a gland with crowded nuclei.", HISTO),
    ("Photomicrograph of a hematoxylin and eosin stained section.", HISTO),
    ("Histology of the gastric antrum.", HISTO),
    ("Fundus photograph of the right eye with drusen.", FUNDUS),
    ("Ultra-widefield retinal image with a tear at the equator.", FUNDUS),
    # only findings specific to a technique
    ("The cardiomediastinal silhouette is normal, the costophrenic angles are sharp.", XRAY),
    ("A lesion of 60 HU in the adrenal gland.", CT),
    ("Hypodense lesion in segment IV.", CT),
    ("A T2 hyperintense nodule in the prostate.", MRI),
    ("No restricted diffusion.", MRI),
    ("Hypoechoic nodule with irregular margins.", US),
    ("No hypoechoic nodule.", US),
    ("Brown staining of the basal cells.", HISTO),
    ("Severe diabetic retinopathy with macular edema and retinal hemorrhages.", FUNDUS),
    ("Cup-to-disc ratio of 0.8.", FUNDUS),
    # a named technique takes precedence
    ("CT of the orbit in a patient with retinal detachment.", CT),
    ("Ultrasound of the eye: the retina is detached.", US),
    ("MRI with an isointense mass, hypodense in part.", MRI),
    # mentions of other studies
    ("Chest radiograph. Compared with the previous CT the nodule has grown.", XRAY),
    ("Correlate with ultrasound. The chest x-ray is otherwise normal.", XRAY),
    ("Radiograph of the hip; further evaluation with MRI is suggested.", XRAY),
    ("This CT, compared to the prior chest radiograph, shows less effusion.", CT),
    ("As in the previous study this CT shows a cyst.", CT),
    ("Opacity in the left base, recommend chest CT or MRI.", None),
    ("A follow-up CT is recommended.", None),
    ("Follow-up MRI shows a smaller cavity.", MRI),
    ("No prior CT is available.", None),
    ("No CT evidence of a metastasis.", CT),
    ("The nodule seen on CT of the chest in May is not visible.", None),
    ("A cyst seen on axial CT image.", CT),
    ("A CT could be useful.", None),
    ("CT may help to characterize the nodule.", None),
    ("CT is more sensitive for small nodules.", None),
    ("Comparison: CT of the abdomen, MRI of the liver.", None),
    ("Comparison: MRI of the brain.\nFindings: head CT with a small bleed.", CT),
    ("The mass on axial CT was confirmed by histopathology.", CT),
    ("An MRI may show the extent of the tear.", None),
    ("X-ray of the abdomen with dilated loops. Brain MRI was requested.", XRAY),
    ("CT-guided biopsy of the lung, post procedure radiograph.", XRAY),
    ("History of retinal detachment. Chest pain.", None),
    ("The prior PET-CT is not at hand.", None),
    # ambiguous
    ("(A) CT and (B) MRI of the same lesion.", None),
    ("OCT of the macula with subretinal fluid.", None),
    ("PET/CT with an avid node.", None),
    ("Fluorescein angiography of the retina.", None),
    ("Electron micrograph of a podocyte.", None),
    ("Gross photograph of the specimen.", None),
    # words that only look like a technique
    ("Fracture of T1 and T2 with retropulsion.", None),
    ("Tumour stage T2 N0 M0.", None),
    ("Tumour stage cT2.", None),
    ("Moderate MR and mild TR.", None),
    ("Dr. Smith told us about a flair for surgery.", None),
    ("He moved to the US in 2010.", None),
    ("Polyp at the gastric fundus.", None),
    ("The actor sat in direct light, see the section on products.", None),
    ("A small pleural effusion on the left.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_sentences(text, expected):
    assert modality_from_text(text) == expected


def test_phantom_captions():
    """All are correct, as were the first 3,000 when the rules were written."""
    samples = [phantom_sample(5, i, image_size=48) for i in range(300)]
    found = [modality_from_text(sample["caption"]) for sample in samples]
    assert found == [MODALITIES[sample["modality"]] for sample in samples]


@pytest.mark.skipif(importlib.util.find_spec("torchxrayvision") is None, reason="its package ships the reports")
def test_reports_of_chest_radiographs():
    """Findings and impression of the 3,955 OpenI reports, many of which recommend a CT or compare with one."""
    package = Path(importlib.util.find_spec("torchxrayvision").origin).parent
    texts = []
    with tarfile.open(package / "data" / "NLMCXR_reports.tgz") as reports:
        for member in reports:
            if member.name.endswith(".xml"):
                parts = ElementTree.parse(reports.extractfile(member)).iter("AbstractText")
                sections = {part.get("Label"): part.text or "" for part in parts}
                texts.append(f"{sections['FINDINGS']}\n{sections['IMPRESSION']}")
    found = [modality_from_text(text) for text in texts]
    answers = [modality for modality in found if modality]
    assert len(texts) == 3955
    # When the rules were written: 1,903 of 1,905 answers correct (0.9990), for 0.4817 of the reports. Most of
    # the rest name no technique. The rules were tuned on these reports, so this is no estimate for others.
    assert answers.count("xray") / len(answers) >= 0.998
    assert len(answers) / len(texts) >= 0.48
