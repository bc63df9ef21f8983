"""Whole studies: from files and folders to routed series, labels, key slices and reports."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.inference.studies.dicom_out import write_dicom as write_dicom
    from medmoe_hf.inference.studies.outputs import summary as summary
    from medmoe_hf.inference.studies.outputs import write_heatmap as write_heatmap
    from medmoe_hf.inference.studies.outputs import write_predictions as write_predictions
    from medmoe_hf.inference.studies.paths import predict as predict
    from medmoe_hf.inference.studies.pooling import POOLINGS as POOLINGS
    from medmoe_hf.inference.studies.pooling import pool_slices as pool_slices
    from medmoe_hf.inference.studies.predictions import LabelPrediction as LabelPrediction
    from medmoe_hf.inference.studies.predictions import SeriesPrediction as SeriesPrediction
    from medmoe_hf.inference.studies.predictions import StudyLabel as StudyLabel
    from medmoe_hf.inference.studies.predictions import StudyPrediction as StudyPrediction
    from medmoe_hf.inference.studies.predictions import StudyPredictions as StudyPredictions
    from medmoe_hf.inference.studies.predictions import TextPrediction as TextPrediction
    from medmoe_hf.inference.studies.predictor import Question as Question
    from medmoe_hf.inference.studies.predictor import StudyPredictor as StudyPredictor

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.inference.studies.dicom_out": ["write_dicom"],
        "medmoe_hf.inference.studies.outputs": ["summary", "write_heatmap", "write_predictions"],
        "medmoe_hf.inference.studies.predictions": [
            "LabelPrediction",
            "SeriesPrediction",
            "StudyLabel",
            "StudyPrediction",
            "StudyPredictions",
            "TextPrediction",
        ],
        "medmoe_hf.inference.studies.pooling": ["POOLINGS", "pool_slices"],
        "medmoe_hf.inference.studies.paths": ["predict"],
        "medmoe_hf.inference.studies.predictor": ["Question", "StudyPredictor"],
    },
)
