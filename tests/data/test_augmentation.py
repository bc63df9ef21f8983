import random
from collections.abc import Iterable
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from medmoe_hf.data.augmentation import OFF, STANDARD, Augmentation, augment, standard_augmentation
from medmoe_hf.data.sources import Source
from medmoe_hf.data.stream import Sample, SampleStream
from medmoe_hf.errors import ConfigError
from medmoe_hf.model.image_processing_medmoe import to_rgb
from medmoe_hf.training.config import TrainConfig
from medmoe_hf.training.streams import held_out_stream, training_stream


def picture(mode: str = "L", size: tuple[int, int] = (64, 48)) -> Image.Image:
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def only(**changes) -> Augmentation:
    return OFF.model_copy(update=changes)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_off_changes_nothing(mode):
    image = picture(mode)
    for seed in range(5):
        assert np.array_equal(augment(image, OFF, random.Random(seed)), image)


@pytest.mark.parametrize("modality", STANDARD)
def test_the_same_draws_give_the_same_pixels(modality):
    image = picture("RGB" if modality in ("histopathology", "fundus") else "L")
    first = [np.asarray(augment(image, STANDARD[modality], random.Random(seed))) for seed in range(8)]
    again = [np.asarray(augment(image, STANDARD[modality], random.Random(seed))) for seed in range(8)]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert not all(np.array_equal(one, first[0]) for one in first if one.shape == first[0].shape)
    assert all(pixels.dtype == np.uint8 and pixels.ndim == np.asarray(image).ndim for pixels in first)


@pytest.mark.parametrize("modality", ["xray", "ct", "mri", "ultrasound"])
def test_bodies_are_never_mirrored(modality):
    """Bright on the left stays bright on the left, whatever else is drawn."""
    pixels = np.zeros((96, 96), np.uint8)
    pixels[:, 16:40] = 200
    for seed in range(200):
        changed = np.asarray(augment(Image.fromarray(pixels), STANDARD[modality], random.Random(seed)), np.float64)
        columns = changed.mean(axis=0)
        assert columns[:48].sum() > columns[48:].sum()


def test_flips_are_exact_and_spare_captions_that_name_a_side():
    image = picture()
    mirrored = np.asarray(image)[:, ::-1]
    flip = only(flip_horizontal=1.0)
    assert np.array_equal(augment(image, flip, random.Random(0), "Color fundus photograph."), mirrored)
    for caption in ("Fundus of the left eye.", "Right eye, macula centred.", "OD, macula", "Chest L > R"):
        assert np.array_equal(augment(image, flip, random.Random(0), caption), image)
    upside_down = augment(image, only(flip_vertical=1.0), random.Random(0), "the left lung")
    assert np.array_equal(upside_down, np.asarray(image)[::-1])


def test_quarter_turns_are_exact_and_all_four_come():
    image = picture(size=(32, 32))
    pixels = np.asarray(image)
    turned = [np.asarray(augment(image, only(quarter_turns=True), random.Random(seed))) for seed in range(40)]
    counts = [sum(np.array_equal(one, np.rot90(pixels, k)) for one in turned) for k in range(4)]
    assert sum(counts) == 40
    assert min(counts) > 0


def test_a_shift_moves_the_picture_by_that_share():
    pixels = np.zeros((100, 100), np.uint8)
    pixels[40:60, 40:60] = 255
    for seed in range(20):
        rng = random.Random(seed)
        moved = np.asarray(augment(Image.fromarray(pixels), only(shift=0.2), rng), np.float64)
        rows, columns = np.indices(moved.shape)
        centre = (moved * columns).sum() / moved.sum() - 49.5, (moved * rows).sum() / moved.sum() - 49.5
        assert max(map(abs, centre)) <= 20.01
        assert moved.sum() == pytest.approx(255 * 400, rel=0.02)


def test_zoom_scales_the_area_by_its_square():
    pixels = np.zeros((200, 200), np.uint8)
    pixels[80:120, 80:120] = 255
    areas = [
        np.asarray(augment(Image.fromarray(pixels), only(zoom=0.5), random.Random(seed)), np.float64).sum() / 255
        for seed in range(60)
    ]
    assert 1600 / 1.5**2 * 0.97 <= min(areas) < 1000
    assert 2400 < max(areas) <= 1600 * 1.5**2 * 1.03


def test_intensity_keeps_the_order_of_grey_values_and_black():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(4, axis=0))
    changed = [
        np.asarray(augment(ramp, only(gamma=0.4, contrast=0.35, brightness=0.12), random.Random(seed)), np.int64)[0]
        for seed in range(50)
    ]
    for values in changed:
        assert values[0] == 0
        assert (np.diff(values) >= 0).mean() > 0.97  # a strong darkening may bend the first grey values
    assert np.std([values[128] for values in changed]) > 10


def test_gamma_alone_is_a_power():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    values = np.asarray(augment(ramp, only(gamma=0.5), random.Random(4)), np.float64)[0] / 255
    inner = slice(20, 236)
    exponents = np.log(values[inner]) / np.log(np.arange(256)[inner] / 255)
    assert exponents.std() < 0.03
    assert 1 / 1.5 <= exponents.mean() <= 1.5


