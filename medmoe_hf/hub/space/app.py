"""A MedMoE checkpoint in the browser: whole studies; routing, labels, heat-maps, scales and reports of a picture.

    python app.py CHECKPOINT        (a folder or Hub id; or set the variable MEDMOE_MODEL)

This folder is a complete Space, and what `medmoe demo` runs. It needs the checkpoint and transformers, and for whole
studies the package medmoe_hf; without that, the page shows single pictures.
"""

import argparse
import base64
import html
import io
import json
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the demo needs the package gradio: pip install "medmoe_hf[demo]"') from error
import matplotlib
import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoModel, AutoProcessor

AUTOMATIC = "automatic"
NEAREST = 5
LONGEST_SIDE = 1024  # of the picture that is shown, in pixels
HEATMAP_SIGMA = 1.5  # in cells of the map, as the checkpoint's pointing game is measured
SECONDS_KEPT = 1800  # that an unused picture stays in memory
# Limits for public pages, so that one user cannot take all memory or time.
MAX_FILE_SIZE = "200mb"
MAX_PIXELS = 50_000_000  # per picture; an X-ray has some 10 million
MAX_LABELS, MAX_CHARACTERS = 100, 1000  # characters per label or phrase
SESSIONS_KEPT = 100  # whose pictures stay in memory; gradio keeps 10,000
COLUMN = 345  # least width in pixels: two columns only if both are readable, so that a telephone gets one
WAITING = 32  # requests in the queue of each event

TEXTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("reports.json").read_text())
"""For each of the six default modalities: `labels`, `normal` sentences, and example sentences to search (`reports`).

Labels and normal sentences are those of `medmoe predict`; a test compares them.
"""

DISCLAIMER = (
    "**Research software, not a medical device.** Nothing here may guide a diagnosis or a treatment. A checkpoint "
    "knows images like those it was trained on, which its card names; on others its answers are close to guesses."
)
PRIVACY = (
    "Pictures are read and deleted at once; what is shown stays in memory for this page only, for half an hour at "
    "most. Files of a study lie in a temporary folder, without their names, until the next study, the end of the page "
    "or half an hour. Nothing is logged. Do not upload images of patients to a server that is not yours."
)
NO_CHECKPOINT = """# MedMoE

**No checkpoint was given.** Say which one to show, a folder or an id on the Hub:

- `medmoe demo FOLDER`
- `python app.py FOLDER_OR_ID`
- in a Space: Settings, Variables and secrets, a variable `MEDMOE_MODEL` with the id; for a private checkpoint also a
  secret `HF_TOKEN` that may read it.

Where medmoe_hf is installed, the checkpoint that it contains is shown without being named.
"""

CSS = """
.gradio-container { margin: 0 auto !important; max-width: 1200px !important; }
.gradio-container h1 code { overflow-wrap: anywhere !important; white-space: normal !important; }
/* A link to a file that is deleted once it is read. */
#file .download { display: none; }
.medmoe-stack { position: relative; line-height: 0; }
.medmoe-stack img { width: 100%; height: auto; }
.medmoe-stack .medmoe-heat { position: absolute; inset: 0; height: 100%; opacity: var(--medmoe-opacity, 0.6); }
.medmoe-picture { margin: 0 auto; max-width: 480px; }
.medmoe-picture.medmoe-small { max-width: 300px; }
.medmoe-picture figcaption { line-height: 1.4; margin-top: 8px; }
.medmoe-empty { border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 48px 16px;
  text-align: center; }
.medmoe-alert { border-left: 4px solid #c62828; padding: 8px 12px; overflow-wrap: anywhere; }
.medmoe-legend { list-style: none; margin: 8px 0 0; padding: 0; }
.medmoe-legend span { border: 1px solid #888; display: inline-block; height: 0.9em; margin-right: 8px; width: 0.9em; }
.medmoe-reports { list-style: decimal; margin: 0; padding-left: 1.5em; }
.medmoe-reports li { margin-bottom: 10px; }
.medmoe-reports small { font-size: 0.9em; }
button:focus-visible, input:focus-visible, textarea:focus-visible { outline: 3px solid #1565c0 !important;
  outline-offset: 2px; }
"""
# System fonts, so that none are downloaded; colours with a contrast of at least 4.5 to 1 (WCAG).
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
)
# The browser only needs the slider's value: no picture is sent when it moves.
SET_OPACITY = "(opacity) => { document.documentElement.style.setProperty('--medmoe-opacity', opacity); }"


