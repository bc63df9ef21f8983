"""What a step does beside its gradients: its rate, steps left out, what is computed twice; and what is measured."""

from itertools import pairwise

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from test_loop import config
from test_resume import measuring

from medmoe_hf import MedMoEModel, MedMoEProcessor
from medmoe_hf.data import phantom_sample
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.training import checkpoints, train
from medmoe_hf.training.loop import TrainingRun

PHANTOMS = {"kind": "phantom", "image_size": 64}
BASE = 1e-3


def rates_of(run):
    """The rate that each optimiser step is done with."""
    seen = []
    run.optimizer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    run.train()
    return seen


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        # the best at the first evaluation after the warm-up: each later one halves the rate
        ((5.0, 5.0, 5.0, 5.0, 1.0, 2.0, 3.0), [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1 / 2, 1 / 4]),
        # worse and worse during the warm-up, which says nothing; the fifth is the first that counts
        ((1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 8.5), [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1 / 2]),
    ],
)
def test_plateau_warms_up_and_then_follows_the_held_out_loss(tmp_path, monkeypatch, held_out, expected):
    """Four steps of warm-up, an evaluation after every step, no patience."""
    measuring(monkeypatch, *held_out, held_out[-1])
    run = TrainingRun(
        config(
            tmp_path / "out",
            schedule="plateau",
            plateau_patience=0,
            plateau_factor=0.5,
            warmup_steps=4,
            evaluate_every=1,
            max_steps=8,
            learning_rate=BASE,
            checkpoints={"keep_best": False},
        )
    )
    assert rates_of(run) == pytest.approx([factor * BASE for factor in expected])


def test_a_skipped_step_of_fp16_does_not_move_the_schedule(tmp_path):
    """A gradient that overflows: the scaler leaves the step out, and the rate, on its way up, waits.

    fp16 needs a GPU, its scaler does not.
    """
    run = TrainingRun(config(tmp_path / "out", warmup_steps=10, learning_rate=BASE))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    run.accelerator.scaler = scaler
    run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, device_placement=False, scaler=scaler)
    real, rates = run._backward, []

    def backward(batches):
        losses, counts = real(batches)
        if run.record.steps == 1:
            next(iter(run.inner.parameters())).grad.fill_(float("inf"))
        return losses, counts

    run._backward = backward
    batches, before = run.batches(), []
    for _ in range(4):
        before.append([parameter.detach().clone() for parameter in run.inner.parameters()])
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step(batches)
    same = [all(map(torch.equal, *pair)) for pair in pairwise(before)]
    assert same == [True, True, False]  # the first rate of a warm-up is 0, the second step overflows
    assert rates == pytest.approx([0.0, BASE / 10, BASE / 10, 2 * BASE / 10])
    assert scaler.get_scale() == 2.0**3


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_computes_both_towers_twice(tmp_path, on):
    run = TrainingRun(config(tmp_path / "out", gradient_checkpointing=on))
    calls = {"vision_model": 0, "text_model": 0}
    for name, module in run.inner.named_modules():
        tower = name.split(".")[0]
        if name.endswith(("encoder.layers.0.blocks.0.mlp", "encoder.layer.0.intermediate")):
            module.register_forward_hook(lambda *_, tower=tower: calls.__setitem__(tower, calls[tower] + 1))
    run.step(run.batches())
    assert calls == dict.fromkeys(calls, 2 if on else 1)


@pytest.mark.parametrize("ema", [None, 0.6])
def test_what_is_measured_is_what_is_saved_in_batches_of_the_training_size(tmp_path, ema):
    """12 held-out pairs, six at a time: the saved weights, the moving average where there is one, give that loss."""
    run = TrainingRun(config(tmp_path / "out", ema_decay=ema, learning_rate=1e-2, warmup_steps=0))
    run.train()
    measured = run.record.evaluations[-1]
    model = MedMoEModel.from_pretrained(tmp_path / "out").eval()
    collator = ContrastiveCollator(MedMoEProcessor.from_pretrained(tmp_path / "out"))
    held_out = [phantom_sample(1, index, image_size=64) for index in range(12)]

    def loss_of(model, size):
        with torch.no_grad():
            batches = [collator(held_out[first : first + size]) for first in range(0, 12, size)]
            return sum(model.eval()(**batch).loss.item() for batch in batches) / len(batches)

    assert measured["loss"] == pytest.approx(loss_of(model, 6), rel=1e-5)
    assert measured["loss"] != pytest.approx(loss_of(model, 2), rel=1e-2)
    if ema is not None:
        assert measured["loss"] != pytest.approx(loss_of(run.inner, 6), rel=1e-2)


@pytest.mark.parametrize("left_over", [1, 3])
def test_pairs_left_over_do_not_change_the_held_out_loss(tmp_path, caplog, capsys, left_over):
    """Twelve pairs and thirteen, six at a time: one loss; a lone pair's would be 0."""
    evaluated = [
        train(config(tmp_path / f"{pairs}", max_steps=1, evaluation_samples=pairs)).evaluations[0]
        for pairs in (12, 12 + left_over)
    ]
    assert evaluated[1]["loss"] == evaluated[0]["loss"]
    assert [one["pairs"] for one in evaluated] == [12, 12 + left_over]
    assert [one["loss_pairs"] for one in evaluated] == [12, 12]
    said = caplog.text
    assert f"held-out data: {12 + left_over} pairs, of which the loss leaves out {left_over}" in said
    assert "(12 pairs, 6 at a time), routing_image 0" in capsys.readouterr().out


def test_a_held_out_part_that_is_too_small_is_said(tmp_path, caplog):
    train(config(tmp_path / "out", max_steps=1, evaluation_samples=4))
    said = caplog.text
    assert "held-out data: 4 pairs, fewer than `batch_size` 6" in said
    assert "held-out data: 4 pairs are too few for R@5 and R@10, which would always be 1" in said


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / checkpoints.step_name(step)).mkdir()

    def left():
        return [path.name for path in checkpoints.find_checkpoints(tmp_path)]

    checkpoints.rotate(tmp_path, keep_last=2, best=4, step=8)
    assert left() == ["step-00000004", "step-00000006", "step-00000008", "step-00000010"]
    checkpoints.rotate(tmp_path, keep_last=2, best=10, step=10)
    assert left() == ["step-00000008", "step-00000010"]
    checkpoints.rotate(tmp_path, keep_last=1, best=None, step=10)
    assert left() == ["step-00000010"]


def test_other_bars_do_not_come_into_ours(tmp_path, capfd):
    """transformers shows bars of its own where it writes weights; afterwards they are on again, as they were."""
    import transformers

    transformers.utils.logging.enable_progress_bar()
    run = TrainingRun(config(tmp_path / "out", max_steps=2, evaluate_every=1))
    capfd.readouterr()
    run.train()
    shown = capfd.readouterr().err
    assert "Writing model shards" not in shown
    assert "evaluating at step 1" in shown
    assert transformers.utils.logging.is_progress_bar_enabled()
