"""What stops a push: each kind of file or text, named, and nothing that belongs to a checkpoint."""

import gzip
import io
import json
import re
import shutil
import tracemalloc

import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from safetensors.torch import save_file

from medmoe_hf.hub import folder_checks
from medmoe_hf.hub.folder_checks import check_folder, published_files
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer

TOKEN = "hf_" + "AbCdEfGhIj" * 4  # in two parts, so that no scanner takes it for one


@pytest.fixture(scope="module")
def saved(small_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked") / "model"
    tokenizer = MedMoETokenizer.from_words(["chest", "mrn", "dob"], max_length=24)
    MedMoEModel(small_config(text_config={"vocab_size": len(tokenizer)})).save_pretrained(folder)
    MedMoEProcessor(MedMoEImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def test_a_saved_model_may_go(folder):
    (folder / "README.md").write_text(
        "# MedMoE\n\n![map](figures/map.png) See https://huggingface.co/data/x, ./data/x and `pip install /path`.\n"
    )
    (folder / "figures").mkdir()
    (folder / "figures" / "map.png").write_bytes(png())
    (folder / "metrics.csv").write_text("task,auc\nzero-shot,0.8\n")
    for junk in (".git/config", "__pycache__/x.pyc", ".cache/huggingface/y"):
        (folder / junk).parent.mkdir(parents=True, exist_ok=True)
        (folder / junk).write_text(TOKEN)
    assert check_folder(folder) == []
    assert not [name for name in published_files(folder) if "git" in name or "cache" in name]
    assert "figures/map.png" in published_files(folder)


PICKLE = b"\x80\x04\x95\x00"
DICOM = bytes(128) + b"DICM" + bytes(300)
NIFTI = bytes(344) + b"n+1\0" + bytes(8)
HOME = "/ho" + "me/someone/data.yaml"
UID = "1.2.826.0.1.3680043.8.498.12345"
FILES = {
    "pytorch_model.bin": (PICKLE, "pickle"),
    "optimizer.pt": (b"PK\x03\x04rest", "archive"),
    "harmless.json": (PICKLE, "pickle"),
    "last.ckpt": (b"text", "not safetensors"),
    "weights.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "explore.ipynb": (b"{}", "notebook"),
    "one.dcm": (b"x", "DICOM"),
    "scan": (DICOM, "DICOM"),
    "scan.txt": (DICOM, "DICOM"),
    "brain.nii": (b"x", "NIfTI"),
    "brain.dat": (NIFTI, "NIfTI"),
    "brain.gz": (gzip.compress(NIFTI), "NIfTI"),
    "more/rows.parquet": (b"PAR1", "data"),
    "rows.txt": (b"PAR1", "data"),
    "features.npy": (b"\x93NUMPY", "data"),
    "rows.jsonl": (b"{}", "data"),
    "shard.tar.gz": (gzip.compress(b"x"), "archive"),
    "ct.png": (png(), "does not show"),
    "map.png": (png(), "does not show"),
    "unknown.dat": (bytes(range(128, 256)), "neither text nor"),
    "events.out.tfevents.1.host": (b"x", "training log"),
    "broken.safetensors": (b"version https://git-lfs", "no complete safetensors"),
    "cases.csv": (b"patient_id,score\n17,0.5\n", "patient"),
    "reports.csv": (b"image_path,impression\n", "column image_path"),
    "cases.tsv": (b"score\tMRN\n", "column MRN"),
    "note.json": (b'{"model": 1,\n "PatientName": "x"}', "line 2: a field that identifies"),
    "note.yaml": (b"accession_number: 7\n", "a field that identifies"),
    "study.md": (f"Study {UID}.".encode(), "UID"),
    "p10000032.txt": (b"x", "identifier"),
    "patient_0012.txt": (b"x", "identifier"),
    "DOE^JANE.txt": (b"x", "identifier"),
    f"{UID}.txt": (b"x", "identifier"),
    "born-1950-02-03.txt": (b"x", "identifier"),
    "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.txt": (b"x", "identifier"),
    "train.yaml": (f"a: 1\nsource: {HOME}\n".encode(), "line 2: an absolute path"),
    "training.json": (json.dumps({"config": {"output_dir": HOME}}).encode(), "absolute path"),
    "extra.py": (f'"""Reads\n{HOME}"""\n'.encode(), "line 2: an absolute path"),
    "card.md": (f"Loaded from file://{HOME}".encode(), "absolute path"),
    "win.md": (b"C:\\Users\\someone\\model", "absolute path"),
    ".env.old": (f"HF={TOKEN}".encode(), "line 1: a token"),
    "run.sh": (f"#!/bin/sh\nexport HF_TOKEN={TOKEN}\n".encode(), "line 2: a token"),
    "key.txt": (b"-----BEGIN RSA PRIVATE " + b"KEY-----\n", "a token"),
    "wandb.yaml": (b"wandb_api_" + b"key: 0123456789abcdef0123\n", "a token"),
    "other.md": (b"sk-" + b"proj-0123456789abcdefABCD", "a token"),
    # Tables of other countries and programs
    "liste.csv": (b"Fall;MRN;Befund\n1;2;3\n", "column MRN"),
    "excel.csv": (b"\xef\xbb\xbfsep=;\r\nVorname;Ort\r\n", "column Vorname"),
    "names.csv": (b"Name,Age,Diagnosis\nx,7,y\n", "column Name"),
    "contacts.txt": (b"full name|phone\n", "column full name"),
    "ages.csv": ("âge;sexe;diagnostic\n".encode(), "column diagnostic"),
    "TABLE": (b"Last Name\tFirst Name\n", "column Last Name"),
    "naissance.csv": ("Prénom;Date de naissance\n".encode(), "column Prénom"),
    "table.md": (b"Seen:\n\n| No | Date of Birth |\n|---|---|\n| 1 | 2 |\n", "column Date of Birth"),
    "persons.md": (b"| Name | Age | Diagnosis |\n|:--|--:|---|\n", "column Name"),
    # Prose, logs, files without an ending
    "seen.md": (b"One of them, **MRN:** 4711829, was read twice.", "line 1: a field"),
    "born.md": (b"a\nb\nDOB: 4.7.1956", "line 3: a field"),
    "named.rst": (b"Patient name: Miller", "a field"),
    "dicom.md": (b"of MILLER^ANNA", "a field"),
    "run.log": (b"step 1\npatient_id=x\n", "line 2: a field"),
    "other.log": (b"step 1\nread MRN 00123\n", "line 2: what looks like a patient's number"),
    "NOTES": (b"d.o.b. 4/7/1956", "date of birth"),
    # Passwords and keys
    ".env": (b"SMTP=a\nDB_PASSWORD=hunter\n", "line 2: a password"),
    ".env.local": (b"A=b\n", "a file for passwords"),
    "sub/.netrc": (b"machine h\n", "a file for passwords"),
    "server.key": (b"x", "a file for passwords"),
    "settings.yaml": (b"password: s3cret\n", "a password"),
    "login.md": (b"Password: `hunter22`", "a password"),
    "login.py": (b"connect(password='hunter')", "a password"),
    "netrc.txt": (b"machine h.example login me password x\n", "a token"),
    "url.txt": (b"https://me:hunter2@h.example/", "a token"),
    "jwt.json": (b'{"a": "eyJhbGciOiJIUzI1NiJ9.' + b'eyJzdWIiOiIxMjM0In0.SflKxwRJSM"}', "a token"),
    "escaped.json": (b'{"a":\n"' + TOKEN.replace("hf", r"\u0068\u0066").encode() + b'"}', "line 2: a token"),
    "html.md": (TOKEN.replace("hf_", "&#104;&#x66;_").encode(), "a token"),
    "slashes.json": (HOME.replace("/", r"\/").encode(), "absolute path"),
    "windows.yaml": (rb"data: D:\scans\a.csv", "absolute path"),
    "windows.json": (rb'{"data": "D:\\scans\\a.csv"}', "absolute path"),
    "drawing.svg": (b"<svg/>", "does not show"),
}


def checked(saved, folder, card, files):
    """The problems of a model with files beside it, all of which are theirs: name of the file -> lines."""
    shutil.copytree(saved, folder)
    (folder / "README.md").write_text(card)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    problems = check_folder(folder)
    found = {name: [line for line in problems if re.match(rf"{re.escape(name)}[:,]", line)] for name in files}
    assert sum(map(len, found.values())) == len(problems)
    return found


@pytest.fixture(scope="module")
def found(saved, tmp_path_factory):
    files = {name: content for name, (content, _) in FILES.items()}
    return checked(saved, tmp_path_factory.mktemp("files") / "model", "![another](figures/map.png)\n", files)


@pytest.mark.parametrize("name", FILES)
def test_each_of_these_stops_a_push(found, name):
    problems, reason = found[name], FILES[name][1]
    assert problems, name
    assert any(reason in problem for problem in problems), problems
    assert not any(TOKEN in problem or "someone" in problem for problem in problems)


INNOCENT = {
    "card.md": (
        "# Card\n\n| name | age | AUC |\n|---|---|---|\n| a | 60-70 | 0.8 |\n\n| Author | E-mail |\n|---|---|\n\n"
        "| data | images | reports |\n|---|---|---|\n\nGEO accession GSE12345. `subject_id`: the column with the "
        "person. On Windows: `C:\\path\\to\\model`, `C:\\`, `C:\\Users\\you\\model`. softmax(QK^T). "
        "Password: see the wiki. Published on 2026-03-01. Children born in 2010. "
        "https://user:password@proxy.example works."
    ),
    "metrics.csv": "sex,name_of_metric,value\nfemale,auc,0.8\n",
    "named.csv": "name;value\nauc;0,8\n",
    "prompts.json": '{"text": "A:\\nB is\\nC", "pad_token": "[PAD]", "password": null}',
    "labels.txt": "findings\nnone\n",
    "tool.py": 'subject_id: str = "x"\nprint("A:\\nfindings\\n")\npassword = os.environ["PASSWORD"]\n',
    "LICENSE": "Apache License\n",
    "figures/2026-03-01_loss.svg": "<svg><text>Loss</text></svg>",
}


def test_none_of_these_stops_a_push(saved, tmp_path):
    files = {name: text.encode() for name, text in INNOCENT.items()} | {"figures/2026-03-01.png": png()}
    card = "![loss](figures/2026-03-01_loss.svg) ![](figures/2026-03-01.png)\n"
    assert checked(saved, tmp_path / "model", card, files) == {name: [] for name in files}


def picture(format, **options):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format, **options)
    return file.getvalue()


def exif(**tags):
    found = Image.Exif()
    for tag, value in tags.items():
        found[getattr(ExifTags.Base, tag)] = value
    return found


def png_texts(**texts):
    found = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        found.add_text(key, value)
    return picture("PNG", pnginfo=found)


def text_behind(content):
    """A PNG with its text behind the pixels, where readers of headers do not come."""
    start = content.index(b"tEXt") - 4
    length = 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, rest = content[start : start + length], content[:start] + content[start + length :]
    end = rest.index(b"IEND") - 4
    return rest[:end] + chunk + rest[end:]


PICTURES = {
    "gps.jpg": (picture("JPEG", exif=exif(GPSInfo={1: "N", 2: (48.0, 0.0, 0.0)})), "contain a location"),
    "gps.png": (picture("PNG", exif=exif(GPSInfo={1: "N", 2: (48.0, 0.0, 0.0)})), "contain a location"),
    "named.jpg": (picture("JPEG", exif=exif(ImageDescription="Miller, Anna")), "contain ImageDescription"),
    "artist.webp": (picture("WEBP", exif=exif(Artist="A")), "contain Artist"),
    "comment.jpg": (picture("JPEG", comment=b"Miller"), "contains texts (comment)"),
    "comment.gif": (picture("GIF", comment=b"Miller"), "contains texts (comment)"),
    "texts.png": (png_texts(Title="Miller", Software="x"), "contains texts (Title)"),
    "behind.png": (text_behind(png_texts(Title="Miller")), "contains texts (Title)"),
    "broken.png": (b"\x89PNG\r\n\x1a\nrubbish", "cannot be read"),
    "script.svg": (b"<svg><script>x()</script></svg>", "line 1: a script"),
    "event.svg": (b'<svg\nonload="x()"/>', "line 1: a script"),
    "remote.svg": (b'<svg><image href="https://elsewhere.example/a.png"/></svg>', "line 1: a script"),
    "named.svg": (b"<svg><text>MRN 4711829</text></svg>", "a patient's number"),
    "plain.png": (png_texts(Software="Matplotlib"), None),
    "plain.jpg": (picture("JPEG", exif=exif(Orientation=6, Software="x"), dpi=(72, 72)), None),
    "plain.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><a href="#b"/></svg>', None),
    "plain.tiff": (picture("TIFF", compression="tiff_lzw"), None),
}


@pytest.fixture(scope="module")
def found_in_pictures(saved, tmp_path_factory):
    files = {name: content for name, (content, _) in PICTURES.items()}
    card = "".join(f"![a picture]({name})\n" for name in files)
    return checked(saved, tmp_path_factory.mktemp("pictures") / "model", card, files)


@pytest.mark.parametrize("name", PICTURES)
def test_what_a_shown_picture_says_besides_its_pixels(found_in_pictures, name):
    problems, reason = found_in_pictures[name], PICTURES[name][1]
    if reason is None:
        assert problems == []
        return
    (problem,) = problems
    assert reason in problem
    assert "Miller" not in problem


def test_links_that_lead_out(folder, tmp_path):
    """Their content would be published, whatever it is."""
    (tmp_path / "notes.txt").write_text("harmless")
    (tmp_path / "more").mkdir()
    (folder / "inside.txt").symlink_to("config.json")
    assert check_folder(folder) == []
    (folder / "out.txt").symlink_to("../notes.txt")
    (folder / "passwd").symlink_to("/etc/passwd")
    (folder / "more").symlink_to("../more")
    (folder / "lost").symlink_to("nowhere")
    problems = check_folder(folder)
    for name in ("more", "out.txt", "passwd"):
        assert any(problem.startswith(f"{name}: a link out of the folder") for problem in problems)
    assert any(problem.startswith("lost: a broken link") for problem in problems)
    # A folder may be reached by a link itself.
    for name in ("more", "out.txt", "passwd", "lost"):
        (folder / name).unlink()
    (tmp_path / "link").symlink_to(folder)
    assert check_folder(tmp_path / "link") == []


def test_large_files_are_not_read_into_memory(folder, monkeypatch):
    monkeypatch.setattr(folder_checks, "_PIECE", 100_000)
    with (folder / "sparse.dat").open("wb") as file:
        file.truncate(20 * 2**30)
    with (folder / "long.txt").open("wb") as file:
        file.write(b"text\n")
        file.seek(8192)
        file.write(b"x")
        file.truncate(20 * 2**30)
    (folder / "many.txt").write_bytes(b"a\n" * 1_500_000 + TOKEN.encode() + b"\n")
    with (folder / "long.txt").open("r+b") as file:
        file.write(b"t" * 8192)
    tracemalloc.start()
    problems = check_folder(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "sparse.dat: neither text nor safetensors" in problems
    assert "long.txt: a text of more than 50 MB, which is not part of a model" in problems
    assert "many.txt, line 1500001: a token or key; revoke it, as there may be other copies" in problems
    assert len(problems) == 3
    assert peak < 2_500_000


@pytest.mark.parametrize("offset", [-60, -30, -1, 0, 1, 4090])
def test_what_lies_across_the_pieces_of_a_text_is_found_once(folder, monkeypatch, offset):
    monkeypatch.setattr(folder_checks, "_PIECE", 10_000)
    start = 30_000 + offset
    # "é" takes two bytes, so that pieces end inside of characters too.
    filler = "é" + "x" * 98 + "\n"
    text = (filler * (start // 100 + 1))[: start - 1] + "\n" + TOKEN + " " + filler * 200
    (folder / "long.txt").write_text(text)
    line = text[:start].count("\n") + 1
    assert check_folder(folder) == [f"long.txt, line {line}: a token or key; revoke it, as there may be other copies"]


def test_metadata_of_weights_is_text_too(folder):
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors", metadata={"from": HOME})
    assert check_folder(folder) == ["model.safetensors, line 1: an absolute path of a machine"]


def test_places_of_this_machine(folder, monkeypatch):
    place = folder.resolve().parent
    (folder / "note.md").write_text(f"made in {place}\n")
    assert check_folder(folder) == ["note.md, line 1: an absolute path of a machine"]
    (folder / "note.md").write_text("made in /opt/unheard/of\n")
    assert check_folder(folder) == []
    monkeypatch.chdir("/usr/share")
    (folder / "note.md").write_text("made in /usr/share, and not in /usr/shared\n")
    assert len(check_folder(folder)) == 1


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("config.json", "config.json: missing"),
        ("processor_config.json", "processor_config.json: missing"),
        ("model.safetensors", "model.safetensors: missing"),
        ("processing_medmoe.py", "config.json: `auto_map` needs processing_medmoe.py"),
    ],
)
def test_what_a_folder_must_have(folder, missing, problem):
    (folder / missing).unlink()
    problems = check_folder(folder)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_one_set_of_weights(folder, saved):
    MedMoEModel.from_pretrained(saved).save_pretrained(folder, max_shard_size="600kB")
    # transformers leaves the single file where it lies, and would load it.
    (stale,) = check_folder(folder)
    assert stale.startswith("model.safetensors: not part of the weights in model.safetensors.index.json")
    (folder / "model.safetensors").unlink()
    assert check_folder(folder) == []
    shards = sorted(path.name for path in folder.glob("model-0*.safetensors"))
    assert len(shards) > 1
    (folder / shards[0]).unlink()
    assert check_folder(folder) == [f"{shards[0]}: missing"]


def test_models_of_others_and_adapters(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoConfig": "modeling_medmoe.X"}}')
    assert check_folder(folder) == ["config.json: `model_type` is not one of MedMoE's"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (problem,) = check_folder(adapter)
    assert "medmoe merge FOLDER OUT" in problem
    assert check_folder(tmp_path / "none") == [f"{tmp_path / 'none'}: there is no such folder"]
    (folder / "training_state").mkdir()
    (folder / "training_state" / "state.json").write_text("{}")
    assert any("output_dir" in problem for problem in check_folder(folder))
