"""Phantoms: synthetic image-report pairs of six modalities, drawn on the fly and reproducible by seed.

Every sample is a drawing, not a patient: simple geometry rendered with the look of a modality (projection, Hounsfield
window, relaxation weighting, speckle, stain, color photograph), and a report of one or two sentences from a small
grammar. Phantoms let pipelines, demos and tests run without a download, and a tiny model train in minutes.
**Metrics measured on them are not clinical evidence.** They only show that the software learns what was drawn.

Conventions:

- Sides: reports on `xray`, `ct` and `mri` follow the radiological convention, in which the patient's left is on the
  right of the image. For `ultrasound`, `histopathology` and `fundus`, left and right are sides of the image.
- Size words (small, moderate, large, or mild, moderate, marked) are the thirds of the range of sizes of a finding.
- Boxes are `[x0, y0, x1, y1]` in pixels with exclusive ends: `mask[y0:y1, x0:x1]` tightly contains the mask.
- Sample `i` depends on `(seed, i, image_size, modalities)` only. Anatomy is drawn in normalized coordinates, so that
  another `image_size` shows the same scene with different noise.
"""

from medmoe_hf.data.phantom.reports import FINDINGS, PHRASES, FindingPhrases, phantom_vocabulary, zero_shot_prompts
from medmoe_hf.data.phantom.samples import MIN_IMAGE_SIZE, phantom_sample, write_webdataset

__all__ = [
    "FINDINGS",
    "MIN_IMAGE_SIZE",
    "PHRASES",
    "FindingPhrases",
    "phantom_sample",
    "phantom_vocabulary",
    "write_webdataset",
    "zero_shot_prompts",
]
