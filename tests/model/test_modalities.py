"""The table of modalities: what people, tables and DICOM headers write, and the id that each of it means."""

import numpy as np
import pytest
import torch

from medmoe_hf.evaluation.recipes import load_recipe
from medmoe_hf.model import MedMoEConfig
from medmoe_hf.model.modalities_medmoe import DICOM_CODES, MODALITIES, MODALITY_ALIASES, modality_id, modality_of_dicom

# PS3.3 C.7.3.1.1.1, its current terms, written down by hand: an image in that term to the expert that should read it.
OF_CODE = {
    "CR": 0, "DX": 0, "MG": 0, "RG": 0, "IO": 0, "PX": 0, "XA": 0, "RF": 0,
    "CT": 1,
    "MR": 2,
    "US": 3, "IVUS": 3,
    "SM": 4, "GM": 4,
    "OP": 5,
}  # fmt: skip
OTHERS = (
    "OT", "PT", "NM", "SEG", "SR", "KO", "PR", "DOC", "REG", "RTIMAGE", "RTDOSE", "RTSTRUCT", "RTPLAN", "ES", "XC",
    "ECG", "EPS", "HD", "OCT", "OPT", "IVOCT", "OAM", "OPM", "OPV", "AR", "KER", "LEN", "SRF", "VA", "BMD", "BI", "DG",
    "LS", "TG", "AU", "HC", "PLAN", "SMR", "STAIN", "FID", "M3D", "ASMT", "CTPROTOCOL", "POS", "XAPROTOCOL",
)  # fmt: skip


def test_the_order_of_the_experts():
    assert MODALITIES == ("xray", "ct", "mri", "ultrasound", "histopathology", "fundus")
    assert list(MedMoEConfig.from_preset("tiny").modalities.values()) == list(MODALITIES)


def test_the_table_holds_these_codes_and_no_others():
    assert {code for codes in DICOM_CODES.values() for code in codes} == OF_CODE.keys()


@pytest.mark.parametrize(("code", "expected"), OF_CODE.items())
def test_every_code_of_dicom(code, expected):
    assert modality_of_dicom(code) == modality_of_dicom(f"{code.lower()} ") == MODALITIES[expected]
    assert modality_id(code) == modality_id(f" {code.lower()}") == modality_id(code.encode()) == expected


@pytest.mark.parametrize("code", OTHERS)
def test_codes_of_other_kinds_belong_to_no_expert(code):
    assert modality_of_dicom(code) is None
    with pytest.raises(ValueError, match=f"Unknown modality '{code}'"):
        modality_id(code)


@pytest.mark.parametrize("code", [None, "", " ", 7])
def test_a_header_without_a_modality(code):
    assert modality_of_dicom(code) is None


def test_no_alias_means_two_things():
    aliases = [alias for name in MODALITIES for alias in (name, *MODALITY_ALIASES[name])]
    assert len(set(aliases)) == len(aliases)


@pytest.mark.parametrize(("given", "expected"), [
    ("2", 2), (b"2", 2), (2.0, 2), ("2.0", 2), (np.float64(2), 2), (torch.tensor(2), 2), (np.int64(2), 2),
    (None, -100), (float("nan"), -100), ("nan", -100), ("", -100), (" ", -100), (-100, -100), ("-100", -100),
    ("X-Ray", 0), ("Fundus photograph", 5), ("retinal", 5), ("cat", 1),
])  # fmt: skip
def test_ids_and_empty_cells_as_tables_hold_them(given, expected):
    assert modality_id(given) == expected


@pytest.mark.parametrize("given", [6, -1, 1.5, "1.5", "6", "1e400", True, "petct", ["ct"], b"\xff"])
def test_what_names_no_modality_is_refused(given):
    with pytest.raises(ValueError, match=r"Unknown modality .*0: xray, 1: ct.*-100 = unknown"):
        modality_id(given)


def test_a_checkpoint_that_names_its_experts_otherwise():
    own = {0: "Chest CXR", 1: "MR", 2: "X-ray", 3: "7"}
    for given, expected in {"chest cxr": 0, "mri": 1, "DX": 2, "xray": 2, "7": 3, 3: 3}.items():
        assert modality_id(given, own) == expected
    with pytest.raises(ValueError, match="Unknown modality 'ct'"):
        modality_id("ct", own)


def test_an_alias_that_fits_two_experts_is_refused():
    own = ["CR", "DX", "CT"]
    assert [modality_id(name, own) for name in own] == [0, 1, 2]
    with pytest.raises(ValueError, match="Unknown modality 'xray'"):
        modality_id("xray", own)


def test_recipes_take_codes(tmp_path):
    file = tmp_path / "own.yaml"
    text = "name: own\ntitle: Own\ntasks: [retrieval]\nlayout: {{kind: phantom}}\nexpected: nothing\n"
    text += "metric: image_to_text_r1\nsource: us\nlicence: none\noverlaps: []\nmodality: {}\n"
    file.write_text(text.format("IVUS"))
    assert load_recipe(str(file)).modality == "ultrasound"
    file.write_text(text.format("OT"))
    with pytest.raises(ValueError, match="`modality` must be xray"):
        load_recipe(str(file))
