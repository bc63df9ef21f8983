"""Text towers to start from: any BERT-like model, in full or its first layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import ConvertError
from medmoe_hf.hub.weight_mapping import listed

_TOKEN_IDS = ("pad", "unk", "cls", "sep", "mask", "bos", "eos", "decoder_start")


@dataclass
class TextTower:
    """A text tower to start from.

    Attributes:
        config: The encoder's configuration.
        tensors: Name in the encoder -> tensor.
        dropped: Name in the source -> why the tensor was dropped.
        words: Name of the tensor that embeds the vocabulary.
    """

    config: Any
    tensors: dict[str, Tensor]
    dropped: dict[str, str]
    words: str

    @property
    def rows(self) -> int:
        """Number of tokens that the tower embeds."""
        return len(self.tensors[self.words])

    def keep_tokens(self, ids: list[int]) -> None:
        """Reduces the vocabulary to some tokens, which are renumbered in their order.

        Args:
            ids: The tokens to keep, ascending.
        """
        self.tensors[self.words] = self.tensors[self.words][ids]
        self.config.vocab_size = len(ids)
        new = {old: position for position, old in enumerate(ids)}
        for role in _TOKEN_IDS:
            old = getattr(self.config, f"{role}_token_id", None)
            if old is not None:
                setattr(self.config, f"{role}_token_id", new.get(old))


def open_text(source: str, layers: int | None = None) -> TextTower:
    """Loads a text tower.

    Args:
        source: Folder or Hub id of any BERT-like model.
        layers: Number of its first layers to keep; None for all.

    Raises:
        ConvertError: If it cannot be loaded, lacks tensors, or has fewer layers.
    """
    try:
        refuse_missing_folder(source, bare_ids=True)
        config = AutoConfig.from_pretrained(source)
        if layers is not None:
            if not 1 <= layers <= config.num_hidden_layers:
                raise ConvertError(
                    f'--text-layers must be 1 to {config.num_hidden_layers}, the layers of "{source}"; got {layers}.'
                )
            config.num_hidden_layers = layers
        encoder, info = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f'No text tower at "{source}": {error}') from error
    absent = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
    if absent:
        raise ConvertError(f'"{source}" lacks {listed(sorted(absent))}.')
    beyond = "not part of the tower" if layers is None else f"not part of the tower with {layers} layers"
    dropped = dict.fromkeys(sorted(info["unexpected_keys"]), beyond)
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith("pooler."):
            dropped[name] = "not used by any loss"
        else:
            tensors[name] = tensor
    embedding = encoder.get_input_embeddings().weight
    words = next(name for name, parameter in encoder.named_parameters() if parameter is embedding)
    if Path(source).exists():
        # It would be saved with the model, and a path of this machine must not be published.
        encoder.config._name_or_path = ""
    return TextTower(encoder.config, tensors, dropped, words)
