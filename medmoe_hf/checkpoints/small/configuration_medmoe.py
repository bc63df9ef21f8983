"""Configuration of MedMoE (arXiv 2506.08356): the vision tower, the text tower and the dual encoder.

String annotations would switch the type validation of these classes off, so this file must not use
``from __future__ import annotations``.
"""

# mypy: allow-subclassing-any
# transformers is untyped.

import math
import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from transformers.utils.versions import require_version

REQUIRED_TRANSFORMERS = "transformers>=5.23"
"""The oldest supported release."""

# Before anything that older releases lack: their own errors would not name the cause.
require_version(REQUIRED_TRANSFORMERS, f'MedMoE is not written for older ones: pip install "{REQUIRED_TRANSFORMERS}"')

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SwinConfig
from transformers.configuration_utils import SubConfigSpec

from .errors_medmoe import ArgumentError
from .modalities_medmoe import MODALITIES, modality_id
from .presets_medmoe import preset_fields

if TYPE_CHECKING:  # what these fields hold once a configuration is constructed
    _SubConfig = Any
    _Modalities = dict[int, str]
else:  # what they may be given as
    _SubConfig = dict | PreTrainedConfig | None
    _Modalities = dict[int, str] | dict[str, str] | list[str] | tuple[str, ...]


def attach_to_package(name: str) -> None:
    """Makes a module an attribute of its package, as an import does.

    transformers only adds the files of a checkpoint to `sys.modules`. dill, with which `datasets` computes the
    fingerprint of a processor, then does not find their classes by name and serialises everything they refer to.

    Args:
        name: The `__name__` of the module.
    """
    package, _, last = name.rpartition(".")
    if package in sys.modules and name in sys.modules:
        setattr(sys.modules[package], last, sys.modules[name])


def _shown(value: Any) -> str:
    """Returns a configuration's value as text for an error message, truncated to 200 characters."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` updated with `changes`; nested dictionaries are merged key by key."""
    out = deepcopy(dict(base))
    for key, value in changes.items():
        # Maps of ids to names are replaced: merging {0: "xray"} into six names would leave the other five.
        if isinstance(value, Mapping) and isinstance(out.get(key), dict) and key not in ("modalities", "id2label"):
            out[key] = _merged(out[key], value)
        else:
            out[key] = value
    return out


def _refuse_unknown(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any], where: str = "") -> None:
    """Rejects unknown keys: transformers keeps them as attributes, but in overrides they can only be typos."""
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    known |= {"num_labels", "attn_implementation", "model_type"}
    for key, value in overrides.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean `{where}{near[0]}`?" if near else ""
            raise ArgumentError(f"`{where}{key}` is not a field of {config_class.__name__}.{hint}")
        if isinstance(value, Mapping) and key in config_class.sub_configs:
            nested = config_class.sub_configs[key]
            if nested is AutoConfig:
                model_type = value.get("model_type", "bert")
                if model_type not in CONFIG_MAPPING:
                    raise ArgumentError(f'`{where}{key}.model_type`: transformers knows no "{model_type}".')
                nested = CONFIG_MAPPING[model_type]
            _refuse_unknown(nested, value, f"{where}{key}.")


# A configuration may be untrusted, and its model is created before anything else of a folder is read. Sizes far beyond
# those of any existing model are errors, or intended to exhaust the memory.
MAX_EXPERTS = 1000
MAX_LAYERS = 1000
MAX_LABELS = 1_000_000
MAX_WIDTH = 65_536
MAX_ROWS = 2**24
MAX_IMAGE_SIDE = 16_384
_LIMITS = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": 16 * MAX_WIDTH,
    "num_attention_heads": MAX_WIDTH,
    "vocab_size": MAX_ROWS,
    "max_position_embeddings": MAX_ROWS,
    "type_vocab_size": MAX_ROWS,
}


def _positive(config: PreTrainedConfig, *names: str, most: float = math.inf) -> None:
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"`{name}` must be greater than 0, got {value}.")
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}.")
        if value > most:
            raise ValueError(f"`{name}` must be at most {most}, got {value}.")


def _refuse_many_labels(config: Any) -> None:
    """Rejects huge label counts early: transformers creates a table of all labels in the constructor."""
    number = config.get("num_labels") if isinstance(config, Mapping) else None
    if isinstance(number, int) and number > MAX_LABELS:
        raise ValueError(f"`num_labels` must be at most {MAX_LABELS}, got {number}.")


