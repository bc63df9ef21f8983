"""What a training YAML may say, and the words for what it may not."""

from pathlib import Path

import pytest

from medmoe_hf.errors import ConfigError
from medmoe_hf.training import TrainConfig

VALID = """
output_dir: OUT
model: {preset: tiny}
data:
  train: {kind: phantom, seed: 3, image_size: 64}
max_steps: 4
"""


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return TrainConfig.from_yaml(path)


def test_a_valid_file_gives_its_values_and_the_defaults(tmp_path):
    config = read(tmp_path, VALID)
    assert config.data.train.seed == 3
    assert (config.max_steps, config.batch_size, config.schedule, config.mixed_precision) == (4, 32, "cosine", "no")
    assert TrainConfig.from_dict(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps: 4", "max_step: 4", r"max_step: unknown key. Did you mean `max_steps`\?"),
        ("max_steps: 4", "", "max_steps: missing"),
        ("seed: 3", "sead: 3", r"data.train.sead: unknown key. Did you mean `seed`\?"),
        ("image_size: 64", "image_size: 32", r"data.train.image_size: .*48.*got 32"),
        ("kind: phantom", "kind: tars", r"data.train.kind: .*'phantom', 'webdataset'.*\(got 'tars'\)"),
        ("preset: tiny", "preset: tiny, from_pretrained: x", "either `preset`"),
        ("max_steps: 4", "max_steps: four", "max_steps: .*integer.*got 'four'"),
        ("output_dir: OUT", "- a", "no valid YAML"),
    ],
)
def test_wrong_files_are_refused_with_the_key_and_the_mend(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, VALID.replace(old, new))
    assert "run.yaml" in str(error.value)


def test_positives_are_said_once(tmp_path):
    with pytest.raises(ConfigError, match="contradict each other"):
        read(
            tmp_path,
            VALID.replace("preset: tiny", "preset: tiny, overrides: {positives: label}") + "positives: none\n",
        )
    assert read(tmp_path, VALID + "positives: text_similarity\n").positives == "text_similarity"


def test_every_problem_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, VALID.replace("max_steps: 4", "max_step: 4\nbatch_size: 0"))
    assert {"max_step:", "max_steps:", "batch_size:"} <= set(str(error.value).split())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*absent\.yaml"):
        TrainConfig.from_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["paper", "plus", "finetune", "lora"])
def test_example_configurations_are_valid(tmp_path, monkeypatch, name):
    root = Path(__file__).parents[2]
    (tmp_path / "sources.yaml").write_text("- {kind: phantom}\n")
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    run = TrainConfig.from_yaml(root / "examples" / "configurations" / f"{name}.yaml")
    if name == "paper":  # spec/model.md, row 21
        assert (run.learning_rate, run.weight_decay, run.max_grad_norm) == (5e-5, 0.0, 0.25)
        assert (run.batch_size, run.gradient_accumulation_steps, run.schedule) == (32, 10, "plateau")
        assert (run.negatives, run.mixed_precision, run.freeze) == ("micro_batch", "no", ["text_model"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: 1", "set `batch_size` to 2"),
        ("schedule: plateau", "plateau` depends on the held-out loss: set `evaluate_every`"),
        ("lora: {rank: 4}", "`lora` adapts a trained model"),
        ("lora: {rang: 4}", r"lora.rang: unknown key. Did you mean `rank`\?"),
        ("checkpoints: {keep_last: 0}", "checkpoints.keep_last: .*greater than or equal to 1"),
        ("negatives: rank", "negatives: .*'micro_batch', 'ranks' or 'global'"),
        ("trackers: [mlflow]", "trackers.0: .*'tensorboard', 'wandb' or 'trackio'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, VALID + text + "\n")


def test_one_pair_at_a_time_can_be_contrasted_with_the_rest_of_the_step(tmp_path):
    run = read(tmp_path, VALID + "batch_size: 1\ngradient_accumulation_steps: 8\n")
    assert run.negatives == "global"
