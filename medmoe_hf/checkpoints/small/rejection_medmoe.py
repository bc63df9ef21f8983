"""Rejection: recognising images that are unlike those that a model knows.

A model keeps what was fitted in `model.rejector`, and its folder in `rejector.safetensors`: small tensors, and in the
metadata, as JSON, what they were fitted on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .configuration_medmoe import attach_to_package
from .errors_medmoe import ArgumentError
from .saving_medmoe import file_beside_weights

REJECTOR_FILE = "rejector.safetensors"
SCHEMA = 1
_TENSORS = ("center", "spread", "means", "directions", "variances", "rest", "limits", "weights")

# Weights of each tensor that are compared, and by how much they may differ: float16 and bfloat16 round by less than
# 0.4 %, and training changes more of them by more.
_COMPARED = 8
_ROUNDING, _TINY, _FEW = 0.01, 1e-4, 0.01


def rejection_features(feature_maps: Sequence[Tensor]) -> Tensor:
    """Summarises a pyramid for a rejector: the mean and the standard deviation of each channel at each scale.

    Args:
        feature_maps: S maps `(B, C_s, H_s, W_s)`, as `MedMoEVisionModel.encode` returns them.

    Returns:
        `(B, F)` float32, with F twice the number of channels of all scales.

    Example:
        >>> import torch
        >>> from medmoe_hf.model.rejection_medmoe import rejection_features
        >>> rejection_features([torch.rand(2, 8, 4, 4), torch.rand(2, 16, 2, 2)]).shape
        torch.Size([2, 48])
    """
    flat = [feature_map.float().flatten(2) for feature_map in feature_maps]
    means = [one.mean(dim=2) for one in flat]
    return torch.cat([*means, *(one.std(dim=2, correction=0) for one in flat)], dim=1)


@dataclass(frozen=True, eq=False)
class Rejector:
    """A Gaussian of the features of each modality, and the distance from which an image is unlike its modality.

    The distance is Mahalanobis' in the R directions along which the features vary most, with one variance for all
    other directions. An image is compared with the modality that it is routed to, and its score is the distance
    divided by the limit of that modality: above 1 it is rejected.

    Args:
        center: (F,), mean of the features of all images.
        spread: (F,), standard deviations by which features are divided first, above 0.
        means: (K, F), mean of the standardised features of each of the K modalities.
        directions: (F, R), orthonormal.
        variances: (R,), variance along each direction, above 0.
        rest: (), variance along any other direction, above 0.
        limits: (K,), the largest accepted distance for each modality, above 0.
        weights: Sample of the weights of the image tower that it was fitted to, see `sample_weights`.
        facts: `fitted_on` (data, splits, numbers of images and subjects, date), `accept` (share of known images that
            should be accepted) and `measured`.

    Raises:
        ValueError: If shapes or values do not fit together.
    """

    center: Tensor
    spread: Tensor
    means: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor
    limits: Tensor
    weights: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        features, wanted = self.center.numel(), self.limits.numel()
        shapes = {
            "center": (features,),
            "spread": (features,),
            "means": (wanted, features),
            "directions": (features, self.variances.numel()),
            "variances": (self.variances.numel(),),
            "rest": (),
            "limits": (wanted,),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape:
                raise ArgumentError(f"Rejector: `{name}` must have the shape {shape}, got {tuple(value.shape)}.")
            if not value.isfinite().all():
                raise ArgumentError(f"Rejector: `{name}` must be finite.")
        for name in ("spread", "variances", "rest", "limits"):
            if not (getattr(self, name) > 0).all():
                raise ArgumentError(f"Rejector: `{name}` must be above 0.")

    def distances(self, features: Tensor, expert_ids: Tensor) -> Tensor:
        """Computes the distance of images to the modality that they are routed to.

        Args:
            features: `(B, F)` of `rejection_features`.
            expert_ids: `(B,)`, the most probable expert.

        Returns:
            `(B,)`, at least 0, in the precision of the features.

        Raises:
            ValueError: For features of another number, as those of another backbone.
        """
        if features.shape[-1] != self.center.numel():
            raise ArgumentError(
                f"The rejector was fitted to {self.center.numel()} features, and the model has {features.shape[-1]}: "
                "it belongs to another model."
            )
        to = {"device": features.device, "dtype": features.dtype}
        center, spread, means, directions, variances, rest = (
            getattr(self, name).to(**to) for name in ("center", "spread", "means", "directions", "variances", "rest")
        )
        apart = (features - center) / spread - means[expert_ids]
        along = apart @ directions
        outside = (apart.square().sum(dim=1) - along.square().sum(dim=1)).clamp_min(0)
        squares: Tensor = (along.square() / variances).sum(dim=1) + outside / rest
        return squares.sqrt()

    def scores(self, features: Tensor, expert_ids: Tensor) -> Tensor:
        """Divides distances by the limits.

        Args:
            features: `(B, F)` of `rejection_features`.
            expert_ids: `(B,)`, the most probable expert.

        Returns:
            `(B,)`; above 1 an image is unlike those of its modality that the model knows.
        """
        limits = self.limits.to(device=features.device, dtype=features.dtype)
        return self.distances(features, expert_ids) / limits[expert_ids]

    def fits(self, vision_model: nn.Module) -> bool:
        """Returns whether an image tower has the weights that the rejector was fitted to, apart from rounding."""
        found = sample_weights(vision_model)
        if found is None:  # the weights are not here, or of another kind: nothing can be said
            return True
        if found.shape != self.weights.shape:
            return False
        different = (found - self.weights).abs() > _ROUNDING * self.weights.abs() + _TINY
        return bool(different.float().mean() <= _FEW)

    def save(self, path: str | Path) -> None:
        """Writes a `rejector.safetensors`.

        Args:
            path: The file.
        """
        tensors = {name: getattr(self, name).detach().cpu().float().contiguous() for name in _TENSORS}
        # One key: several would be written in any order, and the file would not be reproducible.
        content = json.dumps({"schema": SCHEMA, **self.facts}, sort_keys=True, allow_nan=False)
        save_file(tensors, path, metadata={"rejector": content})
        # safetensors creates files for their owner only.
        Path(path).chmod(0o644)

    @classmethod
    def load(cls, path: str | Path) -> "Rejector":
        """Reads a `rejector.safetensors`.

        Args:
            path: The file.

        Returns:
            The rejector.

        Raises:
            ValueError: For a file that is damaged, no rejector, or of a newer schema.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["rejector"])
                tensors = {name: file.get_tensor(name) for name in _TENSORS if facts.get("schema") == SCHEMA}
        except (SafetensorError, OSError, ValueError, LookupError) as error:
            raise ArgumentError(f"{path} is no rejector, or damaged: {error}.") from error
        if facts.pop("schema", None) != SCHEMA:
            raise ArgumentError(
                f"{path} has another schema than {SCHEMA}, which this code reads: use a newer version."
            )
        try:
            return cls(**tensors, facts=facts)
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from error


