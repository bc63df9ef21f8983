"""What a training YAML may say, and clear words for what it may not."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medmoe_hf.common.yaml_files import in_words, read_yaml
from medmoe_hf.data.sources import SOURCE_SECTIONS, Source, load_sources
from medmoe_hf.errors import ConfigError, SourceError


class ModelSection(BaseModel):
    """Which model is trained: a new one of a preset, or a checkpoint.

    Attributes:
        preset: `MedMoEConfig.from_preset`'s name, for a new model.
        from_pretrained: folder or Hub id of a checkpoint to go on from.
        tokenizer: of a new model: folder or Hub id of any fast tokenizer; None: the phantom reports' words.
        overrides: fields of `MedMoEConfig` to change.
    """

    model_config = ConfigDict(extra="forbid")

    preset: str | None = None
    from_pretrained: str | None = None
    tokenizer: str | None = None
    overrides: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.preset is None) == (self.from_pretrained is None):
            raise ValueError("give either `preset` (a new model) or `from_pretrained` (a checkpoint)")
        if self.from_pretrained is not None and self.tokenizer is not None:
            raise ValueError("`tokenizer` belongs to a new model; a checkpoint brings its own")
        return self


class DataSection(BaseModel):
    """What is read.

    Attributes:
        train: the source of training pairs, a list of sources that take turns, or the path of a YAML with such a list.
        evaluation: the same for held-out pairs; None: see `validation_share`.
        validation_share: share of the training data, by subject or image, that is held out and evaluated on.
        mixing: how sources take turns: by `weight`, or every `modality` equally often.
        once: whether every sample comes once an epoch, or small sources begin again so that shares stay as they are.
        shuffle_buffer: rows that are shuffled within, in each source; 0 keeps the order of the files.
        max_bad_fraction: over this share of unreadable samples the run stops.
        reduced_decode: whether large JPEGs are decoded at a half, quarter or eighth of their size where that is still
            no smaller than the model's images: faster, and within about one grey level of the whole.
        num_workers: processes that read and decode beside each training process.
    """

    model_config = ConfigDict(extra="forbid")

    train: Source | list[Source]
    evaluation: Source | list[Source] | None = None
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    mixing: Literal["weight", "modality"] = "weight"
    once: bool = True
    shuffle_buffer: int = Field(default=10_000, ge=0)
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    reduced_decode: bool = True
    num_workers: int = Field(default=1, ge=0)

    @field_validator("train", "evaluation", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return load_sources(value)
        except SourceError as error:
            raise ValueError(str(error)) from error


class CheckpointSection(BaseModel):
    """When a run writes down all that it needs to go on exactly, and how many of these are kept.

    A checkpoint is a model folder with a `training_state` in it. It is written too when the run is told to stop
    (SIGTERM, SIGINT) and when the data fail.

    Attributes:
        every_steps: 0 for no such rhythm.
        every_minutes: 0 for no such rhythm; by default a quarter of an hour is the most that can be lost.
        keep_last: how many of the newest are kept.
        keep_best: whether an evaluation with the lowest held-out loss so far writes one that is kept as well.
    """

    model_config = ConfigDict(extra="forbid")

    every_steps: int = Field(default=0, ge=0)
    every_minutes: float = Field(default=15.0, ge=0)
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = True


class LoraSection(BaseModel):
    """Trains an update of low rank for some modules, in the place of all weights.

    Modules are named whole, by the end of their name (`q_proj`, `attention.output.dense`), or by a pattern
    (`vision_model.*.q_proj`).

    Attributes:
        rank: of the updates.
        alpha: updates are multiplied by alpha / rank.
        dropout: share of an update's inputs that is dropped in training.
        targets: linear, convolutional or embedding layers that get an update; None: the projections of the attention
            in both towers (in a tower without attention: its linear layers and 1x1 convolutions).
        train: modules (or single parameters) that are trained and saved whole; None: routers, projections, classifier
            and learned scale, of those that there are.
        merge: whether the output folder holds a whole model, updates added to its weights, and not the adapter alone.
    """

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | None = Field(default=None, min_length=1)
    train: list[str] | None = None
    merge: bool = False


class TrainConfig(BaseModel):
    """A training run.

    A step sees `batch_size` x `gradient_accumulation_steps` x processes pairs.

    Attributes:
        output_dir: where the model lands (a folder that loads with `from_pretrained`), with `training.json`.
            Checkpoints and logs stand beside it in `<output_dir>-run`.
        model, data: see there.
        max_steps: optimiser steps.
        batch_size: pairs that a process has in memory at a time.
        gradient_accumulation_steps: such batches of a process in a step.
        negatives: what a pair is contrasted with: its `micro_batch`, those of all processes at a time (`ranks`), or
            everything in the step (`global`, which caches gradients where they are accumulated); see
            `medmoe_hf.training.negatives` for what each costs.
        positives: which of these mean the same as the pair and are no negatives: those of an equal `caption` or
            `label`, or all in the measure of `text_similarity`; `none`: no other. Replaces `MedMoEConfig.positives`,
            which is described there and saved with the model; None leaves it as it is. Held-out losses use it too.
        learning_rate: at the top of the schedule.
        layer_decay: factor on it from each layer of a tower to the next below; 1 for the same everywhere.
        schedule: `cosine`, `linear`, `constant_with_warmup`, or `plateau`, where the rate falls when the held-out loss
            does not.
        warmup_steps: steps of linear rise before it.
        plateau_factor, plateau_patience: of `plateau`: what the rate is multiplied with after more than so many
            evaluations without a lower loss.
        weight_decay: of AdamW, on matrices and kernels only (not on biases, norms, positions, temperatures).
        betas: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: of an exponential moving average of the weights (it rises to this from 0); that average is then
            evaluated and saved. None for none.
        mixed_precision: Accelerate's: `no`, `bf16` or `fp16`.
        gradient_checkpointing: recompute activations of the towers in the backward pass.
        compile_towers: `torch.compile` the backbone and the text encoder.
        freeze: parameters that stay as they are, by pattern or beginning of their name: `text_model`,
            `*.experts.2.*`. What is frozen as a whole has no dropout and keeps its running statistics.
        lora: train low-rank adapters in both towers instead of the towers; see there.
        evaluate_every: steps between evaluations; 0 evaluates only at the end.
        evaluation_samples: held-out pairs looked at each time.
        checkpoints: see there.
        trackers: where numbers go: `tensorboard` (files in `<output_dir>-run/logs`), `wandb`, `trackio`.
        log_every: steps between records in `training.json` and the trackers.
        seed: of weights, data order and dropout.
    """

    model_config = ConfigDict(extra="forbid")

    output_dir: Path
    model: ModelSection
    data: DataSection
    max_steps: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    negatives: Literal["micro_batch", "ranks", "global"] = "global"
    positives: Literal["none", "caption", "label", "text_similarity"] | None = None
    learning_rate: float = Field(default=5e-5, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant_with_warmup", "plateau"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    plateau_patience: int = Field(default=5, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile_towers: bool = False
    freeze: list[str] = []
    lora: LoraSection | None = None
    evaluate_every: int = Field(default=0, ge=0)
    evaluation_samples: int = Field(default=256, ge=2)
    checkpoints: CheckpointSection = CheckpointSection()
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    log_every: int = Field(default=10, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        contrasted = self.batch_size * (1 if self.negatives != "global" else self.gradient_accumulation_steps)
        if contrasted < 2:
            raise ValueError("a pair needs another one to be contrasted with: raise `batch_size` to 2 or more")
        if self.schedule == "plateau" and not (self.evaluate_every and self.evaluates):
            raise ValueError(
                "`schedule: plateau` follows the held-out loss: give `evaluate_every`, and `data.evaluation` or "
                "`data.validation_share`"
            )
        if self.positives is not None and self.model.overrides.get("positives", self.positives) != self.positives:
            raise ValueError("`positives` and `model.overrides.positives` contradict each other: give one of them")
        if self.lora is not None and self.model.from_pretrained is None:
            raise ValueError("`lora` adapts a trained model: give `model.from_pretrained`")
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out data."""
        return self.data.evaluation is not None or self.data.validation_share > 0

    @property
    def caches_gradients(self) -> bool:
        """Whether negatives reach over accumulated micro-batches, so that a step is more than a sum of their steps."""
        return self.negatives == "global" and self.gradient_accumulation_steps > 1

    @property
    def run_dir(self) -> Path:
        """Where checkpoints and logs are kept."""
        return self.output_dir.with_name(f"{self.output_dir.name}-run")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        """Reads and checks a YAML file.

        Raises:
            ConfigError: for a missing file, broken YAML, unknown keys (the nearest known one is suggested) or wrong
                values; names the file and every key at fault.
        """
        content = read_yaml(path, ConfigError)
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}.")
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str = "the configuration") -> "TrainConfig":
        """Checks a dictionary; errors as in `from_yaml`, `where` says what it came from."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"{where} cannot be used:\n{in_words(error, _SECTIONS)}") from error


_SECTIONS = {
    "": list(TrainConfig.model_fields),
    "model": list(ModelSection.model_fields),
    "data": list(DataSection.model_fields),
    "checkpoints": list(CheckpointSection.model_fields),
    "lora": list(LoraSection.model_fields),
    **SOURCE_SECTIONS,
}
