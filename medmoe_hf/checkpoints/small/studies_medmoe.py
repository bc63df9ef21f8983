"""Whole studies: series of slices, volumes, loops, slides and pictures, whose slices are decoded one at a time."""

import dataclasses
import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .dicom_files_medmoe import DicomFrames, directions_of_cosines
from .errors_medmoe import ArgumentError, ImageError, ImageTooLargeError, MedicalImageError
from .image_files_medmoe import load_image
from .image_processing_medmoe import to_rgb
from .medical_images_medmoe import read_medical_image, windows_of
from .medical_pixels_medmoe import MAX_PIXELS, MedicalImage, upright_turns
from .nifti_medmoe import PLANES, NiftiVolume
from .study_files_medmoe import Instance, Skipped, identifier, read_files, reason_of

_SAME_DIRECTION = 0.01  # greatest difference of cosines within a series
_SAME_POSITION = 2  # decimals of millimetres
_GAPS_NAMED = 5  # in notes
_SPARSE = 10  # places of a grid for each slice; where there are more, a position is wrong
_UNEVEN = 0.2  # greatest deviation of a position from an even grid, in steps
_OPEN_FILES = 2  # headers of multi-frame files that are kept
_MOST_SLICES = 100_000  # of a volume, of which a compressed file can state millions in a few kilobytes
_MOST_INFLATED = 1032  # bytes that gzip makes of one
_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Source:
    """Where a slice comes from, for references to it.

    Args:
        path: The file. It may contain a name, so that it is not printed.
        frame: Index of the frame, of DICOM files with several, and of the slice in NIfTI files; else 0.
        sop_instance_uid: Of DICOM files; empty for others.
        sop_class_uid: Of DICOM files; empty for others.
    """

    path: str = field(repr=False)
    frame: int
    sop_instance_uid: str = field(default="", repr=False)
    sop_class_uid: str = ""


