"""The training loop on a few steps of a very small model."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import SMALL

from medmoe_hf import MedMoEModel, MedMoEProcessor
from medmoe_hf.data import phantom_sample
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.errors import StreamError, TrainingError
from medmoe_hf.training import TrainConfig, build_model, train
from medmoe_hf.training.config import ModelSection
from medmoe_hf.training.held_out import to_device
from medmoe_hf.training.loop import TrainingRun
from medmoe_hf.training.optimizer import parameter_groups


def config(output_dir, **changes):
    content = {
        "output_dir": str(output_dir),
        "model": {"preset": "tiny", "overrides": SMALL},
        "data": {
            "train": {"kind": "phantom", "image_size": 64},
            "evaluation": {"kind": "phantom", "seed": 1, "image_size": 64},
            "num_workers": 0,
        },
        "max_steps": 3,
        "batch_size": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "evaluation_samples": 12,
        "log_every": 1,
        "trackers": [],
    }
    return TrainConfig.from_dict(content | changes)


def test_batches_reach_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: calls.append("pinned") or value)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda value, device, non_blocking: calls.append((device.type, non_blocking)) or value
    )
    for device in ("cuda", "cpu"):
        to_device({"pixel_values": torch.zeros(2), "modality": [0]}, SimpleNamespace(device=torch.device(device)))
    assert calls == ["pinned", ("cuda", True), ("cpu", True)]


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(tmp_path, monkeypatch):
    """Through a backend that needs no C compiler; every compiled module is one graph."""
    compiled = []

    def compile_module(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    plain, graphs = (train(config(tmp_path / str(way), compile_towers=way)).log for way in (False, True))
    assert len(compiled) == 2 + 6
    assert [entry["loss"] for entry in graphs] == pytest.approx([entry["loss"] for entry in plain], rel=1e-4)


def test_a_run_equals_plain_steps_on_the_same_samples(tmp_path):
    """Against a loop written out here: same seed, samples 0, 1, 2, ... of the stream, AdamW, cosine with warm-up."""
    run = config(tmp_path / "out")
    record = train(run)

    torch.manual_seed(0)
    model, processor = build_model(run.model)
    collator = ContrastiveCollator(processor)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, betas=(0.9, 0.98))
    model.train()
    for step, factor in enumerate((0.0, 1.0, 0.5)):  # the schedule: warm-up from 0 in 1 step, then half a cosine
        for group in optimizer.param_groups:
            group["lr"] = factor * 1e-3
        batch = collator([phantom_sample(0, 6 * step + index, image_size=64) for index in range(6)])
        output = model(**batch)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert record.log[step]["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
        assert record.log[step]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()

    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    for name, value in model.state_dict().items():
        # A softmax does not see a common shift: the gradient of these is rounding noise, which Adam makes steps of.
        if not name.endswith(("scale_attention.fc2.bias", "key.bias", "k_proj.bias")):
            torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_folder_is_whole_and_loads(tmp_path):
    record = train(config(tmp_path / "out", evaluate_every=2))
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["steps"] == record.steps == 3
    assert written["samples"] == 18
    assert [entry["step"] for entry in written["evaluations"]] == [2, 3]
    assert {"routing_image", "routing_report", "image_to_text_r1"} <= set(written["evaluations"][0])
    # nothing half written is left; the evaluation at step 2 was the best so far
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/check*/*")) == [
        "out-run/checkpoints/step-00000002"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-run"]
    MedMoEModel.from_pretrained(tmp_path / "out")
    assert MedMoEProcessor.from_pretrained(tmp_path / "out").image_processor.size["height"] == 64


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        train(config(tmp_path / "out"))


def test_epoch_follows_epoch_and_workers_change_nothing(tmp_path):
    """24 samples, 6 steps of 6: the last two steps see the first half again."""
    source = {"kind": "phantom", "image_size": 64, "length": 24}
    records = [
        train(config(tmp_path / f"{workers}", data={"train": source, "num_workers": workers}, max_steps=6))
        for workers in (0, 2)
    ]
    assert [record.samples for record in records] == [36, 36]
    losses = [[entry["loss"] for entry in record.log] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    endless = train(
        config(tmp_path / "endless", data={"train": {**source, "length": None}, "num_workers": 0}, max_steps=6)
    )
    seen = [entry["loss"] for entry in endless.log]
    assert seen[:4] == pytest.approx(losses[0][:4], rel=1e-4)
    assert seen[4] != pytest.approx(losses[0][4], rel=1e-3)


def bad_table(folder, good, bad):
    rows = ["path,report"]
    for index in range(good):
        phantom_sample(0, index, image_size=64)["image"].save(folder / f"{index}.png")
        rows.append(f"{index}.png,report {index}")
    rows[2:2] = [f"none{index}.png,x" for index in range(bad)]
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return {"kind": "csv", "files": [str(folder / "t.csv")], "image": "path", "name": "mine"}


def test_bad_samples_are_skipped_counted_and_reported(tmp_path, caplog):
    source = bad_table(tmp_path, good=24, bad=1)
    record = train(config(tmp_path / "out", data={"train": source, "num_workers": 0}, max_steps=4))
    assert record.samples == 24
    assert record.skipped == {"mine: missing image": 1}
    assert json.loads((tmp_path / "out" / "training.json").read_text())["skipped"] == record.skipped
    assert re.search(r"training data: 24 samples, 1 skipped\n  mine: 1 missing image \(.*none0.png\)", caplog.text)


def test_too_many_bad_samples_stop_the_run_with_a_checkpoint(tmp_path):
    source = bad_table(tmp_path, good=24, bad=6)
    run = config(tmp_path / "out", data={"train": source, "num_workers": 0}, max_steps=8)
    with pytest.raises(
        StreamError, match=r"(?s)^Training data: 6 of 30 samples are faulty.*after 4 steps is saved in .*step-00000004"
    ):
        train(run)
    assert not (tmp_path / "out").exists()
    MedMoEModel.from_pretrained(tmp_path / "out-run" / "checkpoints" / "step-00000004")


def test_a_share_of_the_data_can_be_held_out(tmp_path):
    source = bad_table(tmp_path, good=40, bad=0)
    data = {"train": source, "validation_share": 0.3, "num_workers": 0}
    record = train(config(tmp_path / "out", data=data, max_steps=3, evaluation_samples=100))
    assert record.evaluations[0]["step"] == 3
    assert record.evaluations[0]["loss"] > 0


def test_frozen_parameters_stay_and_unknown_prefixes_are_refused(tmp_path):
    run = config(tmp_path / "out", freeze=["text_model"])
    train(run)
    torch.manual_seed(0)
    fresh, _ = build_model(run.model)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, value in fresh.state_dict().items() if not torch.equal(saved[name], value)}
    assert changed
    assert not any(name.startswith("text_model.") for name in changed)
    with pytest.raises(ValueError, match=r'no parameter begins with "text_tower".*text_model'):
        train(config(tmp_path / "other", freeze=["text_tower"]))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run = config(tmp_path / "out", learning_rate=1e30, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"The loss is .* lower `learning_rate`"):
        train(run)
    assert not (tmp_path / "out").exists()


def test_weight_decay_leaves_vectors_alone():
    model, _ = build_model(ModelSection(preset="tiny", overrides=SMALL))
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    train(config(tmp_path / "first"))
    train(config(tmp_path / "second", model={"from_pretrained": str(tmp_path / "first")}, learning_rate=1e-12))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    weights = [name for name in first if "running_" not in name and "num_batches" not in name]
    for name in weights:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-8)


def test_training_reads_the_tars_that_phantom_writes(tmp_path):
    from medmoe_hf.data import write_webdataset

    write_webdataset(tmp_path / "tars", shards=2, samples_per_shard=12, image_size=64)
    tars = {"train": {"kind": "webdataset", "files": [str(tmp_path / "tars" / "*.tar")]}, "num_workers": 0}
    tars["shuffle_buffer"] = 0
    from_tars = train(config(tmp_path / "a", data=tars))
    drawn = train(config(tmp_path / "b", data={"train": {"kind": "phantom", "image_size": 64}, "num_workers": 0}))
    assert [entry["loss"] for entry in from_tars.log] == pytest.approx(
        [entry["loss"] for entry in drawn.log], rel=1e-5
    )


def test_positives_of_a_run_are_saved_with_the_model_and_used_on_held_out_pairs(tmp_path, capsys):
    """Four captions in turn, 12 pairs: each pair has two other positives, in training and in the held-out loss."""
    words = ["effusion", "mass", "cyst", "fracture"]
    # Full stops: captions of equal tokens would have the same loss without positives.
    captions = [words[index % 4] + "." * (index // 4) for index in range(12)]
    rows = ["path,report", *(f"{index}.png,{caption}" for index, caption in enumerate(captions))]
    for index in range(12):
        phantom_sample(0, index, image_size=64)["image"].save(tmp_path / f"{index}.png")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    source = {"kind": "csv", "files": [str(tmp_path / "t.csv")], "image": "path"}
    data = {"train": source, "evaluation": source, "num_workers": 0, "shuffle_buffer": 0}
    # A rate so low that the model stays as it was initialised.
    changes = {"data": data, "batch_size": 12, "max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-12}
    record = train(config(tmp_path / "out", **changes, positives="caption"))
    assert "(12 pairs, 12 at a time, positives by caption)" in capsys.readouterr().out
    model = MedMoEModel.from_pretrained(tmp_path / "out").eval()
    assert model.config.positives == "caption"

    collator = ContrastiveCollator(MedMoEProcessor.from_pretrained(tmp_path / "out"))
    samples = [
        {"image": Image.open(tmp_path / f"{index}.png"), "caption": caption, "modality": -100}
        for index, caption in enumerate(captions)
    ]
    with torch.no_grad():
        output = model(**collator(samples))
    logits = (model.global_scale * output.image_embeds @ output.text_embeds.t()).double()
    same = torch.arange(12).unsqueeze(1) % 4 == torch.arange(12) % 4
    expected = -(same / 3 * (logits.log_softmax(dim=1) + logits.t().log_softmax(dim=1))).sum() / 12
    assert record.evaluations[-1]["loss_global"] == pytest.approx(expected.item(), rel=1e-4)
    assert record.evaluations[-1]["loss_global"] != pytest.approx(output.loss_global.item(), rel=1e-3)


def labelled_table(folder, header, labels):
    rows = [f"path,report,{header}"]
    for index, label in enumerate(labels):
        phantom_sample(0, index, image_size=64)["image"].save(folder / f"{index}.png")
        rows.append(f"{index}.png,effusion{'.' * index},{label}")
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return {"kind": "csv", "files": [str(folder / "t.csv")], "image": "path"}


@pytest.mark.parametrize(("header", "named"), [("label", {}), ("finding", {"label": "finding"})])
def test_labels_of_the_sources_make_positives(tmp_path, header, named):
    labels = ["effusion", "", "Mass", "effusion", "mass", "n/a"]
    source = labelled_table(tmp_path, header, labels) | named
    run = TrainingRun(config(tmp_path / "out", data={"train": source, "num_workers": 0}, positives="label"))
    run.check_data()
    batch, keys = next(run.batches())
    groups = dict(zip([labels[int(Path(key).stem)] for key in keys], batch["positive_groups"].tolist(), strict=True))
    assert groups["Mass"] == groups["mass"] != groups["effusion"]
    assert groups[""] == groups["n/a"] == -1
    assert len(set(batch["positive_groups"].tolist())) == 3


def test_positives_by_label_need_labels(tmp_path):
    source = labelled_table(tmp_path, "finding", ["effusion"] * 6)
    data = {"train": source, "num_workers": 0}
    with pytest.raises(StreamError, match="no training source has a field `label`"):
        train(config(tmp_path / "out", data=data, positives="label"))
    data = {"train": source | {"label": "finding"}, "evaluation": source, "num_workers": 0}
    with pytest.raises(StreamError, match="no held-out source has a field `label`"):
        train(config(tmp_path / "out", data=data, positives="label"))