@strict
class MedMoESwinConfig(SwinConfig):
    """The Swin Transformer inside the image tower: `transformers.SwinConfig` under its own model type.

    The separate type keeps transformers from writing the weights under the key names of its old Swin. All fields of
    `transformers.SwinConfig` apply.

    Args:
        pyramid: What the experts read: `"stages"`, the output of each stage before patches are merged, or `"merged"`,
            the patch embedding and then the output of each stage after merging, without the last stage (the official
            code). The shapes are the same.

    Example:
        >>> from medmoe_hf.model import MedMoESwinConfig
        >>> MedMoESwinConfig(embed_dim=48, depths=(1, 1), num_heads=(2, 4)).hidden_size
        96
    """

    model_type = "medmoe_swin"
    base_config_key = "swin_config"

    pyramid: Literal["stages", "merged"] = "stages"


@strict
class MedMoEVisionConfig(PreTrainedConfig):
    """The image tower: backbone, pyramid, experts and image router.

    Args:
        backbone: `"swin"`, or `"timm/<name>"` for any hierarchical model that is part of timm (its channels and
            strides are read from timm's feature info; the timm package must be installed wherever the model is
            loaded). Names with which timm fetches a model from elsewhere (`timm/hf-hub:...`) require the environment
            variable MEDMOE_FOREIGN_BACKBONES=1 wherever the model is loaded.
        swin_config: The Swin (`backbone="swin"` only); Swin-T by default.
        out_indices: The feature levels of a timm backbone that make up the pyramid; by default all with a stride of 4
            or more.
        image_size: Side in pixels that the tower is designed for (224 by default). Other sizes from 64 up work too.
        modalities: Names of the modalities in the order of experts, `{0: "xray", ...}` or a sequence. Their number is
            the number of experts K.
        pyramid_norm: Whether a LayerNorm is applied to each level of the pyramid before the experts read it.
        global_features: Source of the global embedding v_g: `"backbone"` (mean of the backbone's last tokens),
            `"expert"` (mean of the selected expert's map) or `"both"` (the two concatenated).
        expert_type: `"convolution"` (three convolutions with BatchNorm per scale, two-dimensional alignment),
            `"token"` (one linear layer per scale, alignment of the flattened tokens, as in the official code),
            `"linear"` (one linear layer per scale, all scales with equal weight: with `shared_expert` the model
            without an expert), or a name that was added with `register_expert`.
        shared_expert: Whether one expert reads the images of all modalities. The routers are the same, trained by the
            auxiliary loss, but what they select is only the predicted modality. For comparisons with one expert per
            modality.
        expert_hidden_size: Width of a convolutional expert's 3x3 convolutions.
        local_size: Width D of the local map V that an expert returns.
        map_size: Side of the local map; None for that of the finest level.
        mixture: `"hard"` (each image is sent to one expert) or `"soft"` (all experts, weighted with the router's
            probabilities: version 1 of the official code).
        scale_attention_size: Hidden width of the MLP that scores each scale at each position.
        scale_attention_native: Whether scales are scored at their own resolution and the scores are aligned (cheaper),
            or the scales are aligned first.
        router_hidden_size: Hidden width of the router's MLP.
        router_norm: Whether a LayerNorm precedes the router's MLP.
        initializer_range: Standard deviation of newly initialised linear layers.

    Example:
        >>> from medmoe_hf.model import MedMoEVisionConfig
        >>> MedMoEVisionConfig(modalities=["xray", "ct"]).num_experts
        2
    """

    model_type = "medmoe_vision_model"
    base_config_key = "vision_config"
    sub_configs_defaults = {"swin_config": SubConfigSpec(MedMoESwinConfig, optional=True)}

    backbone: str = "swin"
    swin_config: _SubConfig = None
    out_indices: list[int] | tuple[int, ...] | None = None
    image_size: int | None = None
    modalities: _Modalities = MODALITIES
    pyramid_norm: bool = False
    global_features: Literal["backbone", "expert", "both"] = "backbone"
    expert_type: str = "convolution"
    shared_expert: bool = False
    expert_hidden_size: int = 144
    local_size: int = 768
    map_size: int | None = None
    mixture: Literal["hard", "soft"] = "hard"
    scale_attention_size: int = 192
    scale_attention_native: bool = False
    router_hidden_size: int = 128
    router_norm: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for given in (kwargs, self.swin_config):
            _refuse_many_labels(given)
        if self.backbone == "swin":
            self.swin_config = {} if self.swin_config is None else self.swin_config
        elif self.backbone.startswith("timm/"):
            self.swin_config = None
        else:
            raise ValueError(f'`backbone` must be "swin" or "timm/<name>", got "{self.backbone}".')
        if isinstance(self.modalities, Mapping):
            try:
                self.modalities = {int(key): name for key, name in self.modalities.items()}
            except ValueError:
                raise ValueError(
                    f'`modalities` must map expert numbers to names, as {{0: "xray", ...}}, got {self.modalities}.'
                ) from None
        else:
            self.modalities = dict(enumerate(self.modalities))
        super().__post_init__(**kwargs)
        if self.swin_config is not None:
            if self.image_size is None:
                side = self.swin_config.image_size
                self.image_size = side if isinstance(side, int) else max(side)
            self.swin_config.image_size = self.image_size
        elif self.image_size is None:
            self.image_size = 224

    @property
    def num_experts(self) -> int:
        """The number of modalities K, each with an expert (one for all with `shared_expert`)."""
        return len(self.modalities)

    @property
    def hidden_size(self) -> int | None:
        """Width of the backbone's last level; None for a timm backbone, whose width is known once it is built."""
        return None if self.swin_config is None else self.swin_config.hidden_size

    def modality_ids(self, modality: Any, batch_size: int) -> list[int]:
        """Converts names, aliases or ids of modalities to expert ids.

        Args:
            modality: One name or id for all images, or a sequence (list, tensor, array) with one per image. Names are
                those of `modalities`, aliases (`"cxr"`) or DICOM codes (`"DX"`); None and -100 mean unknown.
            batch_size: The number of images B.

        Returns:
            B integers in 0..K-1, or -100 where the modality is unknown.

        Raises:
            ValueError: A name or id is not in `modalities`, or the length of the sequence is neither 1 nor B.

        Example:
            >>> from medmoe_hf.model import MedMoEVisionConfig
            >>> MedMoEVisionConfig().modality_ids(["cxr", "MR", None], batch_size=3)
            [0, 2, -100]
        """
        if hasattr(modality, "tolist"):
            modality = modality.tolist()
        # sentence-transformers uses this argument for the kind of input that it encodes.
        kinds = {modality} if isinstance(modality, str) else modality if isinstance(modality, tuple) else ()
        if any(kind == "image" for kind in kinds if isinstance(kind, str)) and "image" not in self.modalities.values():
            modality = None
        if modality is None or isinstance(modality, (str, int)):
            modality = [modality] * batch_size
        if not isinstance(modality, Iterable):
            raise ValueError(f"`modality` must be a name, an id or one of these for each image, got {modality!r}.")
        ids = [modality_id(item, self.modalities) for item in modality]
        if len(ids) == 1:
            ids = ids * batch_size
        if len(ids) != batch_size:
            raise ValueError(f"`modality` has {len(ids)} entries for {batch_size} images; pass one, or one per image.")
        return ids

    def validate_sizes(self) -> None:
        widths = ("expert_hidden_size", "local_size", "scale_attention_size", "router_hidden_size")
        _positive(self, *widths, most=MAX_WIDTH)
        _positive(self, "image_size", most=MAX_IMAGE_SIDE)
        if self.map_size is not None:
            _positive(self, "map_size", most=MAX_IMAGE_SIDE)
        _positive(self, "initializer_range")

    def validate_swin(self) -> None:
        swin = self.swin_config
        if swin is None:
            return
        if not 1 <= len(swin.depths) <= MAX_LAYERS or not 1 <= sum(swin.depths) <= MAX_LAYERS or min(swin.depths) < 0:
            raise ValueError(f"`swin_config.depths` must sum up to 1..{MAX_LAYERS} layers, got {_shown(swin.depths)}.")
        _positive(swin, "embed_dim", most=MAX_WIDTH)
        _positive(swin, "hidden_size", "window_size", "patch_size", most=MAX_WIDTH)
        _positive(swin, "mlp_ratio", most=1000)

    def validate_modalities(self) -> None:
        names = list(self.modalities.values())
        if len(names) > MAX_EXPERTS:
            raise ValueError(f"`modalities` must name at most {MAX_EXPERTS} experts, got {len(names)}.")
        if not names or sorted(self.modalities) != list(range(len(names))):
            raise ValueError(
                f"`modalities` must number at least one expert 0, 1, ... without a gap, got {_shown(self.modalities)}."
            )
        if len({name.lower() for name in names}) != len(names) or not all(name.strip() for name in names):
            raise ValueError(f"`modalities` must have a unique name per expert, got {names}.")

    def validate_shared_expert(self) -> None:
        if self.shared_expert and self.mixture == "soft":
            raise ValueError(
                '`mixture="soft"` mixes several experts, and `shared_expert` is one; use `mixture="hard"`.'
            )

    def validate_out_indices(self) -> None:
        if self.out_indices is not None and self.swin_config is not None:
            raise ValueError("`out_indices` chooses levels of a timm backbone; the Swin uses all of its stages.")