@dataclass(eq=False, repr=False)
class Series:
    """The slices of one series, in order, which are decoded when they are asked for.

    Iterating yields `(index, image)`, a slice at a time: memory does not depend on their number. Slices that cannot
    be decoded are left out then, and listed in `skipped`. Objects of this class hold no name, date or description of
    a patient, and print counts only.

    Args:
        uid: SeriesInstanceUID, which identifies a patient; for other files a hash of the path.
        part: Counts the series with the same UID from 0: those that have slices of several orientations, sizes or
            loops.
        kind: `"slices"` (by position, or by number where positions are missing), `"frames"` (of a loop, or one
            position over time), `"tiles"` (of a slide), `"volume"` (NIfTI) or `"image"`.
        header_modality: Name of the modality by the header; None if it is another one or unknown.
        sources: Where each slice comes from.
        size: Rows and columns in pixels, of the upright slices; None for pictures.
        spacing: Millimetres between rows and between columns, of the upright slices, or None.
        positions: `(N,)` millimetres along the normal of the slices, which points to the patient's head, front or
            right, whichever is nearest; None if they are unknown.
        affine: `(4, 4)` from (row, column, slot, 1) of the upright slices to millimetres, x to the patient's right, y
            to the front, z to the head, as in NIfTI (RAS+). None if the slices do not form an even grid.
        slots: `(N,)` indices of the slices along the third axis of `affine`: 0..N-1 unless slices are missing.
        missing: Pairs of the index of a slice and the number of slices that are missing behind it.
        notes: What a reader should know, such as missing slices.
    """

    uid: str
    part: int
    kind: str
    header_modality: str | None
    sources: list[Source]
    size: tuple[int, int] | None = None
    spacing: tuple[float, float] | None = None
    positions: np.ndarray | None = None
    affine: np.ndarray | None = None
    slots: np.ndarray | None = None
    missing: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _decode: Callable[[int, Any], MedicalImage] | None = field(default=None, init=False)
    _window: Any = field(default=None, init=False)
    _on_skip: Callable[[Skipped], None] | None = field(default=None, init=False)
    _skipped: dict[int, Skipped] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        return f"Series({self.kind}, {self.header_modality or 'unknown modality'}, {_counted(len(self), 'image')})"

    @property
    def key(self) -> str:
        """A hash of UID and part, which reports can name."""
        return _hashed(f"{self.uid}/{self.part}")

    @property
    def step(self) -> float | None:
        """Millimetres between neighbouring slices, or None."""
        return None if self.affine is None or len(self) < 2 else float(np.linalg.norm(self.affine[:3, 2]))

    @property
    def skipped(self) -> list[Skipped]:
        """The slices that could not be decoded so far."""
        return [self._skipped[index] for index in sorted(self._skipped)]

    def source(self, index: int) -> Source:
        """Returns where a slice comes from."""
        return self.sources[index]

    def slice(self, index: int, window: Any = None) -> MedicalImage:
        """Decodes one slice.

        Args:
            index: From 0.
            window: As for `read_medical_image`; None for the one with which the study was read.

        Returns:
            The image, whose `frame` and `frames` count the slices of the series.

        Raises:
            IndexError: There is no such slice.
            ImageError: It cannot be decoded; the message names the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the series has no slice {index}: it has {len(self)}, and they count from 0")
        assert self._decode is not None
        image = self._decode(index, self._window if window is None else window)
        return dataclasses.replace(image, frame=index, frames=len(self))

    def slices(self, indices: Iterable[int] | None = None, window: Any = None) -> Iterator[tuple[int, MedicalImage]]:
        """Decodes slices, one at a time; those that cannot be decoded are left out and listed in `skipped`.

        Args:
            indices: Which; None for all.
            window: As for `slice`.

        Yields:
            Index and image.
        """
        windows_of(window)
        for index in range(len(self)) if indices is None else indices:
            try:
                image = self.slice(index, window)
            except (OSError, ValueError) as error:
                if index not in self._skipped:
                    source = self.sources[index]
                    self._skipped[index] = Skipped(source.path, reason_of(error, source.path), source.frame)
                    if self._on_skip is not None:
                        self._on_skip(self._skipped[index])
                continue
            yield index, image

    def __iter__(self) -> Iterator[tuple[int, MedicalImage]]:
        return self.slices()


@dataclass(eq=False, repr=False)
class Study:
    """The series of one examination.

    Args:
        uid: StudyInstanceUID, which identifies a patient; for other files a hash of the path.
        series: At least one.
        left_out: Files of the study that are no images, or copies.
    """

    uid: str
    series: list[Series]
    left_out: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(series) for series in self.series)

    def __repr__(self) -> str:
        kinds = ", ".join(
            f"{count} of {kind}" for kind, count in sorted(Counter(one.kind for one in self.series).items())
        )
        skipped = len(self.skipped)
        return f"Study({len(self.series)} series: {kinds}; {_counted(len(self), 'image')}; {skipped} left out)"

    @property
    def key(self) -> str:
        """A hash of the UID, which reports can name."""
        return _hashed(self.uid)

    @property
    def skipped(self) -> list[Skipped]:
        """Files that are left out, and slices that could not be decoded so far."""
        return [*self.left_out, *(skipped for series in self.series for skipped in series.skipped)]


class Studies(list[Study]):
    """A list of studies; `skipped` lists the files that belong to none of them."""

    def __init__(self, studies: Iterable[Study], skipped: Iterable[Skipped]) -> None:
        super().__init__(studies)
        self.skipped = list(skipped)


def read_studies(
    paths: Any,
    *,
    plane: str | None = None,
    window: Any = None,
    volume: int | None = None,
    on_skip: Callable[[Skipped], None] | None = None,
    max_pixels: int = MAX_PIXELS,
    max_slices: int | None = None,
) -> Studies:
    """Finds the studies in files and folders. Headers are read, and no pixels.

    DICOM is grouped by StudyInstanceUID and SeriesInstanceUID, whatever the names, folders and order of files. Slices
    are sorted by position along their normal: from the feet to the head, from back to front, from left to right. The
    frames of enhanced files are sorted with them. Where positions are missing, slices are sorted by InstanceNumber,
    and frames stay in their order. Several files with the same SOPInstanceUID, number and place count once: the
    uncompressed one is read, and another one if that is damaged. A series with slices of several orientations or
    sizes, several loops or several resolutions of a slide, becomes several `Series`.

    Localisers, structured reports, dose reports, presentation states, key objects, documents, segmentations, labels of
    slides and everything else that is no image is left out and listed, with a reason. Each NIfTI file and each picture
    is a study of its own.

    Args:
        paths: A file, folder or DICOMDIR, or several; folders are searched with all folders in them.
        plane: For NIfTI: `"axial"`, `"coronal"` or `"sagittal"`; None for axial slices, or the only slice of a volume
            that has one.
        window: As for `read_medical_image`. `Series.slice` takes another one.
        volume: For NIfTI with several volumes: which one, from 0. None for the first one, which is noted.
        on_skip: Called with each `Skipped`, also with those that are found later, when slices are decoded.
        max_pixels: As for `read_medical_image`.
        max_slices: Greatest number of slices of all studies together; None for no limit. It is checked before the
            slices are listed, so that files which state very many of them cost no memory.

    Returns:
        DICOM studies in the order of their UIDs, and then other files in the order of their paths.

    Raises:
        FileNotFoundError: A path does not exist.
        ImageTooLargeError: There are more than `max_slices` slices.
        ImportError: The package that reads the format is missing.
        MedicalImageError: There is no image at all; the message counts the reasons.
        ValueError: The window or plane is unknown.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from medmoe_hf.model import read_studies
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (64, 48)).save(f"{folder}/a.png")
        ...     study = read_studies(folder)[0]
        ...     shapes = [image.pixels.shape for index, image in study.series[0]]
        >>> study, shapes
        (Study(1 series: 1 of image; 1 image; 0 left out), [(48, 64, 3)])
    """
    windows_of(window)
    if plane is not None and plane not in PLANES:
        raise ArgumentError(f"a plane is one of {', '.join(PLANES)}, got {plane!r}")
    if volume is not None and volume < 0:
        raise ArgumentError(f"volumes count from 0, got {volume}")
    skipped: dict[str, list[Skipped]] = {}

    def skip(what: Skipped, study: str) -> None:
        skipped.setdefault(study, []).append(what)
        if on_skip is not None:
            on_skip(what)

    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    instances, others = read_files(given, max_pixels, skip)
    slices = 0

    def count(more: int) -> None:
        nonlocal slices
        slices += more
        if max_slices is not None and slices > max_slices:
            raise _TooManySlices(f"there are more than {max_slices} slices; pass fewer files")

    count(sum(one.frames for one in instances))
    grouped: dict[str, dict[str, list[Instance]]] = {}
    for one in instances:
        # Without UIDs the files of a folder belong together.
        folder = identifier(os.path.dirname(one.path) or ".")
        grouped.setdefault(one.study or folder, {}).setdefault(one.series or folder, []).append(one)
    studies = []
    for uid in sorted(grouped):
        groups = sorted(grouped[uid].items(), key=lambda group: (min(one.numbers[0] for one in group[1]), group[0]))
        series = [part for name, members in groups for part in _series_of(name, members, max_pixels)]
        studies.append(Study(uid, series, skipped.pop(uid, [])))
    for path, kind, note in others:
        try:
            if kind == "nifti":
                single = _volume(path, plane, volume, max_pixels, count)
            else:
                count(1)
                single = _picture(path, note, max_pixels)
        except (ImportError, _TooManySlices):
            raise
        except Exception as error:  # parsers raise many types
            known = isinstance(error, ImageError)
            reason = reason_of(error, path) if known else f"it cannot be read ({type(error).__name__}): it is damaged"
            skip(Skipped(path, reason), "")
            continue
        studies.append(Study(single.uid, [single]))
    for study in studies:
        for made in study.series:
            made._window, made._on_skip = window, on_skip
    rest = [what for group in skipped.values() for what in group]
    if not studies:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(one.reason for one in rest).items())
        raise MedicalImageError(
            f"there is no image in {', '.join(repr(os.fsdecode(path)) for path in given)}: "
            f"{reasons or 'there are no files'}"
        )
    return Studies(studies, rest)


class _TooManySlices(ImageTooLargeError):
    """Of all files together; single ones that are too large are left out."""


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- DICOM


@dataclass(eq=False)
class _Frame:
    """A frame of a DICOM file, with its place in the patient."""

    instance: Instance
    index: int
    orientation: np.ndarray | None
    origin: np.ndarray | None

    @property
    def order(self) -> tuple[Any, ...]:
        """Over time, and always the same."""
        return (*self.instance.numbers[1:], self.instance.uid, self.index)


def _series_of(uid: str, instances: list[Instance], max_pixels: int) -> list[Series]:
    """Makes one or several series of all images with the same SeriesInstanceUID."""
    stacks = _Stacks()
    loose: list[_Frame] = []
    made: list[tuple[Any, Series]] = []
    for instance in sorted(instances, key=lambda one: (one.numbers[1:], one.uid)):
        frames = [_frame(instance, index) for index in range(instance.frames)]
        if all(frame.origin is not None and frame.orientation is not None for frame in frames):
            for frame in frames:
                stacks.add(frame)
        elif instance.frames == 1:
            loose += frames
        else:
            made.append((frames[0].order, _ordered("tiles" if instance.tiled else "frames", frames)))
    if loose:
        loose.sort(key=lambda frame: frame.order)
        made.append((loose[0].order, _ordered("image" if len(loose) == 1 else "slices", loose)))
    for stack in stacks:
        made.append((min(frame.order for frame in stack), _stacked(stack)))
    made.sort(key=lambda pair: pair[0])
    by_path = {one.path: one for one in instances}
    for part, (_, series) in enumerate(made):
        series.uid, series.part = uid, part
        series._decode = _DicomDecoder(series.sources, by_path, max_pixels)
    return [series for _, series in made]


def _frame(instance: Instance, index: int) -> _Frame:
    orientation = instance.orientations[min(index, len(instance.orientations) - 1)]
    # The position of a file without functional groups is that of its only frame.
    known = len(instance.origins) == instance.frames
    origin = instance.origins[index] if known else np.full(3, np.nan)
    return _Frame(
        instance,
        index,
        orientation if np.isfinite(orientation).all() else None,
        origin if np.isfinite(origin).all() else None,
    )


class _Stacks(list[list[_Frame]]):
    """Frames of equal orientation and size. Compared with all stacks at once: a file can state thousands of them."""

    def __init__(self) -> None:
        self._places = np.empty((16, 8))

    def add(self, frame: _Frame) -> None:
        assert frame.orientation is not None
        place = np.array([*frame.orientation, *frame.instance.size], dtype=np.float64)
        apart = np.abs(self._places[: len(self)] - place)
        same = (apart[:, :6] <= _SAME_DIRECTION).all(axis=1) & (apart[:, 6:] == 0).all(axis=1)
        if same.any():
            self[int(same.argmax())].append(frame)
            return
        if len(self) == len(self._places):
            self._places = np.concatenate([self._places, np.empty_like(self._places)])
        self._places[len(self)] = place
        self.append([frame])


def _ordered(kind: str, frames: list[_Frame]) -> Series:
    """Makes a series of frames without positions, in the given order."""
    first = frames[0]
    same = len({frame.instance.size for frame in frames}) == 1
    _, size, spacing = _upright(first)
    return Series("", 0, kind, first.instance.modality, _sources(frames), size if same else None, spacing)


def _sources(frames: list[_Frame]) -> list[Source]:
    return [Source(frame.instance.path, frame.index, frame.instance.uid, frame.instance.sop_class) for frame in frames]


def _upright(frame: _Frame) -> tuple[Any, tuple[int, int], tuple[float, float] | None]:
    """Returns the turns that make a frame upright, and then its size and spacing."""
    size, spacing = frame.instance.size, frame.instance.spacing
    directions = None if frame.orientation is None else directions_of_cosines(frame.orientation.tolist())
    turns = (False, (False, False)) if directions is None else upright_turns(*directions)
    if turns[0]:
        size, spacing = size[::-1], spacing[::-1] if spacing else None
    return turns, size, spacing


def _stacked(frames: list[_Frame]) -> Series:
    """Makes a series of frames with positions and one orientation."""
    cosines = frames[0].orientation
    assert cosines is not None
    across = np.cross(cosines[:3], cosines[3:]) * _TO_RAS
    length = float(np.linalg.norm(across))
    normal = across / length if length > 0 else np.array([0.0, 0.0, 1.0])
    normal = normal * (1 if normal[np.abs(normal).argmax()] > 0 else -1)
    origins = np.array([frame.origin for frame in frames]) * _TO_RAS
    projected = origins @ normal
    order = sorted(range(len(frames)), key=lambda at: (round(projected[at], _SAME_POSITION), frames[at].order))
    frames, origins, positions = [frames[at] for at in order], origins[order], projected[order]
    different = len(np.unique(positions.round(_SAME_POSITION)))
    turns, size, spacing = _upright(frames[0])
    kind = "frames" if different == 1 and len(frames) > 1 else "slices"
    if different == 1:
        order = sorted(range(len(frames)), key=lambda at: frames[at].order)
        frames = [frames[at] for at in order]
    series = Series("", 0, kind, frames[0].instance.modality, _sources(frames), size, spacing, positions)
    if different < len(frames):
        if different > 1:
            series.notes.append(f"{_counted(len(frames), 'image')} at {_counted(different, 'position')}")
        return series
    series.slots = _slots(positions)
    if series.slots is None:
        series.notes.append("the slices are unevenly spaced")
        return series
    for index in np.flatnonzero(np.diff(series.slots) > 1).tolist():
        count = int(series.slots[index + 1] - series.slots[index] - 1)
        series.missing.append((index, count))
    if series.missing:
        total = sum(count for _, count in series.missing)
        # For people, who count from 1, as in reports.
        places = ", ".join(str(index + 1) for index, _ in series.missing[:_GAPS_NAMED])
        more = " and others" if len(series.missing) > _GAPS_NAMED else ""
        series.notes.append(f"{_counted(total, 'slice')} missing, behind slice {places}{more}, counted from 1")
    if spacing is not None:
        series.affine = _affine(frames[0], turns, origins, series.slots, normal)
    return series


def _slots(positions: np.ndarray) -> np.ndarray | None:
    """Returns where positions lie on an even grid; None if they do not."""
    if len(positions) < 3:
        return np.arange(len(positions))
    steps = np.diff(positions)
    step = float(np.median(steps))
    if positions[-1] - positions[0] > _SPARSE * len(positions) * step:
        return None
    counts = np.rint(steps / step).astype(int)
    if (np.abs(steps / step - counts) > _UNEVEN).any() or counts.min() < 1:
        return None
    return np.concatenate([[0], np.cumsum(counts)])


def _affine(
    first: _Frame, turns: Any, origins: np.ndarray, slots: np.ndarray, normal: np.ndarray
) -> np.ndarray | None:
    instance, cosines = first.instance, first.orientation
    assert cosines is not None
    assert instance.spacing is not None
    steps = [cosines[3:] * _TO_RAS * instance.spacing[0], cosines[:3] * _TO_RAS * instance.spacing[1]]
    sizes = list(instance.size)
    turned, flipped = turns
    if turned:
        steps, sizes = steps[::-1], sizes[::-1]
    affine = np.eye(4)
    affine[:3, 3] = origins[0]
    for axis in range(2):
        if flipped[axis]:
            affine[:3, 3] += (sizes[axis] - 1) * steps[axis]
            steps[axis] = -steps[axis]
        affine[:3, axis] = steps[axis]
    if len(slots) == 1:
        affine[:3, 2] = normal * (instance.thickness or 1.0)
        return affine
    # The gantry may be tilted: then the slices are shifted against each other.
    affine[:3, 2] = (origins[-1] - origins[0]) / slots[-1]
    away = np.abs(origins - origins[0] - slots[:, None] * affine[:3, 2]).max()
    return affine if away <= max(1.0, _UNEVEN * float(np.linalg.norm(affine[:3, 2]))) else None


class _DicomDecoder:
    """Decodes slices of a series; of files with many frames only the frame is read."""

    def __init__(self, sources: list[Source], members: dict[str, Instance], max_pixels: int) -> None:
        self._sources, self._members, self._max_pixels = sources, members, max_pixels
        self._files: OrderedDict[str, DicomFrames] = OrderedDict()

    def __call__(self, index: int, window: Any) -> MedicalImage:
        source = self._sources[index]
        instance = self._members[source.path]
        problem: ImageError | OSError | None = None
        for path in [source.path, *instance.copies]:
            try:
                if instance.frames == 1:
                    return read_medical_image(path, 0, window, max_pixels=self._max_pixels)
                return read_medical_image(self._file(path), source.frame, window, max_pixels=self._max_pixels)
            except (ImageError, OSError) as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _file(self, path: str) -> DicomFrames:
        if path not in self._files:
            self._files[path] = DicomFrames(path)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        return self._files[path]


# --- NIfTI and pictures


def _volume(path: str, plane: str | None, volume: int | None, max_pixels: int, count: Callable[[int], None]) -> Series:
    nifti = NiftiVolume(path, repr(path), max_pixels, plane, volume or 0)
    count(nifti.count)
    if nifti.count > _MOST_INFLATED * os.path.getsize(path):
        raise MedicalImageError(f"{path!r} states more slices than it has bytes: it is damaged or cut off")
    if nifti.count > _MOST_SLICES:
        raise MedicalImageError(f"{path!r} states {nifti.count} slices, and at most {_MOST_SLICES} are listed")
    notes = []
    if nifti.volumes > 1:
        notes.append(f"volume {(volume or 0) + 1} of {nifti.volumes}; the others are not read")
    series = Series(
        identifier(path),
        0,
        "volume",
        None,
        [Source(path, index) for index in range(nifti.count)],
        nifti.size,
        nifti.spacing,
        nifti.positions,
        nifti.affine,
        np.arange(nifti.count),
        notes=notes,
    )
    series._decode = lambda index, window: read_medical_image(nifti, index, window, max_pixels=max_pixels)
    return series


def _picture(path: str, note: str, max_pixels: int) -> Series:
    def decode(index: int, window: Any) -> MedicalImage:
        rgb = to_rgb(load_image(path, max_pixels=max_pixels)[0]).permute(1, 2, 0)
        pixels = rgb.numpy() if rgb.dtype == torch.uint8 else (rgb / 255).numpy()
        return MedicalImage(np.ascontiguousarray(pixels), None, None, 0, 1)

    series = Series(identifier(path), 0, "image", None, [Source(path, 0)], notes=[note] if note else [])
    series._decode = decode
    return series
