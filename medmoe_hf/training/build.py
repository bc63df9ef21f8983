"""The model and processor that a training configuration names."""

import logging

from transformers import AutoTokenizer

from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import find_checkpoint, refuse_missing_folder
from medmoe_hf.data.phantom import phantom_vocabulary
from medmoe_hf.model import (
    MedMoEConfig,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
)
from medmoe_hf.model.presets_medmoe import PRESET_MAX_LENGTH
from medmoe_hf.training.config import ModelSection

logger = logging.getLogger(__name__)


def build_model(section: ModelSection) -> tuple[MedMoEModel, MedMoEProcessor]:
    """Builds or loads the model that a configuration names, with its processor.

    The vocabulary and the number of positions of a new model follow its tokenizer.

    Args:
        section: The `model` section of a training configuration.

    Returns:
        The model, in the mode that `from_pretrained` or the constructor leaves it in, and its processor.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: For an unknown preset or an invalid override.

    Example:
        ```python
        from medmoe_hf.training import build_model
        from medmoe_hf.training.config import ModelSection

        model, processor = build_model(ModelSection(preset="tiny"))
        ```
    """
    if section.from_pretrained is not None:
        folder = find_checkpoint(section.from_pretrained)
        with explain_loading(section.from_pretrained):
            model = MedMoEModel.from_pretrained(folder, **section.overrides)
            # The sentences stay true, but what was fitted to the old weights does not.
            model.tasks = {name: task.uncalibrated() for name, task in model.tasks.items()}
            if model.rejector is not None:
                model.rejector = None
                logger.warning(
                    "The rejector of %s is dropped, since it fits its weights only: run `medmoe fit-rejector` on the "
                    "trained model.",
                    section.from_pretrained,
                )
            return model, MedMoEProcessor.from_pretrained(folder)
    assert section.preset is not None  # checked by ModelSection
    max_length = PRESET_MAX_LENGTH.get(section.preset, 25)
    if section.tokenizer is None:
        tokenizer = MedMoETokenizer.from_words(phantom_vocabulary(), max_length=max_length)
    else:
        refuse_missing_folder(section.tokenizer, bare_ids=True)
        with explain_loading(section.tokenizer):
            tokenizer = MedMoETokenizer.from_tokenizer(
                AutoTokenizer.from_pretrained(section.tokenizer), max_length=max_length
            )
    overrides = dict(section.overrides)
    overrides["text_config"] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        **overrides.get("text_config", {}),
    }
    config = MedMoEConfig.from_preset(section.preset, **overrides)
    side = config.vision_config.image_size
    processor = MedMoEProcessor(MedMoEImageProcessor(size={"height": side, "width": side}), tokenizer)
    return MedMoEModel(config), processor
