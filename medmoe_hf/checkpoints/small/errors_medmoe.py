"""Errors that a user can fix: wrong arguments, missing files, images that cannot be used.

This file is copied into every checkpoint, so it imports nothing.
"""


class MedMoEError(Exception):
    """Base class of all errors that a user can fix; the message says what is wrong and what to do.

    The command line prints these without a traceback. Any other exception is a bug.
    """


class ArgumentError(MedMoEError, ValueError):
    """An argument or option with a value that is not allowed."""


class PathNotFoundError(MedMoEError, FileNotFoundError):
    """A file or folder that does not exist."""


class PathExistsError(MedMoEError, FileExistsError):
    """An output file or folder that already exists and is not replaced."""


class MissingPackageError(MedMoEError, ImportError):
    """A package of an optional dependency group is not installed; the message names the group."""


class ImageError(MedMoEError, OSError, ValueError):
    """An image that cannot be used; the message names the file, the fault and, if there is one, a remedy.

    Readers of files expect an `OSError`, users of image processors a `ValueError`: it is both.
    """


class ImageTooLargeError(ImageError):
    """An image with more pixels, or a file that inflates to more bytes, than allowed."""


class MedicalImageError(ImageError):
    """A DICOM or NIfTI file without a usable image."""
