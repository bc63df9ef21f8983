"""`transformers.Trainer` trains both models: against loops written out here, resumed, and with its best model back."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from medmoe_hf.data import phantom_sample
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.model import (
    MedMoEForImageClassification,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
)

BATCH, RATE = 4, 1e-3


class Phantoms(Dataset):
    """Samples as a stream gives them: image, caption, modality."""

    def __init__(self, length=16):
        self.samples = [phantom_sample(0, index, image_size=64) for index in range(length)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.fixture(scope="module")
def data():
    return Phantoms()


@pytest.fixture(scope="module")
def collator(data):
    tokenizer = MedMoETokenizer.from_words([sample["caption"] for sample in data], max_length=32)
    return ContrastiveCollator(MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer))


class ClassificationCollator:
    """Images and their modality as the class."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, samples):
        batch = self.collator(samples)
        return {"pixel_values": batch["pixel_values"], "labels": batch["modality_labels"]}


@pytest.fixture(scope="module", params=["dual", "classifier"])
def task(request, small_config, collator):
    """A function that makes the same new model again and again, and its collator."""

    def make():
        torch.manual_seed(0)
        text = {
            "vocab_size": len(collator.processor.tokenizer),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        if request.param == "dual":
            return MedMoEModel(small_config(projection_dim=16, learned_scale=True, text_config=text))
        return MedMoEForImageClassification(small_config(num_labels=6, classifier_features="both", text_config=text))

    return make, collator if request.param == "dual" else ClassificationCollator(collator)


def trainer(task, folder, data, **changes):
    make, collate = task
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "train_sampling_strategy": "sequential",
        **changes,
    }
    return Trainer(
        make(),
        TrainingArguments(**arguments),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=Phantoms(8) if "eval_strategy" in changes else None,
    )


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


def plain_steps(model, batches, accumulation=1):
    """The losses of AdamW steps at a constant rate; clipped to 1.0, as Trainer does by default."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    found = []
    for start in range(0, len(batches), accumulation):
        parts = []
        for batch in batches[start : start + accumulation]:
            loss = model(**batch).loss / accumulation
            loss.backward()
            parts.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum(parts))
    return found


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_those_of_a_plain_loop(task, data, tmp_path, accumulation):
    """Its losses are means over batches: with accumulation Trainer must divide them, and it does."""
    make, collate = task
    run = trainer(task, tmp_path, data, gradient_accumulation_steps=accumulation, max_steps=2)
    run.train()
    batches = [collate(data.samples[BATCH * step : BATCH * (step + 1)]) for step in range(2 * accumulation)]
    model = make()
    assert losses(run.state.log_history) == pytest.approx(plain_steps(model, batches, accumulation), rel=1e-4)
    for name, value in run.model.state_dict().items():
        if "running_" in name:
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(task, data, tmp_path):
    """Names on disk are those of the state dict: Trainer loads them without strictness, and would leave others out."""
    run = trainer(task, tmp_path / "through", data, save_strategy="steps", save_steps=2)
    run.train()
    checkpoint = tmp_path / "through" / "checkpoint-2"
    assert set(weights(checkpoint)) == set(run.model.state_dict())

    again = trainer(task, tmp_path / "again", data, save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again.state.log_history)[-1] == losses(run.state.log_history)[-1]
    resumed = again.model.state_dict()
    for name, value in run.model.state_dict().items():
        assert torch.equal(resumed[name], value), name
    assert json.loads((tmp_path / "again" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


def test_the_best_model_comes_back(task, data, tmp_path):
    """At a rate that ruins the model the first checkpoint is the best, and every tensor of it must return."""
    run = trainer(
        task,
        tmp_path,
        data,
        learning_rate=0.5,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert sorted(evaluated) == [1, 2, 3]
    best = min(evaluated, key=evaluated.get)
    assert run.state.best_metric == evaluated[best]
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = weights(tmp_path / f"checkpoint-{best}")
    own = run.model.state_dict()
    assert set(saved) == set(own)
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    last = weights(tmp_path / "checkpoint-3")
    assert best == 3 or any(not torch.equal(last[name], value) for name, value in saved.items())
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)


def test_what_trainer_saves_loads_as_a_model(task, data, tmp_path):
    run = trainer(task, tmp_path, data, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    again = type(run.model).from_pretrained(tmp_path / "saved")
    for name, value in again.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]["AutoModel"]


class WithoutLabels:
    """A batch as stock CLIP's: nothing but what the processor gives, and `return_loss`."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, samples):
        batch = self.collator(samples)
        del batch["modality_labels"]
        return batch


def test_batches_without_modality_labels_are_evaluated(small_config, collator, data, tmp_path):
    """As stock CLIP's: the loss is computed without arguments, and `load_best_model_at_end` finds it."""

    def make():
        torch.manual_seed(0)
        text = {"vocab_size": len(collator.processor.tokenizer)}
        return MedMoEModel(small_config(projection_dim=16, text_config=text))

    collate = WithoutLabels(collator)
    run = trainer(
        (make, collate),
        tmp_path,
        data,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=BATCH,
        load_best_model_at_end=True,
    )
    run.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert sorted(evaluated) == [1, 2, 3]
    assert run.state.best_metric == min(evaluated.values())
    model = run.model.eval()
    held_out = Phantoms(8).samples
    with torch.no_grad():
        expected = [model(**collate(held_out[start : start + BATCH])).loss.item() for start in (0, BATCH)]
    assert run.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_modality_labels_reach_the_auxiliary_loss(small_config, collator, data, tmp_path):
    """Of batches that have them, in training and in evaluation; `label_names` hands them to `compute_metrics`."""
    torch.manual_seed(0)
    model = MedMoEModel(small_config(projection_dim=16, text_config={"vocab_size": len(collator.processor.tokenizer)}))
    run = trainer((lambda: model, collator), tmp_path, data, eval_strategy="steps", label_names=["modality_labels"])
    model.eval()
    batch = collator(data.samples[:BATCH])
    loss, _, labels = run.prediction_step(model, batch, prediction_loss_only=False)
    assert torch.equal(labels, batch["modality_labels"])
    with torch.no_grad():
        output = model(**batch)
        del batch["modality_labels"]
        without = model(**batch)
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert output.loss_aux > 0
    assert without.loss_aux == 0
    assert output.loss.item() == pytest.approx(
        (without.loss + model.config.aux_loss_weight * output.loss_aux).item(), rel=1e-5
    )
