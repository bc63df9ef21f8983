"""Comparison of the answers of `predict` and of the service."""

from typing import Any

import pytest


def with_files(expected: dict[str, Any], *files: list[int]) -> dict[str, Any]:
    """What the service makes of an answer of `predict`: it adds to each study the uploads that it was read from."""
    studies = [{**study, "files": numbers} for study, numbers in zip(expected["studies"], files, strict=True)]
    return {**expected, "studies": studies}


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for the last digits of numbers: batches may be cut elsewhere."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)
