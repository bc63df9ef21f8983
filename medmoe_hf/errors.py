"""All errors that a user of the package can fix. They derive from `MedMoEError`.

Example:
    ```python
    from medmoe_hf import errors
    from medmoe_hf.training import TrainConfig

    try:
        TrainConfig.from_yaml("run.yaml")
    except errors.MedMoEError as error:
        print(error)
    ```
"""

from errno import ENOSPC

from medmoe_hf.model.errors_medmoe import (
    ArgumentError,
    ImageError,
    ImageTooLargeError,
    MedicalImageError,
    MedMoEError,
    MissingPackageError,
    PathExistsError,
    PathNotFoundError,
)


class CaptionError(MedMoEError, ValueError):
    """A caption that its rule cannot use. Captions may be patient data and errors reach logs: it never quotes them."""


class SourceError(MedMoEError, ValueError):
    """A file of sources that cannot be used; the message names the key and how to fix it."""


class DiskFullError(MedMoEError, OSError):
    """What could not be written because the disk, or the quota, is full; the message says where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = ENOSPC


class ShardError(MedMoEError, RuntimeError):
    """A shard that cannot be opened.

    Attributes:
        cause: What is counted, in a few words and without a path.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class StreamError(MedMoEError, RuntimeError):
    """A stream that cannot continue or be resumed; the message says why and what to do."""


class EncoderError(MedMoEError, ValueError):
    """A model that cannot be loaded or scored; the message says why and what would work."""


class DecodingError(ImageError):
    """A file whose decoder crashed or exceeded a limit, in a process of its own; the message says which."""


class IsolationError(MedMoEError, RuntimeError):
    """Files cannot be decoded in a process of their own, or too many of them ended theirs; the message says why."""


class WeightsError(EncoderError):
    """Weights that do not fit the architecture that their folder or name states; the message names a tensor."""


class DicomWebError(MedMoEError, RuntimeError):
    """A DICOMweb server that does not give what an address names; the message says why, without UIDs."""


class RecipeError(MedMoEError, ValueError):
    """An evaluation recipe, or a copy of its data, that cannot be used; the message says what to fix."""


class EncodeError(MedMoEError, ValueError):
    """A folder of embeddings that cannot be continued or read; the message says why and what to do."""


class ConfigError(MedMoEError, ValueError):
    """A training configuration that cannot be used; the message names the key and how to fix it."""


class ResumeError(MedMoEError, ValueError):
    """A checkpoint that a run cannot resume from; the message says why and what to do."""


class TrainingError(MedMoEError, RuntimeError):
    """Training cannot continue; the message says why and what to change."""


class Interrupted(TrainingError):
    """A signal stopped the run, after its checkpoint was written.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class ConvertError(MedMoEError, ValueError):
    """A checkpoint that cannot be converted; the message names the file or key, and what to do."""


class ExportError(MedMoEError, ValueError):
    """A model that cannot be exported, or whose export computes different numbers."""


class CardError(MedMoEError, ValueError):
    """A model card that cannot be written; the message names the file or argument, and what to do."""


class PublishError(MedMoEError, ValueError):
    """A checkpoint that was not published or verified; the message says why, and what to do."""


class HubUnreachableError(PublishError):
    """The Hub does not answer: offline mode, no network, or a connection that broke off."""


class IdentifierError(MedMoEError, ValueError):
    """Data that seem to identify patients; the message says how many and where, and never quotes them."""


__all__ = [
    "ArgumentError",
    "CaptionError",
    "CardError",
    "ConfigError",
    "ConvertError",
    "DecodingError",
    "DicomWebError",
    "DiskFullError",
    "EncodeError",
    "EncoderError",
    "ExportError",
    "HubUnreachableError",
    "IdentifierError",
    "ImageError",
    "ImageTooLargeError",
    "Interrupted",
    "IsolationError",
    "MedMoEError",
    "MedicalImageError",
    "MissingPackageError",
    "PathExistsError",
    "PathNotFoundError",
    "PublishError",
    "RecipeError",
    "ResumeError",
    "ShardError",
    "SourceError",
    "StreamError",
    "TrainingError",
    "WeightsError",
]
