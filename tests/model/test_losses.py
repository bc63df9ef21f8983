"""The losses against the equations of the paper (sections 4.4, 4.5) and of GLoRIA, written out with Python loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from medmoe_hf.model import losses_medmoe as losses
from medmoe_hf.model import word_regions_medmoe

TEMP1, TEMP2, TEMP3 = 4.0, 5.0, 10.0
IMAGES, WORDS, WIDTH, SIDE, EXPERTS = 4, 5, 6, 3, 6
WORDS_OF_CAPTION = (5, 1, 0, 3)  # the third has none


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())


def softmax(values):
    total = sum(value.exp() for value in values)
    return [value.exp() / total for value in values]


def mixture(weights, vectors):
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))


def regions_of(local, image):
    return [local[image, :, y, x] for y in range(SIDE) for x in range(SIDE)]


def words_of(words, caption):
    return [words[caption, word] for word in range(WORDS_OF_CAPTION[caption])]


def slow_contrast(logits):
    """-Σ_i log softmax_j(logits[i, j])[i] / B, plus the same over the columns."""
    size = len(logits)
    images = [softmax(logits[i])[i].log() for i in range(size)]
    texts = [softmax([logits[j][i] for j in range(size)])[i].log() for i in range(size)]
    return -sum(images) / size - sum(texts) / size


def positives_of(groups, pair):
    """P(i), the pairs of the same group; a group of -1 is unknown, and nobody else's."""
    return [other for other, group in enumerate(groups) if other == pair or (group == groups[pair] and group != -1)]


def shares_of(groups):
    """Targets: row i gives each of P(i) the same share."""
    return [
        [1 / len(positives_of(groups, i)) if j in positives_of(groups, i) else 0 for j in range(len(groups))]
        for i in range(len(groups))
    ]


def slow_multi_positive_contrast(logits, targets):
    """-1/B Σ_i Σ_j T_ij log softmax_j(s_ij), and the same over the columns: caption i against all images."""
    size, total = len(logits), 0
    for i in range(size):
        of_image = softmax(list(logits[i]))
        of_caption = softmax([logits[j][i] for j in range(size)])
        total = total - sum(targets[i][j] * (of_image[j].log() + of_caption[j].log()) for j in range(size))
    return total / size


def slow_global(image_embeds, text_embeds):
    return slow_contrast([[TEMP3 * cosine(image, text) for text in text_embeds] for image in image_embeds])


def slow_gloria_similarity(regions, words):
    if not words:
        return regions[0].new_zeros(())
    over_words = [softmax([dot(word, region) for word in words]) for region in regions]
    total = 0
    for i, word in enumerate(words):
        over_regions = softmax([TEMP1 * over_words[j][i] for j in range(len(regions))])
        total = total + (TEMP2 * cosine(mixture(over_regions, regions), word)).exp()
    return TEMP3 * total.log()


def token_context(regions, word):
    return mixture(softmax([TEMP3 * dot(word, region) for region in regions]), regions)


def slow_token_similarity(regions, words):
    if not words:
        return regions[0].new_zeros(())
    return TEMP3 * sum(cosine(token_context(regions, word), word) for word in words) / len(words)


def slow_similarities(similarity, local, words):
    return [
        [similarity(regions_of(local, image), words_of(words, caption)) for caption in range(IMAGES)]
        for image in range(IMAGES)
    ]


def slow_gloria(local, words):
    return slow_contrast(slow_similarities(slow_gloria_similarity, local, words))


def slow_token(local, words):
    reports = []
    for report in range(IMAGES):
        regions, own = regions_of(local, report), words_of(words, report)
        terms = []
        for i, word in enumerate(own):
            context = token_context(regions, word)
            terms.append(-softmax([TEMP3 * cosine(context, other) for other in own])[i].log())
        if terms:
            reports.append(sum(terms) / len(terms))
    return sum(reports) / len(reports)


def slow_modality(logits, labels):
    known = [i for i in range(len(labels)) if labels[i] != -100]
    return -sum(softmax(logits[i])[int(labels[i])].log() for i in known) / len(known)


def config(local_loss):
    return SimpleNamespace(
        local_loss=local_loss,
        local_loss_matmul_dtype="float32",
        temp1=TEMP1,
        temp1_regions=None,
        local_loss_regions=None,
        temp2=TEMP2,
        temp3=TEMP3,
        contrast="sum",
        aux_loss_on="logits",
        aux_label_smoothing=0.0,
    )


def leaf(*shape, scale=1.0):
    return (scale * torch.randn(*shape)).requires_grad_()


