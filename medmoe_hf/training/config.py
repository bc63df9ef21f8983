"""The keys of a training YAML, and clear messages for wrong ones."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medmoe_hf.common.yaml_files import explain, read_yaml, set_values
from medmoe_hf.data.augmentation import Augmentation, standard_augmentation
from medmoe_hf.data.balancing import DEFAULT_POWER, check_balance
from medmoe_hf.data.sources import SOURCE_SECTIONS, Source, load_sources
from medmoe_hf.errors import ConfigError, SourceError
from medmoe_hf.training.stopping import METRICS


class ModelSection(BaseModel):
    """The model to train: a new one or a checkpoint.

    Attributes:
        preset: Name of a preset of `MedMoEConfig.from_preset`, for a new model.
        from_pretrained: Folder or Hub id of a checkpoint to continue from, or `small`, that of the package.
        tokenizer: Folder or Hub id of any fast tokenizer, for a new model; `None` for one with the words of the
            phantom reports.
        overrides: Fields of `MedMoEConfig` to change.

    Example:
        ```python
        from medmoe_hf.training.config import ModelSection

        section = ModelSection(preset="tiny", overrides={"projection_dim": 64})
        ```
    """

    model_config = ConfigDict(extra="forbid")

    preset: str | None = None
    from_pretrained: str | None = None
    tokenizer: str | None = None
    overrides: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_origin(self) -> "ModelSection":
        if (self.preset is None) == (self.from_pretrained is None):
            raise ValueError("set either `preset` (a new model) or `from_pretrained` (a checkpoint)")
        if self.from_pretrained is not None and self.tokenizer is not None:
            raise ValueError("`tokenizer` is for a new model; a checkpoint has its own")
        return self


class DataSection(BaseModel):
    """The training and held-out data.

    Attributes:
        train: Source of training pairs, a list of sources that are mixed, or the path of a YAML with such a list.
        evaluation: The same for held-out pairs; `None` to use `validation_share`.
        validation_share: Share of the training data that is held out for evaluation, in [0, 1). Data are split by
            subject if the source names one, otherwise by image.
        mixing: How sources are mixed: `"weight"` by their weights, `"modality"` with equal frequency per modality.
        balance: Keys by which training pairs are drawn in a balanced way instead: `modality`, `source` (the field
            `source` of a row, or else the name of its source), `label`, or any field. Each key divides the groups of
            the one before it. An epoch has as many draws as there are pairs; `None` draws each pair once.
        balance_power: How far the shares of groups are balanced, in [0, 1]: a group of n pairs gets a share of its
            parent that is proportional to n^(1 - power). 0 leaves the data as they are, 1 makes groups equal. One
            number, or one for each key.
        once: Whether each sample is used once per epoch. Otherwise small sources are repeated, so that the mixture
            stays constant. Does not apply with `balance`.
        shuffle_buffer: Number of rows per source that are shuffled at a time; 0 keeps the order of the files.
        max_bad_fraction: Share of unreadable samples above which the run stops, in [0, 1].
        reduced_decode: Whether large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if that is at least the size
            of the model's images. This is faster and differs by about one grey level.
        augmentation: Random changes to training images, never to held-out ones: `"none"`, `"standard"` (a choice per
            modality, see `medmoe_hf.data.augmentation.STANDARD`), or what differs from it: a modality, or `all`, to
            fields of `medmoe_hf.data.augmentation.Augmentation`, as in `{all: {noise: 0}, fundus: {rotation: 30}}`.
        long_captions: What is read of training captions that are longer than the text tower reads: a random run of
            sentences that fits, another one at each visit (`"sample"`), or the beginning (`"cut"`), as in the paper's
            code. Of held-out captions it is always the beginning.
        num_workers: Number of processes per training process that read and decode data; 0 for none.

    Example:
        ```python
        from medmoe_hf.training.config import DataSection

        section = DataSection(train={"kind": "phantom", "length": 100}, validation_share=0.1)
        ```
    """

    model_config = ConfigDict(extra="forbid")

    train: Source | list[Source]
    evaluation: Source | list[Source] | None = None
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    mixing: Literal["weight", "modality"] = "weight"
    balance: Annotated[list[str], Field(min_length=1)] | None = None
    balance_power: float | dict[str, float] = DEFAULT_POWER
    once: bool = True
    shuffle_buffer: int = Field(default=10_000, ge=0)
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    reduced_decode: bool = True
    augmentation: Literal["none", "standard"] | dict[str, dict[str, Any]] = "none"
    long_captions: Literal["sample", "cut"] = "sample"
    num_workers: int = Field(default=1, ge=0)

    @field_validator("train", "evaluation", mode="before")
    @classmethod
    def _load_file(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return load_sources(value)
        except SourceError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _known_augmentation(self) -> "DataSection":
        self.augmentations()
        return self

    @model_validator(mode="after")
    def _usable_balance(self) -> "DataSection":
        if self.balance is None:
            if isinstance(self.balance_power, dict):
                raise ValueError("`balance_power` requires `balance`")
        else:
            check_balance(self.balance, self.balance_power, self.mixing, shuffle=self.shuffle_buffer > 0)
        return self

    def augmentations(self) -> dict[str, Augmentation] | None:
        """The augmentation of each modality; None for no augmentation."""
        if self.augmentation == "none":
            return None
        return standard_augmentation({} if self.augmentation == "standard" else self.augmentation)


class CheckpointSection(BaseModel):
    """When checkpoints are written, and how many are kept.

    A checkpoint is a model folder that also contains a `training_state`, so that a run can resume exactly. One is also
    written when the run is stopped by a signal (SIGTERM, SIGINT) or by an error.

    Attributes:
        every_steps: Steps between checkpoints; 0 to ignore the number of steps.
        every_minutes: Minutes between checkpoints; 0 to ignore the time. The default loses at most a quarter of an
            hour.
        keep_last: Number of newest checkpoints to keep.
        keep_best: Whether to write and keep a checkpoint when an evaluation is the best so far by `best_metric`.

    Example:
        ```python
        from medmoe_hf.training.config import CheckpointSection

        section = CheckpointSection(every_steps=500, every_minutes=0, keep_last=3)
        ```
    """

    model_config = ConfigDict(extra="forbid")

    every_steps: int = Field(default=0, ge=0)
    every_minutes: float = Field(default=15.0, ge=0)
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = True


class LoraSection(BaseModel):
    """Low-rank adapters that are trained instead of all weights.

    Modules are named by their full name, by the end of it (`q_proj`, `attention.output.dense`), or by a pattern
    (`vision_model.*.q_proj`).

    Attributes:
        rank: Rank of the updates.
        alpha: Updates are multiplied by `alpha / rank`.
        dropout: Dropout probability of the inputs of the updates during training, in [0, 1).
        targets: Linear, convolutional or embedding layers that get an update; `None` for the attention projections of
            both towers (in a tower without attention: its linear layers and 1x1 convolutions).
        train: Modules or single parameters that are trained and saved in full; `None` for routers, projections,
            classifier and learned scale, as far as the model has them.
        merge: Whether to save a complete model, with the updates merged into its weights, instead of an adapter.

    Example:
        ```python
        from medmoe_hf.training.config import LoraSection

        section = LoraSection(rank=4, targets=["q_proj", "v_proj"])
        ```
    """

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | None = Field(default=None, min_length=1)
    train: list[str] | None = None
    merge: bool = False


class EarlyStoppingSection(BaseModel):
    """When a run stops before `max_steps`.

    Attributes:
        metric: Metric of an evaluation, see `best_metric`; `None` for that one.
        patience: Number of evaluations in a row without an improvement after which the run stops.
        min_delta: An improvement is a value that is better than the best before by more than this.

    Example:
        ```python
        from medmoe_hf.training.config import EarlyStoppingSection

        section = EarlyStoppingSection(metric="routing_image", patience=3)
        ```
    """

    model_config = ConfigDict(extra="forbid")

    metric: str | None = None
    patience: int = Field(default=5, ge=1)
    min_delta: float = Field(default=0.0, ge=0)


class ZeroShotSection(BaseModel):
    """Zero-shot classification of held-out images by their `label`, in each evaluation.

    There is a task per modality, or per modality and source, in which two or more labels occur: the images are
    classified by sentences for each label. Labels are compared without regard to case and white space.

    Attributes:
        templates: Sentences for a label, with the fields `{label}` and `{modality}`.
        prompts: Sentences for single labels, instead of the templates; a modality may precede the label
            (`"xray/normal"`).
        by: Whether there is a task per `"modality"` or per `"source"` and modality. Sources are those of the
            configuration.
        smallest_class: Smallest number of images of a label; rarer labels are left out of a task.

    Example:
        ```python
        from medmoe_hf.training.config import ZeroShotSection

        section = ZeroShotSection(templates=["{modality} image: {label}."], prompts={"normal": ["No finding."]})
        ```
    """

    model_config = ConfigDict(extra="forbid")

    templates: list[str] = Field(default=["{label}"], min_length=1)
    prompts: dict[str, list[str]] = {}
    by: Literal["modality", "source"] = "source"
    smallest_class: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _check_sentences(self) -> "ZeroShotSection":
        for template in self.templates:
            try:
                template.format(label="", modality="")
            except (KeyError, IndexError, ValueError, AttributeError):
                raise ValueError(
                    f'the template "{template}" may have the fields {{label}} and {{modality}} only'
                ) from None
        empty = [label for label, sentences in self.prompts.items() if not sentences]
        if empty:
            raise ValueError(f'`prompts`: "{empty[0]}" has no sentence')
        return self


class TrainConfig(BaseModel):
    """Configuration of a training run.

    A step uses `batch_size` x `gradient_accumulation_steps` x processes pairs.

    Attributes:
        output_dir: Folder for the trained model, which loads with `from_pretrained`, and its `training.json`. It must
            not exist. Checkpoints and logs are in `<output_dir>-run`.
        model: The model to train.
        data: Training and held-out data.
        max_steps: Number of optimizer steps.
        batch_size: Pairs per micro-batch: what a process computes at a time.
        gradient_accumulation_steps: Micro-batches per step and process.
        negatives: What a pair is contrasted with: the rest of its `"micro_batch"`, the current micro-batches of all
            processes (`"ranks"`), or all pairs of the step (`"global"`, which caches gradients if they are
            accumulated). `medmoe_hf.training.negatives` lists the costs.
        positives: Which of these pairs are positives too: those with an equal `"caption"` or `"label"`, or all,
            weighted by `"text_similarity"`; `"none"` for no others. Replaces `MedMoEConfig.positives`, where the
            values are described, and is saved with the model; `None` keeps the model's value. Held-out losses use it
            too.
        learning_rate: Highest learning rate of the schedule.
        learning_rates: Learning rates of parts, instead of `learning_rate`: names or patterns as in `freeze` to rates,
            as in `{vision_model.backbone: 1.0e-4, "*.experts.*": 5.0e-4}`. Of several that match a parameter the last
            one counts. `layer_decay` and the schedule apply to them too.
        layer_decay: Factor on the learning rate from each layer of a tower to the next lower one, in (0, 1]; 1 for one
            learning rate for all layers.
        schedule: `"cosine"`, `"linear"`, `"constant_with_warmup"`, or `"plateau"`, which lowers the learning rate when
            the held-out loss does not decrease.
        warmup_steps: Number of steps of linear warm-up.
        plateau_factor: Factor on the learning rate at a plateau, in (0, 1).
        plateau_patience: Number of evaluations without a lower loss after which the learning rate is lowered.
        weight_decay: Weight decay of AdamW, for matrices and kernels only (not for biases, norms, position embeddings
            and temperatures).
        betas: AdamW's betas.
        max_grad_norm: Largest norm of the gradients, to which they are clipped.
        ema_decay: Decay of an exponential moving average of the weights, in (0, 1); it increases to this value from
            0. The average is then evaluated and saved instead of the weights. `None` for no average.
        mixed_precision: Accelerate's mixed precision: `"no"`, `"bf16"` or `"fp16"`.
        gradient_checkpointing: Whether to recompute activations of the towers in the backward pass.
        compile_towers: Whether to `torch.compile` the image backbone and the text encoder, and in a single process
            without gradient caching the experts.
        freeze: Parameters to freeze, by name, by the name of their module, or by pattern: `text_model`,
            `*.experts.2.*`. Frozen modules have no dropout and keep their running statistics.
        unfreeze_at: Parts that are frozen at first: names or patterns as in `freeze` to the number of steps after
            which they are trained, as in `{vision_model.backbone: 200}`. They take precedence over `freeze`; of
            several that match a parameter the last one counts.
        unfreeze_warmup_steps: Number of steps of linear warm-up of each such part, on top of the schedule.
        freeze_statistics: Modules, by name or pattern as in `freeze`, whose BatchNorms keep and use their running
            statistics while their weights are trained: for a pretrained convolutional backbone and small batches.
        lora: Low-rank adapters to train in both towers instead of the towers; `None` to train the towers.
        evaluate_every: Steps between evaluations; 0 evaluates only at the end.
        evaluation_samples: Number of held-out pairs that are evaluated.
        zero_shot: Zero-shot classification of the held-out pairs by their labels; `None` for none.
        best_metric: Metric by which evaluations are compared: `"loss"` or a part of it, `"routing_image"`,
            `"routing_report"`, `"image_to_text_r1"` (`_r5`, `_r10`; `text_to_image_...`), `"zero_shot"` (the mean over
            tasks) or `"zero_shot:NAME"` (one task). Losses are better when lower, all others when higher.
        early_stopping: When to stop before `max_steps`; `None` for never.
        final_model: Whether `output_dir` gets the weights of the `"last"` step, or of the `"best"` evaluation.
        checkpoints: When checkpoints are written, and how many are kept.
        trackers: Where metrics are logged: `"tensorboard"` (files in `<output_dir>-run/logs`), `"wandb"`, `"trackio"`.
        log_every: Steps between entries in `training.json` and the trackers.
        seed: Seed of the initial weights, the order of the data, and dropout.

    Example:
        ```python
        from medmoe_hf.training import TrainConfig

        config = TrainConfig.from_dict(
            {
                "output_dir": "runs/first",
                "model": {"preset": "tiny"},
                "data": {"train": {"kind": "phantom", "image_size": 64}},
                "max_steps": 100,
            }
        )
        ```
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
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = {}
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
    unfreeze_at: dict[str, Annotated[int, Field(ge=1)]] = {}
    unfreeze_warmup_steps: int = Field(default=0, ge=0)
    freeze_statistics: list[str] = []
    lora: LoraSection | None = None
    evaluate_every: int = Field(default=0, ge=0)
    evaluation_samples: int = Field(default=256, ge=2)
    zero_shot: ZeroShotSection | None = None
    best_metric: str = "loss"
    early_stopping: EarlyStoppingSection | None = None
    final_model: Literal["last", "best"] = "last"
    checkpoints: CheckpointSection = CheckpointSection()
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    log_every: int = Field(default=10, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _check_combinations(self) -> "TrainConfig":
        contrasted = self.batch_size * (1 if self.negatives != "global" else self.gradient_accumulation_steps)
        if contrasted < 2:
            raise ValueError("a pair needs another one to be contrasted with: set `batch_size` to 2 or more")
        if self.schedule == "plateau" and not (self.evaluate_every and self.evaluates):
            raise ValueError(
                "`schedule: plateau` depends on the held-out loss: set `evaluate_every`, and `data.evaluation` or "
                "`data.validation_share`"
            )
        if self.positives is not None and self.model.overrides.get("positives", self.positives) != self.positives:
            raise ValueError("`positives` and `model.overrides.positives` contradict each other: set only one of them")
        if self.lora is not None and self.model.from_pretrained is None:
            raise ValueError("`lora` adapts a trained model: set `model.from_pretrained`")
        return self

    @model_validator(mode="after")
    def _check_unfreezing(self) -> "TrainConfig":
        for name, step in self.unfreeze_at.items():
            if step >= self.max_steps:
                raise ValueError(
                    f"`unfreeze_at`: {name} would be trained after {step} steps, but `max_steps` is {self.max_steps}; "
                    "to leave it as it is, use `freeze`"
                )
        if self.unfreeze_at and self.lora is not None:
            raise ValueError("`unfreeze_at` trains weights that `lora` leaves as they are: set only one of them")
        if self.unfreeze_warmup_steps and not self.unfreeze_at:
            raise ValueError("`unfreeze_warmup_steps` needs `unfreeze_at`: there is no part that is trained later")
        if self.unfreeze_warmup_steps and self.schedule == "plateau":
            raise ValueError("`schedule: plateau` has no `unfreeze_warmup_steps`; use another schedule")
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> "TrainConfig":
        keys = {"best_metric": self.best_metric}
        if self.early_stopping is not None and self.early_stopping.metric is not None:
            keys["early_stopping.metric"] = self.early_stopping.metric
        for key, metric in keys.items():
            if METRICS.fullmatch(metric) is None:
                near = get_close_matches(metric, ["loss", "routing_image", "image_to_text_r1", "zero_shot"], 1, 0.5)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                raise ValueError(f"`{key}`: evaluations have no metric `{metric}`.{hint}")
            if metric.startswith("zero_shot") and self.zero_shot is None:
                raise ValueError(
                    f"`{key}: {metric}` needs labels and sentences for them: set `zero_shot`, if only to {{}}"
                )
        chosen = {
            "zero_shot": self.zero_shot is not None,
            "best_metric": self.best_metric != "loss",
            "early_stopping": self.early_stopping is not None,
            "final_model: best": self.final_model == "best",
        }
        needing = next((key for key, value in chosen.items() if value), None)
        if needing is not None and not (self.evaluate_every and self.evaluates):
            raise ValueError(
                f"`{needing}` depends on evaluations: set `evaluate_every`, and `data.evaluation` or "
                "`data.validation_share`"
            )
        if self.final_model == "best" and not self.checkpoints.keep_best:
            raise ValueError("`final_model: best` takes the weights from a checkpoint: set `checkpoints.keep_best`")
        return self

    @property
    def stopping_metric(self) -> str:
        """The metric of `early_stopping`."""
        own = None if self.early_stopping is None else self.early_stopping.metric
        return own or self.best_metric

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out data."""
        return self.data.evaluation is not None or self.data.validation_share > 0

    @property
    def caches_gradients(self) -> bool:
        """Whether negatives come from several accumulated micro-batches, so that gradients are cached."""
        return self.negatives == "global" and self.gradient_accumulation_steps > 1

    @property
    def run_dir(self) -> Path:
        """Folder of checkpoints and logs."""
        return self.output_dir.with_name(f"{self.output_dir.name}-run")

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> "TrainConfig":
        """Reads and validates a YAML file.

        Args:
            path: The file.
            overrides: Values that replace those of the file, as `key=value` with dotted keys:
                `["max_steps=100", "model.preset=tiny"]`. Values are YAML.

        Returns:
            The configuration.

        Raises:
            ConfigError: For a missing file, invalid YAML, unknown keys (the nearest known key is suggested) or invalid
                values; the message names the file and every wrong key.

        Example:
            ```python
            from medmoe_hf.training import TrainConfig

            config = TrainConfig.from_yaml("run.yaml")
            ```
        """
        content = read_yaml(path, ConfigError)
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}.")
        return cls.from_dict(set_values(content, overrides, ConfigError), str(path))

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str = "the configuration") -> "TrainConfig":
        """Validates a dictionary.

        Args:
            content: Keys and values as in a YAML file.
            where: Where the content comes from, for messages.

        Raises:
            ConfigError: For unknown keys or invalid values; the message names all of them.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"{where} cannot be used:\n{explain(error, _SECTIONS)}") from error


_SECTIONS = {
    "": list(TrainConfig.model_fields),
    "model": list(ModelSection.model_fields),
    "data": list(DataSection.model_fields),
    "checkpoints": list(CheckpointSection.model_fields),
    "lora": list(LoraSection.model_fields),
    "zero_shot": list(ZeroShotSection.model_fields),
    "early_stopping": list(EarlyStoppingSection.model_fields),
    **SOURCE_SECTIONS,
}