@dataclass(eq=False)
class Picture:
    """A file that was read.

    Attributes:
        shown: (H, W, 3) uint8, upright, no side longer than `LONGEST_SIDE`.
        pixel_values: (1, 3, h, w), input of the model.
        told: The modality in a DICOM header; `None` if there is none.
        probabilities: Modality -> probability, of the image router.
        accepted: Whether the picture is like those that the model knows; None for a model that cannot tell.
    """

    shown: np.ndarray
    pixel_values: torch.Tensor
    told: str | None
    probabilities: dict[str, float]
    accepted: bool | None = None


class Checkpoint:
    """A MedMoE checkpoint, and what the page computes with it.

    In all methods `wish` is the modality of the expert to use, or `AUTOMATIC` for the image router's choice.

    Args:
        name: A folder or Hub id. Warning: without `load`, its code is run, so it must be one that you trust.
        say: Called with progress messages.
        load: Function of the name that returns a `StudyPredictor`, whose model is used; None without medmoe_hf.
        revision: Branch, tag or commit of a repository on the Hub, without medmoe_hf; None for its newest commit. Code
            and weights are those of one commit, also where somebody pushes another one meanwhile.
        reader: An `IsolatedReader` of medmoe_hf, which decodes files in processes of their own; None to decode them in
            this one.

    Attributes:
        predictor: What `load` returned; None without it.

    Raises:
        OSError: If the checkpoint does not exist or cannot be reached.
        ValueError: If it is not a MedMoE dual encoder.
    """

    def __init__(
        self,
        name: str,
        say: Callable[[str], None] = lambda text: None,
        load: Callable[[str], Any] | None = None,
        reader: Any = None,
        revision: str | None = None,
    ) -> None:
        local = name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).parent.is_dir()
        if local and not Path(name).is_dir():
            raise FileNotFoundError(f"{name}: there is no such folder, and an id on the Hub has the form user/name")
        # The last two parts of a folder: the full path may be sensitive.
        self.name = "/".join(Path(name).resolve().parts[-2:]) if Path(name).is_dir() else name
        say(f"Loading {self.name}" + ("" if Path(name).is_dir() else ", which is downloaded the first time") + " ...")
        self.predictor = None if load is None else load(name)
        self.reader = reader
        own = None if self.predictor is None else self.predictor.encoder
        # Whose code is run: that of one commit, for the model as for its processor.
        pinned: dict[str, Any] = {"trust_remote_code": True}
        if own is None and not Path(name).is_dir():
            commit = commit_of(name, revision)
            pinned |= {"revision": commit, "code_revision": commit}
            say(f"Running the code of {self.name} at {commit or 'the commit that was downloaded before'}.")
        self.model = AutoModel.from_pretrained(name, **pinned).eval() if own is None else own.model
        if self.model.config.model_type != "medmoe":
            raise ValueError(
                f"{name} holds a model of type {self.model.config.model_type!r}; the demo shows dual encoders, of "
                "type 'medmoe'."
            )
        self.processor = AutoProcessor.from_pretrained(name, **pinned) if own is None else own.processor
        # DICOM and NIfTI files are decoded by the checkpoint's code, which alone knows their size.
        self.processor.image_processor.max_pixels = MAX_PIXELS
        self.processor.image_processor.allow_urls = False
        self.modalities: list[str] = list(self.model.config.modalities.values())
        self.reports = [(modality, text) for modality, texts in TEXTS.items() for text in texts["reports"]]
        say(f"Encoding {len(self.reports)} reports to search in ...")
        self.report_embeds = self.embed_texts([text for _, text in self.reports])

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self.processor(text=list(texts), return_tensors="pt")

    @torch.inference_mode()
    def read(self, path: str) -> Picture:
        """Reads a picture and routes it.

        Args:
            path: The file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no picture, or too large.
            ImportError: If a package for its format is missing.
        """
        source: Any = path
        if self.reader is None:
            check_picture(path)
        else:
            source = self.reader.picture(path, MAX_PIXELS)
        plain = self.processor.image_processor(
            source, do_resize=False, do_normalize=False, pad_to_square=False, return_modality=True, return_tensors="pt"
        )
        shown = Image.fromarray((plain["pixel_values"][0].movedim(0, -1) * 255).round().to(torch.uint8).numpy())
        shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        pixel_values = self.processor(images=source, return_tensors="pt")["pixel_values"]
        routing = self.model.route(pixel_values=pixel_values)
        # A checkpoint brings its own code, which may be older than rejectors.
        accepted = getattr(routing, "accepted", None)
        return Picture(
            shown=np.asarray(shown),
            pixel_values=pixel_values,
            told=plain.get("modality", [None])[0],
            probabilities=dict(zip(self.modalities, routing.probabilities[0].tolist(), strict=True)),
            accepted=None if accepted is None else bool(accepted[0]),
        )

    def expert(self, picture: Picture, wish: str) -> str:
        """The modality of the expert that is used."""
        return max(picture.probabilities, key=picture.probabilities.__getitem__) if wish == AUTOMATIC else wish

    def _modality(self, picture: Picture, wish: str) -> str | None:
        """The `modality` to pass to the model: usually the expert's name, as a report might select another expert."""
        mixes = wish == AUTOMATIC and self.model.config.vision_config.mixture == "soft"
        return None if mixes else self.expert(picture, wish)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (N, D) of length 1."""
        embeds = self.model.get_text_features(**self._tokens(texts)).pooler_output
        return torch.nn.functional.normalize(embeds, dim=-1)

    @torch.inference_mode()
    def embed_picture(self, picture: Picture, wish: str) -> torch.Tensor:
        """The embedding (1, D), of any length."""
        features = self.model.get_image_features(picture.pixel_values, modality=self._modality(picture, wish))
        embed: torch.Tensor = features.pooler_output
        return embed

    @torch.inference_mode()
    def compare(self, picture: Picture, wish: str, labels: Sequence[str]) -> dict[str, float]:
        """The probability of each label among all of them."""
        outputs = self.model(
            **self._tokens(labels), pixel_values=picture.pixel_values, modality=self._modality(picture, wish)
        )
        return dict(zip(labels, outputs.logits_per_image[0].float().softmax(dim=0).tolist(), strict=True))

    @torch.inference_mode()
    def ground(self, picture: Picture, wish: str, phrase: str) -> np.ndarray:
        """How much more similar each position is to the phrase than to normal reports.

        Without normal reports for the modality, the words are compared with each other.

        Returns:
            (H, W) float32, for the pixels of `picture.shown`.
        """
        texts = TEXTS.get(self.expert(picture, wish))
        grounding = self.model.ground(
            **self._tokens([phrase]),
            pixel_values=picture.pixel_values,
            modality=self._modality(picture, wish),
            reference=None if texts is None else self._tokens(texts["normal"]),
        )
        return np.asarray(self._over(picture, grounding, sigma=HEATMAP_SIGMA).mean(axis=0))

    @torch.inference_mode()
    def scales_and_nearest(
        self, picture: Picture, wish: str
    ) -> tuple[dict[str, float], np.ndarray, list[tuple[float, str, str]]]:
        """Scale weights and nearest reports.

        Returns:
            The mean weight of each scale; (H, W), the index of the dominating scale at each pixel of `picture.shown`,
            0 for the finest; and the `NEAREST` reports: cosine similarity, modality and text.
        """
        features = self.model.get_image_features(picture.pixel_values, modality=self._modality(picture, wish))
        means = features.scale_weights[0].mean(dim=(1, 2)).tolist()
        count = len(means)
        ends = {0: ", finest", count - 1: ", coarsest"}
        names = [f"scale {index + 1}{ends.get(index, '')}" for index in range(count)]
        dominating = self._over(picture, features.scale_weights).argmax(axis=0)
        cosines = self.report_embeds @ torch.nn.functional.normalize(features.pooler_output[0], dim=0)
        best = cosines.topk(min(NEAREST, len(cosines)))
        nearest = [
            (value, *self.reports[row]) for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return dict(zip(names, means, strict=True)), dominating, nearest

    def _over(self, picture: Picture, maps: Any, sigma: float = 0.0) -> np.ndarray:
        """Maps of one image (1, C, h, w), or an output with `heatmaps`, as (C, H, W) on the pixels that are shown."""
        size = picture.shown.shape[:2]
        return np.asarray(self.processor.post_process_grounding(maps, target_sizes=[size], sigma=sigma)[0])


def check_picture(path: str) -> None:
    """Refuses what is no file, and pictures that are too large according to their header, before decoding.

    Raises:
        FileNotFoundError: For missing files, URLs, folders and devices.
        ValueError: For more than `MAX_PIXELS`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with warnings.catch_warnings():
        # Pillow's limit is higher, and it mistakes some DICOM files for damaged TIFFs.
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                width, height = image.size
        except Image.DecompressionBombError:
            width = height = MAX_PIXELS
        except Exception:  # DICOM, NIfTI or no picture: the processor reports it
            return
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has more than {MAX_PIXELS // 1_000_000} megapixels, too many for this page")


def _data_uri(pixels: np.ndarray) -> str:
    """A PNG as a data URI: gradio's image component would leave a file on the server."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def heat_colours(heatmap: np.ndarray) -> np.ndarray:
    """Colours (H, W, 4) uint8 of a heat-map (H, W): from transparent black to opaque bright."""
    low, high = float(heatmap.min()), float(heatmap.max())
    share = (heatmap - low) / (high - low) if high > low else np.zeros_like(heatmap)
    colours = matplotlib.colormaps["inferno"](share)
    colours[..., 3] = share
    return (colours * 255).round().astype(np.uint8)


def picture_html(picture: Picture, phrase: str = "", heatmap: np.ndarray | None = None, against: str = "") -> str:
    """The picture as HTML, with a phrase's heat-map and a caption; the phrase was compared `against` other texts."""
    overlay = caption = ""
    if heatmap is not None:
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        down, across = (round(100 * (at + 0.5) / side) for at, side in zip((row, column), heatmap.shape, strict=True))
        said = html.escape(phrase)
        place = f"{across} % from the left and {down} % from the top"
        overlay = (
            f'<img class="medmoe-heat" src="{_data_uri(heat_colours(heatmap))}" '
            f'alt="Heat-map of “{said}”, warmest {place}">'
        )
        caption = (
            f"<figcaption>“{said}” is warmest {place}. The colours run from {heatmap.min():+.2f} (clear) to "
            f"{heatmap.max():+.2f} (bright): how much more a place speaks for the phrase than for {against}. "
            "There is always a warmest place, also where there is nothing to find.</figcaption>"
        )
    return (
        '<figure class="medmoe-picture"><div class="medmoe-stack">'
        f'<img src="{_data_uri(picture.shown)}" alt="Your picture">{overlay}</div>{caption}</figure>'
    )


def scales_html(dominating: np.ndarray, names: Sequence[str]) -> str:
    """A small map of the dominating scales, (H, W) indices of `names`, with a legend."""
    levels = np.linspace(0, 1, len(names))
    colours = (matplotlib.colormaps["viridis"](levels)[:, :3] * 255).round().astype(np.uint8)
    legend = "".join(
        f'<li><span style="background: rgb{tuple(colour.tolist())}"></span>{html.escape(name)}: dominates on '
        f"{(dominating == index).mean():.0%}</li>"
        for index, (name, colour) in enumerate(zip(names, colours, strict=True))
    )
    return (
        '<figure class="medmoe-picture medmoe-small"><div class="medmoe-stack">'
        f'<img src="{_data_uri(colours[dominating])}" alt="Map of the dominating scale"></div>'
        f'<figcaption><ul class="medmoe-legend">{legend}</ul></figcaption></figure>'
    )


def nearest_html(nearest: Sequence[tuple[float, str, str]]) -> str:
    """The nearest reports as a list."""
    items = "".join(
        f"<li>{html.escape(text)}<br><small>{html.escape(modality)}, cosine {cosine:.2f}</small></li>"
        for cosine, modality, text in nearest
    )
    return f'<ol class="medmoe-reports">{items}</ol>'


def _status(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def _alert(text: str) -> str:
    return f'<p role="alert" class="medmoe-alert">{html.escape(text)}</p>'


def _empty(text: str) -> str:
    return f'<p class="medmoe-empty">{html.escape(text)}</p>'


def routed(checkpoint: Checkpoint, picture: Picture, wish: str) -> str:
    """The selected expert, who selected it, and the modality in the file's header, as text."""
    automatic = checkpoint.expert(picture, AUTOMATIC)
    text = f"The router chose the {automatic} expert ({picture.probabilities[automatic]:.0%})."
    if wish == automatic:
        text += " You chose the same."
    elif wish != AUTOMATIC:
        text += f" You overruled it: the {wish} expert was asked."
    if picture.told is not None:
        text += f" The file's header says {picture.told}."
    return f"{text} {_ACCEPTED[picture.accepted]}"


_ACCEPTED = {
    True: "The picture is like those that the model knows.",
    False: "Careful: the picture is unlike those that the model knows. Do not rely on what is said about it.",
    None: "Whether the model knows pictures of this kind was not checked: it has no rejector.",
}


def default_labels(modality: str) -> str:
    """The initial labels, one per line; none for a modality without texts."""
    return "\n".join(TEXTS.get(modality, {"labels": []})["labels"])


class Page:
    """The page's event handlers: from the values of the controls to the outputs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def load(self, path: str | None, wish: str, labels: str, phrase: str) -> tuple[Any, ...]:
        """Handles a new file: the picture, then the outputs of `describe`. The file is deleted."""
        if path is None:
            return self.clear(labels)
        try:
            picture = self.checkpoint.read(path)
        except FileNotFoundError:
            return self.clear(labels, _alert("The file is no longer here. Remove it and choose it again."))
        except (OSError, ValueError, ImportError) as error:
            # The message contains the path on the server, which may be sensitive.
            reason = str(error).replace(str(path), Path(path).name).removeprefix("image 0 of the batch: ")
            return self.clear(labels, _alert(f"This file gives no picture: {reason}. Try a PNG, JPEG or DICOM file."))
        finally:
            Path(path).unlink(missing_ok=True)
        return picture, *self.describe(picture, wish, labels, phrase)

    def clear(self, labels: str, status: str = "") -> tuple[Any, ...]:
        """The outputs of `load` without a picture."""
        return None, status, _empty("Your picture will be here."), None, labels, None, None, "", ""

    def describe(self, picture: Picture | None, wish: str, labels: str, phrase: str) -> tuple[Any, ...]:
        """Status, picture, router, labels and their probabilities, scales, dominating scales, nearest reports.

        Labels that were not edited follow the expert.
        """
        if picture is None:
            return self.clear(labels, self._nothing())[1:]
        untouched = not labels.strip() or labels in [default_labels(modality) for modality in TEXTS]
        labels = default_labels(self.checkpoint.expert(picture, wish)) if untouched else labels
        means, dominating, nearest = self.checkpoint.scales_and_nearest(picture, wish)
        return (
            _status(routed(self.checkpoint, picture, wish)),
            self._picture(picture, wish, phrase),
            picture.probabilities,
            labels,
            self._compare(picture, wish, labels),
            means,
            scales_html(dominating, list(means)),
            nearest_html(nearest),
        )

    def compare(self, picture: Picture | None, wish: str, labels: str) -> tuple[Any, ...]:
        """Status and the labels' probabilities."""
        if picture is None:
            return self._nothing(), None
        probabilities = self._compare(picture, wish, labels)
        rule = f"Write two or more labels, one per line: at most {MAX_LABELS}, of at most {MAX_CHARACTERS} characters."
        status = _alert(rule) if probabilities is None else None
        return status or _status(routed(self.checkpoint, picture, wish)), probabilities

    def ground(self, picture: Picture | None, wish: str, phrase: str) -> tuple[str, str]:
        """Status, and the picture with the phrase's heat-map."""
        if picture is None:
            return self._nothing(), _empty("Your picture will be here.")
        status = _status(routed(self.checkpoint, picture, wish)) if phrase.strip() else _alert("Write a phrase first.")
        return status, self._picture(picture, wish, phrase)

    def _nothing(self) -> str:
        return _alert("There is no picture (or it was here for half an hour): choose a file.")

    def _compare(self, picture: Picture, wish: str, labels: str) -> dict[str, float] | None:
        listed = list(dict.fromkeys(line.strip() for line in labels.splitlines() if line.strip()))
        if not 2 <= len(listed) <= MAX_LABELS or max(map(len, listed)) > MAX_CHARACTERS:
            return None
        return self.checkpoint.compare(picture, wish, listed)

    def _picture(self, picture: Picture, wish: str, phrase: str) -> str:
        phrase = phrase.strip()[:MAX_CHARACTERS]
        if not phrase:
            return picture_html(picture)
        known = self.checkpoint.expert(picture, wish) in TEXTS
        against = "normal reports of the modality" if known else "the other words"
        return picture_html(picture, phrase, self.checkpoint.ground(picture, wish, phrase), against)


def uploads_only(file: gr.File) -> gr.File:
    """Disables URLs in a component: gradio would download what a request names, of any size."""

    def refuse(place: Any) -> None:
        if str(place).startswith(("http://", "https://")):
            # Without a traceback: it is not an error of the page.
            raise gr.Error("Addresses are not fetched: upload the file.", print_exception=False)

    move, move_async = file.move_resource_to_block_cache, file.async_move_resource_to_block_cache

    def checked(place: Any) -> str | None:
        refuse(place)
        moved: str | None = move(place)
        return moved

    async def checked_async(place: Any) -> str | None:
        refuse(place)
        moved: str | None = await move_async(place)
        return moved

    file.move_resource_to_block_cache, file.async_move_resource_to_block_cache = checked, checked_async
    return file


def build(checkpoint: Checkpoint) -> gr.Blocks:
    """The page of a checkpoint: whole studies if it has a predictor of them, and single pictures."""
    with gr.Blocks(title="MedMoE", analytics_enabled=False, delete_cache=(60, 60)) as blocks:
        gr.Markdown(f"# MedMoE: `{checkpoint.name}`\n\n{DISCLAIMER}")
        if checkpoint.predictor is None:
            build_picture(checkpoint)
        else:
            from medmoe_hf.hub.study_demo.page import StudyPage
            from medmoe_hf.hub.study_demo.tab import build_tab

            with gr.Tab("Study"):
                page = StudyPage(checkpoint.predictor, reader=checkpoint.reader)
                build_tab(page, uploads_only, SECONDS_KEPT, SET_OPACITY, COLUMN)
            with gr.Tab("Picture and model"):
                build_picture(checkpoint)
        gr.Markdown(PRIVACY)
    return blocks.queue(max_size=WAITING)


def build_picture(checkpoint: Checkpoint) -> None:
    """Adds the controls for a single picture, and what the model has inside, to the page that is being built."""
    page = Page(checkpoint)
    column = {"min_width": COLUMN}
    picture = gr.State(None, time_to_live=SECONDS_KEPT)
    # Any suffix: DICOM files often have none.
    file = uploads_only(gr.File(label="Picture: PNG, JPEG or DICOM", height=140, elem_id="file"))
    status = gr.HTML(elem_id="status")
    with gr.Row():
        with gr.Column(**column):
            shown = gr.HTML(_empty("Your picture will be here."), elem_id="picture")
            phrase = gr.Textbox(
                label="Phrase", info="Where is it? One word is often best: effusion", max_lines=1, elem_id="phrase"
            )
            find = gr.Button("Show heat-map", variant="primary", elem_id="find")
            opacity = gr.Slider(0, 1, value=0.6, step=0.05, label="Opacity of the heat-map", elem_id="opacity")
        with gr.Column(**column):
            wish = gr.Dropdown(
                [AUTOMATIC, *checkpoint.modalities],
                value=AUTOMATIC,
                label="Expert",
                info="The router's choice, or overrule it.",
                filterable=False,
                elem_id="expert",
            )
            router = gr.Label(label="Router: probability of each expert", show_heading=False, elem_id="router")
            labels = gr.Textbox(
                label="Zero-shot labels", info="Sentences as in a report, one per line.", lines=4, elem_id="labels"
            )
            ask = gr.Button("Compare labels", variant="primary", elem_id="ask")
            zero_shot = gr.Label(label="Probability among these labels", show_heading=False, elem_id="zero-shot")
    with gr.Row():
        with gr.Column(**column):
            gr.Markdown("## Scales of the expert")
            means = gr.Label(label="Mean weight of each scale", show_heading=False, elem_id="scales")
            dominating = gr.HTML(elem_id="dominating")
        with gr.Column(**column):
            gr.Markdown(f"## Nearest sentences\n\nOf {len(checkpoint.reports)} made-up examples.")
            nearest = gr.HTML(elem_id="nearest")

    described = [status, shown, router, labels, zero_shot, means, dominating, nearest]
    controls = [wish, labels, phrase]
    file.upload(page.load, [file, *controls], [picture, *described])
    file.clear(page.clear, [labels], [picture, *described])
    wish.change(page.describe, [picture, *controls], described)
    gr.on([ask.click, labels.submit], page.compare, [picture, wish, labels], [status, zero_shot])
    gr.on([find.click, phrase.submit], page.ground, [picture, wish, phrase], [status, shown])
    opacity.change(None, [opacity], None, js=SET_OPACITY)


def study_loader() -> Callable[[str], Any] | None:
    """Returns the function that loads a predictor of whole studies; None where medmoe_hf is not installed."""
    try:
        from medmoe_hf.inference.studies import StudyPredictor
    except ImportError:
        return None
    return lambda name: StudyPredictor(name, device="cpu")


def commit_of(name: str, revision: str | None) -> str | None:
    """Returns the commit of a repository on the Hub; the given revision where the Hub does not answer.

    Args:
        name: Its id.
        revision: Branch, tag or commit; None for the newest one.
    """
    try:
        return str(HfApi().model_info(name, revision=revision).sha)
    except Exception:  # it may still be in the cache; what is wrong is said when it is loaded
        return revision


def isolated_reader() -> Any:
    """Returns what decodes files in processes of their own; None where medmoe_hf is not installed."""
    try:
        from medmoe_hf.inference.isolation import IsolatedReader
    except ImportError:
        return None
    return IsolatedReader(kept=2)


def packaged() -> str | None:
    """Returns the folder of the checkpoint that medmoe_hf contains; None without it."""
    try:
        from medmoe_hf import pretrained

        return pretrained()
    except (ImportError, OSError):
        return None


def check_port(port: int) -> None:
    """Checks a port before the checkpoint is loaded; gradio would check it afterwards.

    Raises:
        OSError: If the port is in use or not permitted.
    """
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        # As servers do: the port of a server that has just ended is free.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except OSError as error:
            other = port + 1 if port < 65535 else port - 1
            raise OSError(
                f"port {port} on {host} cannot be used ({error.strerror}): another demo may be running. "
                f"Choose another one by `--port`, {other} say."
            ) from error


def say(text: str) -> None:
    """Prints a progress message."""
    print(text, flush=True)


def launch(
    name: str | None = None,
    port: int | None = None,
    isolate: bool = True,
    extend: Callable[[gr.Blocks, Checkpoint], dict[str, Any]] | None = None,
) -> None:
    """Serves a checkpoint until interrupted, on 127.0.0.1 unless GRADIO_SERVER_NAME is set.

    Args:
        name: A folder or Hub id; `None` for the variable MEDMOE_MODEL, and then for the checkpoint that medmoe_hf
            contains. Without all of them, the page explains what to specify.
        port: A port; `None` for the first free one from 7860.
        isolate: Whether files are decoded in processes of their own, with limits, where medmoe_hf is installed.
        extend: Function that adds to the page of a checkpoint, and returns arguments of gradio's `launch`.

    Raises:
        OSError: If the checkpoint does not exist or cannot be reached, or if the port is in use.
        ValueError: If it is not a MedMoE dual encoder.
    """
    if port is not None:
        check_port(port)
    name = name or os.environ.get("MEDMOE_MODEL") or packaged()
    css, options = CSS, {}
    if name:
        reader = isolated_reader() if isolate else None  # which imports the libraries meanwhile
        load = study_loader()
        checkpoint = Checkpoint(name, say, load, reader, os.environ.get("MEDMOE_REVISION") or None)
        if load is not None:
            from medmoe_hf.hub.study_demo.tab import STUDY_CSS

            css += STUDY_CSS
        say("Starting the page ...")
        blocks = build(checkpoint)
        if extend is not None:
            options = extend(blocks, checkpoint)
    else:
        with gr.Blocks(title="MedMoE", analytics_enabled=False) as blocks:
            gr.Markdown(NO_CHECKPOINT)
    blocks.launch(
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=SESSIONS_KEPT,
        run_history=False,  # which browsers keep
        theme=THEME,
        css=css,
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A MedMoE checkpoint in the browser.")
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id; default: MEDMOE_MODEL, or medmoe_hf's")
    parser.add_argument("--port", type=int, help="port; default: the first free one from 7860")
    parser.add_argument("--no-isolate", action="store_true", help="decode files in this process, whatever they are")
    arguments = parser.parse_args()
    try:
        launch(arguments.checkpoint, arguments.port, not arguments.no_isolate)
    except (OSError, ValueError) as error:
        raise SystemExit(f"app.py: {error}") from error


if __name__ == "__main__":
    main()