def sample_weights(vision_model: nn.Module) -> Tensor | None:
    """Takes some weights of each tensor that the features and the routing depend on.

    Args:
        vision_model: The image tower.

    Returns:
        `(W,)` float32 on the CPU; None if its weights are elsewhere (on the meta device, sharded) or quantized.
    """
    found = []
    for name, tensor in vision_model.state_dict().items():
        if name.startswith("experts.") or name.endswith("num_batches_tracked"):
            continue
        if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or not hasattr(tensor, "flatten"):
            return None
        steps = torch.linspace(0, tensor.numel() - 1, min(_COMPARED, tensor.numel())).round().long()
        found.append(tensor.detach().flatten()[steps.to(tensor.device)].float().cpu())
    return torch.cat(found)


def load_rejector(
    name: Any, revision: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Rejector | None:
    """Reads the rejector of a folder or of a repository on the Hub.

    Args:
        name: Folder or Hub id, as `from_pretrained` takes it.
        revision: Branch, tag or commit.
        arguments: Those of `from_pretrained`, such as `cache_dir` and `token`.

    Returns:
        The rejector; None where there is no `rejector.safetensors`.

    Raises:
        ValueError: If the file cannot be used.
    """
    found = file_beside_weights(name, REJECTOR_FILE, revision, arguments)
    return None if found is None else Rejector.load(found)


attach_to_package(__name__)
