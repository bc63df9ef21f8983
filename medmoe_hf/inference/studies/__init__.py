"""Whole studies: from files and folders to routed series, labels, key slices and reports."""

from medmoe_hf.common.lazy import lazy_attributes

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
        "medmoe_hf.inference.studies.predictor": ["Question", "StudyPredictor", "predict"],
        "medmoe_hf.inference.studies.tasks": ["LabelTask"],
    },
)