@strict
class MedMoETextConfig(PreTrainedConfig):
    """The text tower: any BERT-like encoder, and how its tokens are pooled to words and a report embedding.

    Args:
        text_config: The encoder's own configuration, resolved by its `model_type` (BERT by default).
        num_summed_layers: Number of last layers that are summed to a token's embedding.
        word_pooling: How the tokens of a word are pooled: `"sum"` or `"mean"`.
        word_rule: What counts as a word: `"words"` (the tokenizer's), or `"official"` (the official code: special
            tokens are words too, and the local loss sees the first 1 + n words, where n is the number of words that do
            not begin with any of `bracket_token_ids`).
        bracket_token_ids: Ids of the tokens that begin with "[" (`word_rule="official"` only).
        report_length: The report embedding is the sum of the words divided by this number (the official code divides
            by the padded length); None for the mean of the words.
        initializer_range: Standard deviation of newly initialised linear layers.

    Example:
        >>> from medmoe_hf.model import MedMoETextConfig
        >>> MedMoETextConfig(text_config={"model_type": "bert", "vocab_size": 28996}).hidden_size
        768
    """

    model_type = "medmoe_text_model"
    sub_configs_defaults = {"text_config": SubConfigSpec(AutoConfig, model_type="bert")}

    text_config: _SubConfig = None
    num_summed_layers: int = 4
    word_pooling: Literal["sum", "mean"] = "sum"
    word_rule: Literal["words", "official"] = "words"
    bracket_token_ids: list[int] | tuple[int, ...] = ()
    report_length: int | None = None
    initializer_range: float = 0.02

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's tokens."""
        size: int = self.text_config.hidden_size
        return size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # The dual encoder's file contains these fields too, so `MedMoETextModel.from_pretrained` on a dual encoder's
        # folder reads its own part and ignores the rest.
        if cls.model_type == "medmoe_text_model" and config_dict.get("model_type") == "medmoe":
            config_dict = {key: config_dict[key] for key in (*_TEXT_FIELDS, "dtype") if key in config_dict}
        # Folders saved by earlier versions still load.
        config_dict = {_RENAMED_FIELDS.get(key, key): value for key, value in config_dict.items()}
        try:
            return super().from_dict(config_dict, **kwargs)
        # transformers' own classes do not check the types of all their values.
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            raise ArgumentError(f"The configuration holds a value of a wrong type: {error}.") from error

    def __post_init__(self, **kwargs: Any) -> None:
        for given in (kwargs, self.text_config):
            _refuse_many_labels(given)
        super().__post_init__(**kwargs)

    def validate_report_length(self) -> None:
        if self.report_length is not None:
            _positive(self, "report_length", most=MAX_ROWS)

    def validate_text_sizes(self) -> None:
        for name, most in _LIMITS.items():
            value = getattr(self.text_config, name, None)
            if isinstance(value, int) and value > most:
                raise ValueError(f"`text_config.{name}` must be at most {most}, got {value}.")
        _positive(self, "initializer_range")

    def validate_summed_layers(self) -> None:
        layers = self.text_config.num_hidden_layers
        if not 1 <= self.num_summed_layers <= layers:
            raise ValueError(
                f"`num_summed_layers` must lie in 1..{layers}, the text encoder's layers, "
                f"got {self.num_summed_layers}."
            )

    def validate_sub_configs(self) -> None:
        # Validators do not recurse by themselves, and assignments to a sub-config are not validated.
        for key in self.sub_configs:
            getattr(self, key).validate()


