"""The best evaluation by a named metric, stopping early, and which weights are saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_loop import config
from test_resume import assert_same, interrupted, measuring, run_of, table, weights

from medmoe_hf import MedMoEModel, MedMoEProcessor
from medmoe_hf.data import phantom_sample
from medmoe_hf.errors import ConfigError, TrainingError
from medmoe_hf.evaluation.validation import validate
from medmoe_hf.evaluation.zero_shot import ZeroShotClassifier
from medmoe_hf.inference.encoders import load_encoder
from medmoe_hf.training import held_out, train
from medmoe_hf.training.checkpoints import find_checkpoints
from medmoe_hf.training.loop import TrainingRun
from medmoe_hf.training.stopping import best_step, reason_to_stop


def evaluations(metric, *values):
    return [{"step": 10 * number, metric: value} for number, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("metric", "values", "patience", "min_delta", "expected"),
    [
        ("loss", (3, 2, 2.5, 1.9), 2, 0.0, None),
        ("loss", (3, 2, 2.5, 2.0), 2, 0.0, "loss did not improve in 2 evaluations after 2 at step 20"),
        ("loss", (3, 2, 1.95, 1.92), 2, 0.1, "loss did not improve by more than 0.1 in 2 evaluations after 2 at"),
        ("loss", (3, 2, 1.95, 1.85), 2, 0.1, None),  # slow, but compared with the best and not with the one before
        ("zero_shot", (0.5, 0.6, 0.6, 0.4), 2, 0.0, "zero_shot did not improve in 2 evaluations after 0.6 at step 20"),
        ("zero_shot", (0.5, 0.4, 0.6, 0.5), 2, 0.0, None),
        ("zero_shot", (0.5, float("nan")), 1, 0.0, "after 0.5 at step 10"),
    ],
)
def test_when_to_stop(metric, values, patience, min_delta, expected):
    found = reason_to_stop(evaluations(metric, *values), metric, patience, min_delta)
    assert found is None if expected is None else expected in found


def test_the_best_is_the_first_of_equals():
    assert best_step(evaluations("loss", 3, 2, 2), "loss") == 20
    assert best_step(evaluations("routing_image", 0.1, 0.7, float("nan"), 0.7), "routing_image") == 20
    assert best_step([], "loss") is None


def labelled(folder):
    """Held-out pairs as files, with labels: 24 radiographs of two labels."""
    folder.mkdir()
    lines, kept = ["path,report,modality,label"], []
    for index in range(200):
        sample = phantom_sample(1, index, image_size=64)
        if sample["modality"] in (0, 3) and len(kept) < 24:
            kept.append(sample)
            label = sample["finding"] if sample["finding"] == "normal" else "Finding"
            sample["image"].save(folder / f"{index}.png")
            lines.append(f'{index}.png,"{sample["caption"]}",{("xray", 1, 2, "us")[sample["modality"]]},{label}')
    (folder / "t.csv").write_text("\n".join(lines))
    return {"kind": "csv", "files": [str(folder / "t.csv")], "image": "path", "caption": "report", "name": "clinic"}


def test_zero_shot_on_held_out_pairs_is_that_of_the_saved_model(tmp_path):
    source = labelled(tmp_path / "held out")
    data = {"train": {"kind": "phantom", "image_size": 64}, "evaluation": source, "num_workers": 0}
    prompts = {"normal": ["Normal.", "No finding."]}
    run = config(
        tmp_path / "out",
        data=data,
        evaluation_samples=24,
        evaluate_every=2,
        zero_shot={"templates": ["{modality} with a {label}"], "prompts": prompts, "smallest_class": 1},
        best_metric="zero_shot",
    )
    record = train(run)
    encoder, accuracies = load_encoder(str(tmp_path / "out")), {}
    rows = [line.split(",") for line in (tmp_path / "held out" / "t.csv").read_text().splitlines()[1:]]
    for alias, name in (("xray", "xray"), ("us", "ultrasound")):
        classes = {"Finding": [f"{name} with a Finding"], "normal": prompts["normal"]}
        own = [row for row in rows if row[-2] == alias]
        images = [str(tmp_path / "held out" / row[0]) for row in own]
        predicted = ZeroShotClassifier(encoder, classes).logits(images).argmax(dim=1).tolist()
        recalls = []
        for number, label in enumerate(classes):
            right = [guess == number for guess, row in zip(predicted, own, strict=True) if row[-1] == label]
            recalls.append(sum(right) / len(right))
        accuracies[f"zero_shot:{name}/clinic"] = sum(recalls) / 2
    last = record.evaluations[-1]
    for name, value in accuracies.items():
        assert last[name] == pytest.approx(value)
    assert last["zero_shot"] == pytest.approx(sum(accuracies.values()) / 2)
    assert last["zero_shot_pairs"] == 24


def scores(monkeypatch, name, *values):
    """Evaluations give these values of a metric, one after another."""
    rest = list(values)
    monkeypatch.setattr(held_out, "validate", lambda *arguments: {**validate(*arguments), name: rest.pop(0)})


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_stops_early_and_saves_the_best_by_its_metric(tmp_path, monkeypatch, ema):
    """Routing is best at step 4; the loss goes on falling."""
    values = (0.1, 0.5, 0.4, 0.5)
    changes = {
        "max_steps": 20,
        "evaluate_every": 2,
        "best_metric": "routing_image",
        "early_stopping": {"patience": 2},
        "ema_decay": ema,
        "warmup_steps": 0,
        "checkpoints": {"every_minutes": 0, "keep_last": 1},
    }
    scores(monkeypatch, "routing_image", *values)
    record = train(config(tmp_path / "last", **changes))
    assert (record.steps, record.best_step, record.saved_step) == (8, 4, 8)
    assert record.stopped == "routing_image did not improve in 2 evaluations after 0.5 at step 4"
    scores(monkeypatch, "routing_image", *values)
    record = train(config(tmp_path / "best", final_model="best", **changes))
    assert (record.steps, record.best_step, record.saved_step) == (8, 4, 4)
    written = json.loads((tmp_path / "best" / "training.json").read_text())
    assert (written["stopped"], written["saved_step"]) == (record.stopped, 4)
    assert [path.name for path in find_checkpoints(tmp_path / "best-run" / "checkpoints")] == ["step-00000004"]
    # the same schedule, ended after four steps
    short = TrainingRun(config(tmp_path / "short", **changes))
    batches = short.batches()
    for _ in range(4):
        short.step(batches)
    expected = short.inner.state_dict() if ema is None else short.ema.module.state_dict()
    assert_same(weights(tmp_path / "best"), {name: expected[name] for name in weights(tmp_path / "best")})
    assert not torch.equal(weights(tmp_path / "last")["text_projection.weight"], expected["text_projection.weight"])
    MedMoEModel.from_pretrained(tmp_path / "best")
    MedMoEProcessor.from_pretrained(tmp_path / "best")


def test_an_interrupted_run_stops_at_the_same_step_with_the_same_best(tmp_path, monkeypatch):
    """Also if it is interrupted at the step after whose evaluation it stops."""
    changes = {"max_steps": 14, "evaluate_every": 2, "early_stopping": {"patience": 2}, "final_model": "best"}
    source = table(tmp_path / "data")
    losses = (3.0, 2.0, 2.5, 2.0)
    measuring(monkeypatch, *losses)
    straight = train(run_of(tmp_path / "straight", source, **changes))
    measuring(monkeypatch, *losses)
    resumed = interrupted(run_of(tmp_path / "stopped", source, **changes), [1, 4, 5, 8])
    assert (straight.steps, straight.best_step, straight.saved_step) == (8, 4, 4)
    assert straight.stopped == "loss did not improve in 2 evaluations after 2 at step 4"
    for name in ("steps", "best_step", "saved_step", "stopped", "log", "evaluations"):
        assert getattr(straight, name) == getattr(resumed, name), name
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))


def test_without_its_checkpoint_the_last_weights_are_saved_and_it_is_said(tmp_path, monkeypatch, caplog):
    measuring(monkeypatch, 1.0, 2.0)
    run = TrainingRun(config(tmp_path / "out", max_steps=2, evaluate_every=1, final_model="best"))
    saved = run._save_if_due
    run._save_if_due = lambda best: (
        saved(best) or (find_checkpoints(run.folder)[0] / "model.safetensors").write_text("")
    )
    run.train()
    assert (run.record.best_step, run.record.saved_step) == (1, 2)
    assert "The weights of the last step are saved instead" in caplog.text
    own = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(own, {name: run.inner.state_dict()[name] for name in own})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "routing"}, r"no metric `routing`. Did you mean `routing_image`\?"),
        ({"best_metric": "zero_shot", "evaluate_every": 1}, "set `zero_shot`"),
        ({"early_stopping": {}}, "`early_stopping` depends on evaluations: set `evaluate_every`"),
        (
            {"final_model": "best", "evaluate_every": 1, "checkpoints": {"keep_best": False}},
            "set `checkpoints.keep_best`",
        ),
        ({"zero_shot": {"templates": ["{finding}"]}, "evaluate_every": 1}, "fields {label} and {modality} only"),
        ({"early_stopping": {"patient": 3}}, r"early_stopping.patient: unknown key. Did you mean `patience`\?"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "out", **changes)


def test_a_metric_that_the_data_do_not_give_is_refused_before_the_first_step(tmp_path):
    run = config(tmp_path / "out", evaluate_every=1, zero_shot={}, best_metric="zero_shot:ct/clinic")
    with pytest.raises(TrainingError, match="`zero_shot:ct/clinic` cannot be measured on these 12 pairs; there are"):
        train(run)
    assert not (tmp_path / "out").exists()
