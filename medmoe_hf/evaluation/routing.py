"""Routing: whether the routers select the experts of the modality of images and reports."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import EvaluationSet, test_split
from medmoe_hf.evaluation.results import Result, common_facts, count_by_class
from medmoe_hf.inference.encoders import Encoder, MedMoEEncoder


def routing(encoder: Encoder, data: EvaluationSet, resamples: int = 1000, seed: int = 0) -> Result:
    """Compares the routers' choices with the known modalities of the test split.

    Images of unknown modality are left out. The report router is measured on the captions, if there are both.

    Args:
        encoder: A `MedMoEEncoder`; see `load_encoder`.
        data: A set with modalities.
        resamples: Number of bootstrap resamples; subjects are resampled where they are known.
        seed: Seed of the bootstrap.

    Returns:
        The result, with protocol `routing` and the variants `image router` and `report router`.

    Raises:
        ValueError: For a model without routers, or a set without an image whose modality has an expert.

    Example:
        ```python
        result = routing(load_encoder("small"), data)
        print(result.metrics["image router/accuracy"])
        ```
    """
    if not isinstance(encoder, MedMoEEncoder):
        raise ArgumentError(f"{encoder.name} has no router; only a MedMoE has.")
    data = test_split(data)
    truth = np.full(len(data), -1) if data.modalities is None else encoder.expert_ids(data.modalities)
    rows = (truth >= 0).nonzero()[0]
    if not len(rows):
        raise ArgumentError(f"{data.name}: routing needs images whose modality is known and has an expert.")
    truth, names = truth[rows], encoder.modalities
    subjects = None if data.subjects is None else np.array(data.subjects)[rows]
    captions = None if data.captions is None else [data.captions[row] for row in rows]
    result = Result(
        protocol="routing",
        model=encoder.name,
        dataset=data.name,
        count=len(rows),
        metrics={},
        facts={
            **common_facts(encoder, data, seed, resamples, captions or ()),
            "count_by_class": count_by_class(truth, names),
        },
    )
    routers: dict[str, Callable[[], Tensor]] = {
        "image router": lambda: encoder.route_images([data.images[row] for row in rows])
    }
    if captions is not None and encoder.has_report_router:
        routers["report router"] = lambda: encoder.route_texts(captions)
    for router, route in routers.items():
        result.add_classification(router, route().double().numpy(), truth, names, subjects)
    return result