_TEXT_FIELDS = tuple(MedMoETextConfig.__annotations__)
_RENAMED_FIELDS = {"local_loss_products": "local_loss_matmul_dtype"}
"""Earlier names of fields, as written by version 0.1."""


@strict
class MedMoEConfig(MedMoETextConfig):
    """MedMoE: image tower with one expert per modality, text tower, and how the two are compared.

    Use `MedMoEConfig.from_preset("paper")` for the model of the paper; the defaults here are the same.

    Args:
        text_config: The text encoder, see `MedMoETextConfig`.
        num_summed_layers: See `MedMoETextConfig`.
        word_pooling: See `MedMoETextConfig`.
        word_rule: See `MedMoETextConfig`.
        bracket_token_ids: See `MedMoETextConfig`.
        report_length: See `MedMoETextConfig`.
        initializer_range: See `MedMoETextConfig`.
        vision_config: The image tower, see `MedMoEVisionConfig`.
        router: What selects the expert where there is a report: the `"report"` router or the `"image"` router. Without
            a report it is always the image router; the caller's `modality` overrides both. With `"image"` there is no
            report router; with `"both"` there is one, trained alongside and used by `route`, but the image router
            selects.
        projection_dim: Width D of the shared space; None for no projections (the towers' widths must be equal).
        similarity: The score of `logits_per_image`: `"global"` (v_g and t_g), `"local"` (words and regions) or their
            `"mean"`.
        local_loss: `"gloria"` (Huang et al., ICCV 2021) or `"token"` (the formula of section 4.4).
        local_loss_matmul_dtype: Dtype of the matrix products of `gloria`. `"bfloat16"` is faster on hardware with
            matrix units for it and rounds each factor to three digits; sums and everything else stay float32.
        local_loss_regions: Side to which the local map is pooled where words are compared with regions: in the local
            loss and in `similarity="local"`; 19 in GLoRIA. A region is then the mean over the area that it covers.
            Heatmaps read the whole map. None, or a side that the map does not exceed: every position is a region.
        temp1: Inverse temperature of the attention over regions (`gloria`).
        temp1_regions: The number of regions that `temp1` is meant for (361 = 19x19 in GLoRIA): with M regions it
            becomes temp1 + ln(M / temp1_regions), so that the largest possible weight of a region stays the same. None
            keeps `temp1` constant.
        temp2: Inverse temperature with which the words of a caption are aggregated (`gloria`).
        temp3: Inverse temperature 1/τ of the contrast: the global loss, the local similarities, and both occurrences
            in the formula of `token`.
        learned_scale: Whether the global loss has its own trained inverse temperature (`logit_scale`, initialised to
            1/0.07, at most 100) instead of `temp3`.
        contrast: Whether the two directions of a contrastive loss are added (`"sum"`) or averaged (`"mean"`).
        positives: Which pairs of a batch are positives of each other, in the global loss and in GLoRIA's local one:
            `"none"` (each pair its own), those with an equal `"caption"` or `"label"` (the `positive_groups` that
            `ContrastiveCollator` computes; UniCL, Yang et al., CVPR 2022), or all to the degree of
            `"text_similarity"`, a softmax over the cosines of report embeddings (MedCLIP, Wang et al., EMNLP 2022).
        positives_temperature: Temperature of that softmax; the lower, the more similar texts must be.
        aux_loss_on: Input of the auxiliary cross-entropy: the routers' `"logits"`, or their `"probabilities"` (the
            official code: a second softmax, whose loss never falls below 1.04 for six experts).
        aux_label_smoothing: Fraction of the auxiliary target that is spread over all modalities.
        global_loss_weight: Weight of the global loss in the total loss (section 4.6).
        local_loss_weight: Weight of the local loss.
        aux_loss_weight: Weight λ of the auxiliary loss.
        classifier_features: Input of the head of `MedMoEForImageClassification`: `"backbone"`, `"expert"` (mean of the
            selected expert's map) or `"both"`.
        freeze_vision_model: Whether `MedMoEForImageClassification` freezes its image tower, including its BatchNorm
            statistics.

    Example:
        >>> from medmoe_hf.model import MedMoEConfig
        >>> MedMoEConfig(projection_dim=256).vision_config.num_experts
        6
    """

    model_type = "medmoe"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(AutoConfig, model_type="bert"),
        "vision_config": MedMoEVisionConfig,
    }

    vision_config: _SubConfig = None
    router: Literal["report", "image", "both"] = "report"
    projection_dim: int | None = None
    similarity: Literal["global", "local", "mean"] = "global"
    local_loss: Literal["gloria", "token"] = "gloria"
    local_loss_matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    local_loss_regions: int | None = None
    temp1: float | int = 4.0
    temp1_regions: int | None = None
    temp2: float | int = 5.0
    temp3: float | int = 10.0
    learned_scale: bool = False
    contrast: Literal["sum", "mean"] = "sum"
    positives: Literal["none", "caption", "label", "text_similarity"] = "none"
    positives_temperature: float | int = 0.1
    aux_loss_on: Literal["logits", "probabilities"] = "logits"
    aux_label_smoothing: float | int = 0.0
    global_loss_weight: float | int = 1.0
    local_loss_weight: float | int = 1.0
    aux_loss_weight: float | int = 4.0
    classifier_features: Literal["backbone", "expert", "both"] = "backbone"
    freeze_vision_model: bool = False

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MedMoEConfig":
        """Creates the configuration of a preset.

        Args:
            name: One of `PRESETS`: `"paper"` (the model of arXiv 2506.08356), `"plus"` (recommended for new training),
                `"official"` (what the authors' code computes, version 3; `OFFICIAL_VERSIONS` lists the differences of
                the others), `"small"` (a `plus` of a few million parameters on an EfficientNet-Lite0 and a MiniLM) or
                `"tiny"` (a small `paper`, for demonstrations and tests).
            **overrides: Fields to change; nested dictionaries change single fields of a sub-config.

        Returns:
            The configuration.

        Raises:
            ValueError: The name or a field is unknown; the message lists or suggests known ones.

        Example:
            >>> from medmoe_hf.model import MedMoEConfig
            >>> config = MedMoEConfig.from_preset("paper", vision_config={"modalities": ["xray", "ct"]})
            >>> config.modalities
            {0: 'xray', 1: 'ct'}
        """
        fields_of_preset = preset_fields(name)
        _refuse_unknown(cls, overrides)
        return cls(**_merged(fields_of_preset, overrides))

    @property
    def modalities(self) -> dict[int, str]:
        """The modality of each expert: `{0: "xray", ...}`."""
        modalities: dict[int, str] = self.vision_config.modalities
        return modalities

    def text_model_config(self) -> MedMoETextConfig:
        """Returns the text tower's configuration, which shares the encoder's configuration object with this one."""
        return MedMoETextConfig(
            **{name: getattr(self, name) for name in _TEXT_FIELDS},
            dtype=self.dtype,
            attn_implementation=self._attn_implementation,
        )

    def validate_projection(self) -> None:
        if self.projection_dim is not None:
            _positive(self, "projection_dim", most=MAX_WIDTH)
            return
        if self.vision_config.global_features == "both":
            raise ValueError(
                '`vision_config.global_features="both"` needs `projection_dim`, to project the two to one space.'
            )
        vision, text = self.vision_config, self.text_config
        widths = {"text_config.hidden_size": text.hidden_size, "vision_config.local_size": vision.local_size}
        # The width of a timm backbone is known once it is built; the model checks it there.
        if vision.global_features == "backbone" and vision.hidden_size is not None:
            widths["the backbone's last width"] = vision.hidden_size
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{key}={value}" for key, value in widths.items())
            raise ValueError(f"Without `projection_dim` the widths must agree, got {listed}. Set `projection_dim`.")

    def validate_temperatures(self) -> None:
        _positive(self, "temp1", "temp2", "temp3", "positives_temperature")
        if self.temp1_regions is not None:
            _positive(self, "temp1_regions", most=MAX_IMAGE_SIDE**2)

    def validate_local_loss_regions(self) -> None:
        if self.local_loss_regions is not None:
            _positive(self, "local_loss_regions", most=MAX_IMAGE_SIDE)

    def validate_routing(self) -> None:
        if self.vision_config.mixture == "soft" and self.router == "report":
            raise ValueError(
                '`vision_config.mixture="soft"` mixes by the image router\'s probabilities; set `router="image"`.'
            )

    def validate_label_smoothing(self) -> None:
        if not 0 <= self.aux_label_smoothing < 1:
            raise ValueError(f"`aux_label_smoothing` must lie in 0..1, got {self.aux_label_smoothing}.")

    def validate_loss_weights(self) -> None:
        for name in ("global_loss_weight", "local_loss_weight", "aux_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be finite and not negative, got {getattr(self, name)}.")


MedMoEConfig.register_for_auto_class()
MedMoETextConfig.register_for_auto_class()
MedMoEVisionConfig.register_for_auto_class()
attach_to_package(__name__)