def test_equalizing_replaces_gray_levels_by_their_quantiles():
    """Against ranks of the pixels; what is black stays black and counts for nothing."""
    rng = np.random.default_rng(0)
    pixels = np.clip(8 + rng.exponential(20, (64, 96)), 8, 255).astype(np.uint8)
    pixels[:, :32] = 3
    body = pixels[:, 32:].astype(int)
    below, equal = (body[..., None] > body.ravel()).mean(-1), (body[..., None] == body.ravel()).mean(-1)
    quantiles = 8 + 247 * (below + equal / 2)
    shares = set()
    for seed in range(20):
        changed = np.asarray(augment(Image.fromarray(pixels), only(equalize=1.0), random.Random(seed))).astype(float)
        assert (changed[:, :32] == 3).all()
        share = ((changed[:, 32:] - body).sum() / (quantiles - body).sum()).round(2)
        assert np.abs(changed[:, 32:] - (body + share * (quantiles - body))).max() < 2
        shares.add(share)
    assert min(shares) < 0.15
    assert max(shares) > 0.85
    color = np.stack([pixels, pixels, pixels], -1)
    for seed in range(3):
        gray = augment(Image.fromarray(pixels), only(equalize=1.0), random.Random(seed))
        rgb = np.asarray(augment(Image.fromarray(color), only(equalize=1.0), random.Random(seed)))
        assert (rgb == np.asarray(gray)[..., None]).all()
    black = Image.new("L", (8, 8), 2)
    assert np.array_equal(augment(black, only(equalize=1.0), random.Random(0)), black)


def test_noise_has_the_size_that_is_promised_and_is_grey():
    flat = Image.new("RGB", (128, 128), (120, 120, 120))
    deviations = []
    for seed in range(30):
        pixels = np.asarray(augment(flat, only(noise=1.0), random.Random(seed)), np.float64)
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
        deviations.append(pixels.std() / 255)
    assert max(deviations) <= 0.063
    assert max(deviations) > 0.04


def test_probabilities_are_shares():
    image = picture("RGB")
    grey = sum(
        np.array_equal(pixels[..., 0], pixels[..., 1])
        for pixels in (np.asarray(augment(image, only(gray=0.3), random.Random(seed))) for seed in range(400))
    )
    assert 0.22 <= grey / 400 <= 0.38


def test_large_images_are_reduced_first_and_small_ones_are_not():
    assert augment(picture(size=(1000, 800)), OFF, random.Random(0), side=160).size == (250, 200)
    assert augment(picture(size=(300, 200)), OFF, random.Random(0), side=160).size == (300, 200)


def test_other_depths_are_shown_as_the_image_processor_shows_them():
    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    changed = np.asarray(augment(deep, only(flip_horizontal=1.0), random.Random(1)))
    shown = to_rgb(deep).permute(1, 2, 0).numpy().round()
    assert changed.dtype == np.uint8
    assert np.array_equal(changed, shown[:, ::-1])


def test_changes_are_laid_over_the_standard():
    result = standard_augmentation({"all": {"noise": 0.0, "rotation": 3}, "fundus": {"rotation": 90}})
    assert result["fundus"].rotation == 90
    assert result["xray"].rotation == 3
    assert {one.noise for one in result.values()} == {0.0}
    assert result["histopathology"].flip_vertical == STANDARD["histopathology"].flip_vertical
    with pytest.raises(ValueError, match="no modality 'x-rays'"):
        standard_augmentation({"x-rays": {}})
    with pytest.raises(ValueError, match="zoomm"):
        standard_augmentation({"all": {"zoomm": 1}})
    with pytest.raises(ValueError, match="less than or equal to 1"):
        standard_augmentation({"all": {"noise": 2}})


def test_streams_augment_alike_after_a_resume_and_anew_in_each_epoch(tmp_path):
    for number in range(6):
        picture("RGB").save(tmp_path / f"{number}.png")
    rows = "".join(f"{number}.png,Color fundus photograph.,fundus\n" for number in range(6))
    (tmp_path / "t.csv").write_text(f"path,caption,modality\n{rows}", encoding="utf-8")
    sources = [TypeAdapter(Source).validate_python({"kind": "csv", "files": [str(tmp_path / "t.csv")]})]
    plain = {sample["key"]: np.asarray(sample["image"]) for sample in SampleStream(sources)}

    def stream() -> SampleStream:
        return SampleStream(sources, seed=3, augmentation=standard_augmentation())

    def pixels(samples: Iterable[Sample]) -> list[np.ndarray]:
        return [np.asarray(sample["image"]) for sample in samples]

    whole = stream()
    first, second = pixels(whole), pixels(whole)
    assert all(not np.array_equal(one, next(iter(plain.values()))) for one in first)
    assert not any(np.array_equal(one, other) for one in first for other in second)
    stopped = stream()
    begun = pixels(islice(stopped, 2))
    resumed = stream()
    resumed.load_state_dict(stopped.state_dict())
    together = begun + pixels(resumed)
    assert all(np.array_equal(one, other) for one, other in zip(first, together, strict=True))


def test_training_images_are_augmented_and_held_out_ones_are_not(tmp_path):
    data = {"train": {"kind": "phantom", "length": 20}, "validation_share": 0.5, "augmentation": {"all": {"noise": 0}}}
    config = TrainConfig.from_dict(
        {
            "output_dir": tmp_path / "out",
            "model": {"preset": "tiny"},
            "data": data,
            "max_steps": 1,
            "evaluate_every": 1,
        }
    )
    collator = SimpleNamespace(prepare=None, side=64, shorten=None)
    training, held_out = training_stream(config, collator, 0, 1), held_out_stream(config, collator)
    assert training.augmentation["ct"].noise == 0
    assert training.augmentation["ct"].rotation == STANDARD["ct"].rotation
    assert held_out.augmentation is None
    with pytest.raises(ConfigError, match="no modality 'x-ray'"):
        TrainConfig.from_dict(
            {
                "output_dir": tmp_path / "out",
                "model": {"preset": "tiny"},
                "data": {**data, "augmentation": {"x-ray": {}}},
                "max_steps": 1,
            }
        )
