"""What a training YAML may say, and the words for what it may not."""

import pytest

from medmoe_hf.training import ConfigError, TrainConfig

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
        ("kind: phantom", "kind: tars", "data.train: .*'phantom', 'webdataset'"),
        ("preset: tiny", "preset: tiny, from_pretrained: x", "either `preset`"),
        ("max_steps: 4", "max_steps: four", "max_steps: .*integer.*got 'four'"),
        ("output_dir: OUT", "- a", "no valid YAML"),
    ],
)
def test_wrong_files_are_refused_with_the_key_and_the_mend(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, VALID.replace(old, new))
    assert "run.yaml" in str(error.value)


def test_every_problem_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, VALID.replace("max_steps: 4", "max_step: 4\nbatch_size: 1"))
    assert {"max_step:", "max_steps:", "batch_size:"} <= set(str(error.value).split())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*absent\.yaml"):
        TrainConfig.from_yaml(tmp_path / "absent.yaml")
