"""Parts that are trained from a later step on: nothing of them changes before, everything as usual after."""

import re

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small_models import EXACT, SMALL
from test_loop import config
from test_resume import DROPOUT, assert_same, interrupted, run_of, table, weights

from medmoe_hf.data import phantom_sample
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.errors import ConfigError
from medmoe_hf.training import build_model, plan, train
from medmoe_hf.training.config import ModelSection
from medmoe_hf.training.loop import TrainingRun
from medmoe_hf.training.optimizer import train_mode

PART = "vision_model.backbone"
RESNET = {**SMALL, "vision_config": {**SMALL["vision_config"], "backbone": "timm/resnet18"}}
del RESNET["vision_config"]["swin_config"]
CACHED = {"gradient_accumulation_steps": 2, "batch_size": 3}


@pytest.fixture
def any_precision():
    """Accelerate has one precision per process; without this a test could not use another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def steps_of(run):
    """Before each step: the weights, running statistics and optimizer state of the part, and its mode in the step."""
    seen, batches = [], run.batches()
    backbone = run.inner.vision_model.backbone
    while run.record.steps < run.config.max_steps:
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        state = [len(run.optimizer.state.get(parameter, {})) for parameter in backbone.parameters()]
        run.step(batches)
        seen.append((before, state, backbone.training))
    return seen


@pytest.mark.parametrize("changes", [{}, {**CACHED}, {"mixed_precision": "bf16"}], ids=["plain", "cached", "bf16"])
def test_nothing_of_a_part_changes_before_its_step_and_all_of_it_after(tmp_path, any_precision, changes):
    model = {"preset": "tiny", "overrides": RESNET}
    run = TrainingRun(
        config(tmp_path / "out", model=model, max_steps=4, unfreeze_at={PART: 2}, ema_decay=0.5, **changes)
    )
    gradients = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([one.grad is not None for one in run.inner.vision_model.backbone.parameters()])
    )
    seen = steps_of(run)
    assert [mode for _, _, mode in seen] == [False, False, True, True]
    for before, state, _ in seen[1:3]:
        assert all(torch.equal(value, seen[0][0][name]) for name, value in before.items())
        assert not any(state)
    assert [any(each) for each in gradients] == [False, False, True, True]
    # A block's last norm is 0 at first, so the first norm of the block has no gradient in the first trained step.
    same = [name for name, value in seen[3][0].items() if torch.equal(value, seen[0][0][name])]
    assert all(re.fullmatch(r"features\.layer\d\.\d\.bn1\.(weight|bias)", name) for name in same)
    states = [run.optimizer.state[parameter] for parameter in run.inner.vision_model.backbone.parameters()]
    assert {int(state["step"]) for state in states} == {2}
    assert {int(run.optimizer.state[one]["step"]) for one in run.inner.text_model.parameters()} == {4}


def test_it_equals_a_loop_that_freezes_by_itself(tmp_path):
    """An optimizer per part, first used at the part's step, there with two steps of warm-up."""
    run = config(
        tmp_path / "out",
        max_steps=5,
        warmup_steps=0,
        schedule="constant_with_warmup",
        unfreeze_at={"vision_model": 4, PART: 2},  # the last one counts
        freeze=[PART],  # over which it has precedence
        unfreeze_warmup_steps=2,
        learning_rates={PART: 5e-4},
        max_grad_norm=1e9,
    )
    record = train(run)
    torch.manual_seed(0)
    model, processor = build_model(run.model)
    collator = ContrastiveCollator(processor)
    parts = {"rest": [], "vision": [], PART: []}
    for name, parameter in model.named_parameters():
        parts[PART if name.startswith(PART) else "vision" if name.startswith("vision") else "rest"].append(parameter)
    options = {"betas": (0.9, 0.98), "weight_decay": 0.0}
    optimizers = {name: torch.optim.AdamW(part, lr=1e-3, **options) for name, part in parts.items()}
    rates = {"rest": [1e-3] * 5, "vision": [0, 0, 0, 0, 5e-4], PART: [0, 0, 2.5e-4, 5e-4, 5e-4]}
    for name in ("vision", PART):
        for parameter in parts[name]:
            parameter.requires_grad_(False)
    for step in range(5):
        for name, optimizer in optimizers.items():
            if rates[name][step]:
                optimizer.param_groups[0]["lr"] = rates[name][step]
                for parameter in parts[name]:
                    parameter.requires_grad_(True)
        train_mode(model)
        batch = collator([phantom_sample(0, 6 * step + index, image_size=64) for index in range(6)])
        output = model(**batch)
        output.loss.backward()
        assert record.log[step]["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
        for name, optimizer in optimizers.items():
            if rates[name][step]:
                optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("changes", [{}, CACHED], ids=["plain", "cached"])
def test_interrupted_before_at_and_after_its_step_it_comes_to_the_same_weights(tmp_path, changes):
    source = table(tmp_path / "data")
    later = {"max_steps": 6, "unfreeze_at": {"text_model": 2, PART: 4}, "unfreeze_warmup_steps": 2, **changes}
    straight = train(run_of(tmp_path / "straight", source, **later))
    resumed = interrupted(run_of(tmp_path / "stopped", source, **later), [1, 2, 4, 5])
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))
    assert straight.log == resumed.log
    assert DROPOUT["text_config"]["hidden_dropout_prob"]  # else the random numbers would not matter


def test_statistics_stay_while_weights_are_trained_and_micro_batches_equal_one_batch(tmp_path):
    """With its statistics frozen, a convolutional backbone does not depend on how a step is cut."""
    model = {"preset": "tiny", "overrides": {**EXACT, "vision_config": RESNET["vision_config"]}}
    options = {"model": model, "max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-4}
    options |= {"freeze_statistics": [PART]}
    runs = [
        TrainingRun(config(tmp_path / "whole", **options)),
        TrainingRun(config(tmp_path / "parts", **options, **CACHED)),
    ]
    before = {name: value.clone() for name, value in runs[0].inner.state_dict().items()}
    for run in runs:
        run.train()
    assert runs[0].record.log[-1]["gradient_norm"] == pytest.approx(runs[1].record.log[-1]["gradient_norm"], rel=1e-3)
    after = load_file(tmp_path / "whole" / "model.safetensors")
    for name, value in after.items():
        if name.startswith(PART):
            statistic = "running_" in name or "num_batches" in name
            assert torch.equal(value, before[name]) == statistic, name


def test_the_plan_shows_groups_with_their_rates_and_steps(tmp_path):
    text = str(plan(config(tmp_path / "out", unfreeze_at={PART: 2}, learning_rates={PART: 1e-5})))
    assert "vision_model.backbone, decayed, from step 2: " in text
    assert "learning rate 1e-05, weight decay 0.05" in text
    assert "(100.0%)" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unfreeze_at": {PART: 3}}, "would be trained after 3 steps, but `max_steps` is 3"),
        ({"unfreeze_at": {"*": 1}}, "leave nothing to train in the first step"),
        ({"unfreeze_at": {"vision_model.bakbone": 1}}, r"`unfreeze_at`: no parameter .*Nearest: .*vision_model"),
        ({"unfreeze_warmup_steps": 1}, "needs `unfreeze_at`"),
    ],
)
def test_parts_that_cannot_be_trained_later_are_refused(tmp_path, changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        TrainingRun(config(tmp_path / "out", **changes))


def test_the_model_of_the_tests_has_norms_to_freeze():
    model, _ = build_model(ModelSection(preset="tiny", overrides=RESNET))
    assert any("running_mean" in name for name in model.vision_model.backbone.state_dict())
