"""Routing: whether the routers send images and reports to the experts of their modality."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import EvaluationSet, test_split
from medmoe_hf.evaluation.results import Result, common_facts, count_by_class
from medmoe_hf.inference.encoders import Encoder, MedMoEEncoder


def routing(encoder: Encoder, data: EvaluationSet, resamples: int = 1000, seed: int = 0) -> Result:
    """Holds the routers' choices against the known modalities of the test part of a set.

    Images of unknown modality are left out. The report router is asked for the captions, where there are both.

    Args:
        resamples: of the bootstrap; whole subjects are drawn where they are known.
        seed: of the bootstrap.

    Raises:
        ValueError: for a model without routers, or a set none of whose images has a modality with an expert.
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
    for router, ask in routers.items():
        result.add_classification(router, ask().double().numpy(), truth, names, subjects)
    return result