@pytest.fixture
def word_mask() -> Tensor:
    return torch.arange(WORDS) < torch.tensor(WORDS_OF_CAPTION).unsqueeze(1)


@pytest.fixture
def local() -> Tensor:
    return leaf(IMAGES, WIDTH, SIDE, SIDE, scale=0.7)


@pytest.fixture
def words(word_mask) -> Tensor:
    return (torch.randn(IMAGES, WORDS, WIDTH) * word_mask.unsqueeze(-1)).requires_grad_()


def assert_same_with_gradients(fast, slow, *inputs):
    """`fast` in float32 and `slow` in float64 agree in value (1e-6) and in the gradient of every input (1e-5).

    Elements near zero are sums of terms as large as the largest element, and rounded like these: to 1e-6 of it.
    """
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    value, expected = fast(*inputs), slow(*doubles)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    gradients = torch.autograd.grad(value, inputs)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, doubles), strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-6 * max(1.0, right.abs().max().item()))


def test_global_loss():
    assert_same_with_gradients(
        lambda image, text: losses.contrastive_loss(losses.cosine_logits(image, text, TEMP3)),
        slow_global,
        leaf(IMAGES, WIDTH),
        leaf(IMAGES, WIDTH),
    )


@pytest.mark.parametrize(("name", "slow"), [("gloria", slow_gloria), ("token", slow_token)])
def test_local_loss(name, slow, local, words, word_mask):
    assert_same_with_gradients(
        lambda regions, pieces: losses.local_loss(config(name), regions, pieces, word_mask), slow, local, words
    )


@pytest.mark.parametrize(
    ("name", "similarity"), [("gloria", slow_gloria_similarity), ("token", slow_token_similarity)]
)
def test_local_similarity_of_every_image_with_every_caption(name, similarity, local, words, word_mask):
    logits = losses.local_logits(config(name), local[:3], words, word_mask)
    expected = torch.tensor(slow_similarities(similarity, local.detach().double(), words.detach().double()))[:3]
    torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=1e-5)
    assert logits[:, 2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["gloria", "token"])
@pytest.mark.parametrize("elements", [1, 2 * IMAGES * WORDS * SIDE**2])
def test_images_are_read_in_chunks_of_bounded_size(name, elements, local, words, word_mask, monkeypatch):
    expected = losses.local_logits(config(name), local, words, word_mask)
    monkeypatch.setattr(word_regions_medmoe, "_CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(losses.local_logits(config(name), local, words, word_mask), expected)


@pytest.mark.parametrize("kept", [0, IMAGES * sum(WORDS_OF_CAPTION) * WIDTH, 2**24])
@pytest.mark.parametrize("elements", [1, 2 * sum(WORDS_OF_CAPTION) * SIDE**2])
def test_gloria_is_exact_however_it_is_cut(kept, elements, local, words, word_mask, monkeypatch):
    """Caption by caption or three images and one; kept for the backward pass: nothing, the contexts, all."""
    monkeypatch.setattr(word_regions_medmoe, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(word_regions_medmoe, "_SECTION_ELEMENTS", elements)
    monkeypatch.setattr(word_regions_medmoe, "_KEPT_ELEMENTS", kept)
    assert_same_with_gradients(
        lambda regions, pieces: losses.local_loss(config("gloria"), regions, pieces, word_mask),
        slow_gloria,
        local,
        words,
    )


@pytest.mark.parametrize("kept", [0, 2**24])
def test_products_in_bfloat16_stay_near(kept, local, words, word_mask, monkeypatch):
    """Factors of eight bits: the loss within 2 %, gradients within 5 % of their length; and float32 they are."""
    monkeypatch.setattr(word_regions_medmoe, "_KEPT_ELEMENTS", kept)
    found = {}
    for products in ("float32", "bfloat16"):
        settings = config("gloria")
        settings.local_loss_matmul_dtype = products
        loss = losses.local_loss(settings, local, words, word_mask)
        found[products] = loss, *torch.autograd.grad(loss, (local, words))
        assert all(tensor.dtype == torch.float32 for tensor in found[products])
    exact, rounded = found["float32"], found["bfloat16"]
    assert rounded[0].item() == pytest.approx(exact[0].item(), rel=0.02)
    assert rounded[0].item() != exact[0].item()
    for near, right in zip(rounded[1:], exact[1:], strict=True):
        assert (near - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize("frozen", ["regions", "words"])
def test_gloria_gives_gradients_only_where_they_are_wanted(frozen, local, words, word_mask):
    def gradients(regions, pieces):
        losses.local_loss(config("gloria"), regions, pieces, word_mask).backward()
        return regions.grad, pieces.grad

    both = gradients(*(tensor.detach().clone().requires_grad_() for tensor in (local, words)))
    given = [tensor.detach().clone() for tensor in (local, words)]
    trained = 0 if frozen == "words" else 1
    given[trained].requires_grad_()
    some = gradients(*given)
    assert some[1 - trained] is None
    torch.testing.assert_close(some[trained], both[trained])


def test_regions_of_zeros_have_no_direction_and_no_gradient(words, word_mask):
    """A dead expert: its map is zero everywhere."""
    regions = torch.zeros(IMAGES, WIDTH, SIDE, SIDE, requires_grad=True)
    loss = losses.local_loss(config("gloria"), regions, words, word_mask)
    for gradient in torch.autograd.grad(loss, (regions, words)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_sharp_attention_over_small_regions(size, local, words, word_mask, monkeypatch):
    monkeypatch.setitem(globals(), "TEMP1", 60.0)
    logits = losses.local_logits(config("gloria"), size * local, words, word_mask)
    expected = slow_similarities(slow_gloria_similarity, size * local.detach().double(), words.detach().double())
    torch.testing.assert_close(logits, torch.tensor(expected).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["gloria", "token"])
@pytest.mark.parametrize("count", [0, 1])
def test_captions_without_words_give_numbers_and_gradients(name, count, local, words):
    """Not one word in the batch, and one word in one caption."""
    mask = torch.zeros(IMAGES, WORDS, dtype=torch.bool)
    mask[0, :count] = True
    words = (words.detach() * mask.unsqueeze(-1)).requires_grad_()
    loss = losses.local_loss(config(name), local, words, mask)
    if count == 0:
        assert loss.item() == pytest.approx(2 * math.log(IMAGES) if name == "gloria" else 0)
    for gradient in torch.autograd.grad(loss, (local, words)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["gloria", "token"])
def test_slots_without_a_word_do_not_count(name, local, words, word_mask):
    def loss(pieces, mask):
        return losses.local_loss(config(name), local, pieces, mask)

    noise = torch.where(word_mask.unsqueeze(-1), words, torch.randn_like(words))
    wider = torch.cat([words, torch.zeros_like(words)], dim=1)
    assert loss(noise, word_mask).item() == pytest.approx(loss(words, word_mask).item(), rel=1e-6)
    wider_mask = torch.cat([word_mask, torch.zeros_like(word_mask)], dim=1)
    assert loss(wider, wider_mask).item() == pytest.approx(loss(words, word_mask).item(), rel=1e-6)


@pytest.mark.parametrize("labels", [(0, 5, 2, 2), (0, -100, 3, -100)])
def test_modality_loss(labels):
    labels = torch.tensor(labels)
    assert_same_with_gradients(
        lambda logits: losses.modality_loss(config("gloria"), logits, labels),
        lambda logits: slow_modality(logits, labels),
        leaf(IMAGES, EXPERTS),
    )


def test_modality_loss_of_unknown_modalities_is_zero_with_a_gradient_of_zero():
    logits = leaf(IMAGES, EXPERTS)
    loss = losses.modality_loss(config("gloria"), logits, torch.full((IMAGES,), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.tolist() == [[0.0] * EXPERTS] * IMAGES


@pytest.mark.parametrize("name", ["gloria", "token"])
def test_losses_are_float32_under_autocast_and_for_half_precision(name, local, words, word_mask):
    halves = local.detach().bfloat16(), words.detach().bfloat16()
    expected = losses.local_loss(config(name), *(half.float() for half in halves), word_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.local_loss(config(name), *halves, word_mask)
        embeds = halves[1].mean(dim=1)
        logits = losses.cosine_logits(embeds, embeds, TEMP3)
    assert loss.dtype == logits.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(logits, losses.cosine_logits(embeds.float(), embeds.float(), TEMP3))


def test_contrast_needs_a_caption_for_each_image():
    with pytest.raises(ValueError, match="got 2 images, 3 captions"):
        losses.contrastive_loss(torch.zeros(2, 3))


def test_both_directions_can_be_averaged(local, words, word_mask):
    logits = torch.randn(3, 3)
    both = losses.contrastive_loss(logits)
    assert losses.contrastive_loss(logits, "mean").item() == pytest.approx(both.item() / 2)
    averaged = config("gloria")
    averaged.contrast = "mean"
    expected = losses.local_loss(config("gloria"), local, words, word_mask) / 2
    torch.testing.assert_close(losses.local_loss(averaged, local, words, word_mask), expected)


def test_the_attention_grows_with_the_number_of_regions(local, words, word_mask):
    """So that the largest weight that a region can have stays that of 19x19 regions."""
    scaled = config("gloria")
    scaled.temp1_regions = 361
    for side in (7, 19, 56):
        temp1 = losses.region_temperature(scaled, side * side)
        assert math.exp(temp1) / side**2 == pytest.approx(math.exp(TEMP1) / 361)
    assert losses.region_temperature(config("gloria"), 49) == TEMP1
    found = losses.local_logits(scaled, local, words, word_mask)
    temp1 = TEMP1 + math.log(SIDE**2 / 361)
    torch.testing.assert_close(found, word_regions_medmoe.gloria_logits(local, words, word_mask, temp1, TEMP2, TEMP3))


def finely_pooled(maps, most):
    """Area means: each position is first repeated so often that regions consist of whole copies."""
    sides = [min(size, most) for size in maps.shape[2:]]
    for axis, side in enumerate(sides, start=2):
        maps = maps.repeat_interleave(side, dim=axis)
    return torch.nn.functional.avg_pool2d(maps, (maps.shape[2] // sides[0], maps.shape[3] // sides[1]))


@pytest.mark.parametrize(("size", "most"), [((6, 6), 3), ((5, 5), 3), ((7, 4), 5), ((9, 2), 4), ((4, 4), 1)])
@pytest.mark.parametrize("name", ["gloria", "token"])
def test_words_are_contrasted_with_pooled_regions(name, size, most, words, word_mask):
    pooled, whole = config(name), config(name)
    pooled.local_loss_regions = most
    pooled.temp1_regions = whole.temp1_regions = 361
    maps = leaf(IMAGES, WIDTH, *size)
    assert losses.contrasted_regions(pooled, maps).shape == (IMAGES, WIDTH, *(min(side, most) for side in size))

    def slow(regions, pieces):
        return losses.local_loss(whole, finely_pooled(regions, most), pieces, word_mask)

    assert_same_with_gradients(
        lambda regions, pieces: losses.local_loss(pooled, regions, pieces, word_mask), slow, maps, words
    )
    found = losses.local_logits(pooled, maps, words, word_mask)
    torch.testing.assert_close(found, losses.local_logits(whole, finely_pooled(maps, most), words, word_mask))


@pytest.mark.parametrize("most", [None, SIDE, SIDE + 1])
def test_maps_that_are_small_enough_are_not_pooled(most, local):
    settings = config("gloria")
    settings.local_loss_regions = most
    assert losses.contrasted_regions(settings, local) is local


def test_modality_loss_of_probabilities_is_a_second_softmax():
    """It falls no lower than 1.0436 for six experts (spec, row 3)."""
    double = config("gloria")
    double.aux_loss_on = "probabilities"
    logits, labels = torch.randn(3, EXPERTS), torch.tensor([1, -100, 4])
    rows = [softmax(softmax(list(logits[i]))) for i in (0, 2)]
    expected = -(rows[0][1].log() + rows[1][4].log()) / 2
    assert losses.modality_loss(double, logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    certain = 1000.0 * torch.eye(EXPERTS)
    assert losses.modality_loss(double, certain, torch.arange(EXPERTS)).item() == pytest.approx(1.0436, abs=1e-4)


def test_smoothed_labels():
    smooth = config("gloria")
    smooth.aux_label_smoothing = 0.1
    logits, labels = torch.randn(2, EXPERTS), torch.tensor([1, 4])
    logs = [[share.log() for share in softmax(list(row))] for row in logits]
    expected = sum(-0.9 * logs[i][int(labels[i])] - 0.1 * sum(logs[i]) / EXPERTS for i in range(2)) / 2
    assert losses.modality_loss(smooth, logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["gloria", "token"])
def test_which_regions_a_word_s_context_averages(name, local, words, word_mask):
    attention = losses.word_attention(config(name), local.flatten(2), words, word_mask)
    for caption in range(IMAGES):
        regions, own = regions_of(local, caption), words_of(words, caption)
        for i, word in enumerate(own):
            scores = [TEMP3 * dot(word, region) for region in regions]
            if name == "gloria":
                scores = [TEMP1 * softmax([dot(other, region) for other in own])[i] for region in regions]
            torch.testing.assert_close(attention[caption, i], torch.stack(softmax(scores)))
    assert not attention[~word_mask].any()


GROUPS = [
    (7, 2, 7),
    (4, 9, 4, -1, 9, 4, -1),
    (3,) * 5,
    (2**62, 5, 2**62, 2**62 - 1, -1, 5, 5, 0, -100, 0, 5),  # identifiers are hashes of 63 bits
]


@pytest.mark.parametrize("groups", GROUPS)
def test_global_loss_with_several_positives(groups):
    known = [max(group, -1) for group in groups]
    assert_same_with_gradients(
        lambda image, text: losses.contrastive_loss(
            losses.cosine_logits(image, text, TEMP3), targets=losses.group_targets(torch.tensor(groups))
        ),
        lambda image, text: slow_multi_positive_contrast(
            [[TEMP3 * cosine(one, other) for other in text] for one in image], shares_of(known)
        ),
        leaf(len(groups), WIDTH),
        leaf(len(groups), WIDTH),
    )


@pytest.mark.parametrize("groups", [(7, 7, 2, 7, 2), (-1, 7, -1, 7, 2)])
def test_gloria_loss_with_several_positives(groups):
    """Five pairs whose captions have 2, 1, 0, 3 and 1 words."""
    counts = [2, 1, 0, 3, 1]
    mask = torch.arange(3) < torch.tensor(counts).unsqueeze(1)
    targets = losses.group_targets(torch.tensor(groups))

    def fast(local, words):
        terms = losses.local_terms(config("gloria"), local, words, mask)
        return losses.contrastive_loss(terms, targets=targets)

    def slow(local, words):
        captions = [[words[caption, word] for word in range(count)] for caption, count in enumerate(counts)]
        logits = [[slow_gloria_similarity(regions_of(local, i), caption) for caption in captions] for i in range(5)]
        return slow_multi_positive_contrast(logits, shares_of(groups))

    words = (torch.randn(5, 3, WIDTH) * mask.unsqueeze(-1)).requires_grad_()
    assert_same_with_gradients(fast, slow, leaf(5, WIDTH, SIDE, SIDE, scale=0.7), words)


@pytest.mark.parametrize("contrast", ["sum", "mean"])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 131])
def test_where_all_groups_differ_the_loss_is_that_of_single_positives_bit_for_bit(size, contrast):
    groups = torch.randperm(size)
    groups[::3] = -1
    targets = losses.group_targets(groups)
    assert torch.equal(targets, torch.eye(size))
    for scale in (1, 80):
        logits = leaf(size, size, scale=scale)
        found, expected = losses.contrastive_loss(logits, contrast, targets), losses.contrastive_loss(logits, contrast)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_text_similarity_targets(temperature):
    """A softmax over the cosines of the texts, of which the contrast with them is a cross-entropy; no gradient."""
    texts = leaf(7, WIDTH)
    targets = losses.text_similarity_targets(texts, temperature)
    assert not targets.requires_grad
    doubles = texts.detach().double()
    expected = [softmax([cosine(one, other) / temperature for other in doubles]) for one in doubles]
    torch.testing.assert_close(
        targets.double(), torch.stack([torch.stack(row) for row in expected]), rtol=1e-5, atol=0
    )
    assert (targets - targets.t()).abs().max() > 1e-3  # the captions' direction has targets of its own
    assert_same_with_gradients(
        lambda logits: losses.contrastive_loss(logits, targets=targets),
        lambda logits: slow_multi_positive_contrast(logits, expected),
        leaf(7, 7, scale=5),
    )


def test_text_similarity_of_equal_texts_at_a_low_temperature_is_a_group():
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    texts = torch.randn(3, WIDTH)[groups]
    torch.testing.assert_close(losses.text_similarity_targets(texts, 0.01), losses.group_targets(groups))
    # Texts of no words have no direction: each is its own.
    targets = losses.text_similarity_targets(torch.zeros(3, WIDTH), 0.05)
    torch.testing.assert_close(targets, torch.eye(3), rtol=0, atol=1e-8)


def test_the_least_loss_is_the_entropy_of_the_targets():
    """Logits of -log P(i)'s share and no mass elsewhere: 2 (3/5 log 3 + 2/5 log 2)."""
    targets = losses.group_targets(torch.tensor([7, 7, 2, 7, 2]))
    loss = losses.contrastive_loss(100 * (targets > 0).float(), targets=targets)
    assert loss.item() == pytest.approx(2 * (0.6 * math.log(3) + 0.4 * math.log(2)), rel=1e-6)


def test_captions_of_equal_embeddings_have_the_loss_of_single_positives():
    """Then each of P(i) has the same column: what an image is told by one it is told by all."""
    groups = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    images, texts = leaf(7, WIDTH), leaf(4, WIDTH)

    def loss(targets):
        return losses.contrastive_loss(losses.cosine_logits(images, texts[groups], TEMP3), targets=targets)

    single, several = loss(None), loss(losses.group_targets(groups))
    assert several.item() == pytest.approx(single.item(), rel=1e-6)
    gradients = [torch.autograd.grad(value, (images, texts)) for value in (single, several)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
