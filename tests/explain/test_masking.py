import json
import math

import pytest
import torch

from hf_dl.explain import (
    WAYS,
    center_patches,
    curve,
    fill_patches,
    masked_logits,
    masking_report,
    random_patches,
    ranked_patches,
)
from tests.explain.tiny import PREFIX, VITS, make_convnet, make_images, make_vit

CLS_READERS = ("vit", "deit", "small_vit")  # the head of Dinov2 also averages the patches


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- which patches


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (3, 6), (14, 14)])
def test_every_choice_takes_the_number_asked_for(grid):
    for count in range(grid[0] * grid[1] + 1):
        assert center_patches(grid, count).sum() == count
        assert random_patches(grid, count, generator=draw()).sum() == count
        assert ranked_patches(torch.rand(2, *grid), count).sum((1, 2)).tolist() == [count] * 2


def test_the_center_is_a_block():
    for side, grid in ((2, 4), (3, 5), (6, 14), (4, 14)):
        start = (grid - side) // 2
        expected = torch.zeros(grid, grid, dtype=torch.bool)
        expected[start : start + side, start : start + side] = True
        assert torch.equal(center_patches((grid, grid), side * side), expected)


def test_random_patches_are_uniform_seeded_and_nested():
    share = torch.stack([random_patches((3, 4), 4, generator=draw(seed)) for seed in range(3000)]).float().mean(0)
    assert (share - 1 / 3).abs().max() < 0.04
    few, many = (random_patches((5, 5), count, generator=draw(3)) for count in (6, 11))
    assert torch.equal(few & many, few) and torch.equal(few, random_patches((5, 5), 6, generator=draw(3)))


def test_ranked_patches():
    maps = torch.tensor([[[0.1, 0.9], [0.5, 0.2]]])
    assert ranked_patches(maps, 2).tolist() == [[[False, True], [True, False]]]
    assert ranked_patches(maps, 1, largest=False).tolist() == [[[True, False], [False, False]]]
    with pytest.raises(ValueError, match="count=5 must be from 0 to 4, the number of patches of a \\(2, 2\\) grid"):
        ranked_patches(maps, 5)


# ------------------------------------------------------------------------------------------------ how they are taken


def test_fills():
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    images = make_images(2, 8, 12)
    masks = torch.zeros(2, 2, 3, dtype=torch.bool)
    masks[0, 1, 2] = masks[1, 0, 0] = True
    per_channel = [torch.tensor(x)[:, None, None] for x in (mean, std)]
    found = {}
    for fill in ("black", "gray", "mean", "blur", "noise"):
        found[fill] = fill_patches(images, masks, fill, image_mean=mean, image_std=std, generator=draw())
        outside = torch.ones(2, 3, 8, 12, dtype=torch.bool)
        outside[0, :, 4:, 8:] = outside[1, :, :4, :4] = False
        assert torch.equal(found[fill][outside], images[outside])
        assert not torch.isclose(found[fill], images)[~outside].any()
    pixels = {fill: image * per_channel[1] + per_channel[0] for fill, image in found.items()}
    torch.testing.assert_close(pixels["black"][0, :, 4:, 8:], torch.zeros(3, 4, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(pixels["gray"][1, :, :4, :4], torch.full((3, 4, 4), 0.5))
    expected = images[0].mean((1, 2))[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(found["mean"][0, :, 4:, 8:], expected)
    noise = pixels["noise"][0, :, 4:, 8:]
    assert noise.min() > -1e-6 and noise.max() < 1 + 1e-6 and noise.std() > 0.2
    assert found["blur"][0, :, 4:, 8:].std() < 0.5 * images[0, :, 4:, 8:].std()
    assert torch.equal(fill_patches(images, masks[0], "gray")[1, :, 4:, 8:], torch.zeros(3, 4, 4))


@pytest.mark.parametrize("size", [(16, 16), (12, 24)])
@pytest.mark.parametrize("kind", CLS_READERS)
def test_masking_the_attention_is_dropping_the_tokens(kind, size):
    model, images = make_vit(kind), make_images(3, *size)
    grid = (size[0] // 4, size[1] // 4)
    masks = torch.stack([random_patches(grid, 7, generator=draw(seed)) for seed in range(3)])
    by_attention = masked_logits(model, images, masks, by="attention")
    by_tokens = masked_logits(model, images, masks, by="tokens")
    torch.testing.assert_close(by_attention, by_tokens, rtol=1e-6, atol=1e-6 * by_tokens.abs().max().item())
    none = masked_logits(model, images, torch.zeros_like(masks), by="attention")
    assert not torch.allclose(none, by_tokens, rtol=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", VITS)
def test_masking_the_attention_is_the_model_s_own_mask(kind, attention):
    model, images = make_vit(kind, attention=attention), make_images()
    masks = torch.stack([random_patches((4, 4), 5, generator=draw(seed)) for seed in range(2)])
    keep = torch.cat([torch.ones(2, PREFIX[kind], dtype=torch.bool), ~masks.flatten(1)], dim=1)
    expected = model(images, attention_mask=keep).logits
    torch.testing.assert_close(masked_logits(model, images, masks, by="attention"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(images).logits, expected, rtol=1e-2)


@pytest.mark.parametrize("kind", VITS)
def test_a_patch_that_is_not_there_cannot_matter(kind):
    model, images = make_vit(kind), make_images()
    masks = center_patches((4, 4), 4)
    changed = fill_patches(images, masks, "noise", generator=draw())
    for by in ("tokens", *(["attention"] if kind in CLS_READERS else [])):
        one, other = (masked_logits(model, x, masks, by=by) for x in (images, changed))
        torch.testing.assert_close(one, other)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_fill_is_what_the_model_says_of_the_painted_image():
    model, images = make_convnet(), make_images()
    masks = center_patches((4, 4), 4)
    expected = model(fill_patches(images, masks, "black"))
    torch.testing.assert_close(masked_logits(model, images, masks, by="black"), expected)


def test_calls_that_do_not_fit_are_refused():
    vit, images = make_vit("vit"), make_images()
    uneven = torch.zeros(2, 4, 4, dtype=torch.bool)
    uneven[0, 0, 0] = True
    with pytest.raises(ValueError, match="masks remove \\[1, 0\\] patches. Expected the same number for all images"):
        masked_logits(vit, images, uneven, by="tokens")
    with pytest.raises(ValueError, match="by='white' is unknown; choose one of black, gray"):
        masked_logits(vit, images, uneven, by="white")
    with pytest.raises(ValueError, match="masks has shape \\(2, 4, 5\\). Expected the grid of patches, \\(4, 4\\)"):
        masked_logits(vit, images, torch.zeros(2, 4, 5, dtype=torch.bool), by="attention")
    with pytest.raises(ValueError, match="generator=None is not supported with fill='noise'"):
        masked_logits(vit, images, uneven, by="noise")
    with pytest.raises(ValueError, match="fill='white' is unknown"):
        fill_patches(images, uneven, "white")
    with pytest.raises(ValueError, match="model=ConvNet has no supported attention"):
        masked_logits(make_convnet(), images, uneven, by="attention")


# -------------------------------------------------------------------------------------------------------- the report


def test_the_report_counts_what_the_masked_model_says():
    model, images = make_vit("vit"), make_images()
    model.config.id2label = dict(enumerate(["cat", "dog", "crossword", "cone", "ball"]))
    report = masking_report(model, images, counts=(2, 9), seeds=4, ways=WAYS, batch_size=3)
    assert json.loads(json.dumps(report)) == report
    before = model(images).logits.double().softmax(-1)
    labels = before.argmax(-1)
    for image in range(2):
        assert report["original"][image]["label"] == model.config.id2label[int(labels[image])]
        assert report["original"][image]["probability"] == pytest.approx(before[image].max().item(), rel=1e-5)
    # 2 images, 2 counts; 4 seeds for random, 1 for the other places, and 4 for all of them with noise
    assert len(report["trials"]) == 2 * 2 * (6 * (4 + 3) + 4 * 4)
    trial = next(t for t in report["trials"] if t["way"] == "black" and t["place"] == "center" and t["image"] == 1)
    after = masked_logits(model, images[1:], center_patches((4, 4), 2), by="black")[0].double().softmax(-1)
    label = int(labels[1])
    assert trial["probability"] == pytest.approx(after[label].item(), rel=1e-4)
    assert trial["label"] == model.config.id2label[int(after.argmax())]
    assert trial["rank"] == sorted(after.tolist(), reverse=True).index(after[label].item()) + 1
    kl = sum(p * math.log(p / q) for p, q in zip(before[1].tolist(), after.tolist(), strict=True))
    assert trial["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    for cell in report["summary"]:
        own = [t for t in report["trials"] if all(t[key] == cell[key] for key in ("way", "place", "count"))]
        assert cell["trials"] == len(own) == sum(cell["became"].values())
        assert cell["changed"] == pytest.approx(sum(t["rank"] > 1 for t in own) / len(own))
        assert cell["probability"] == pytest.approx(sum(t["probability"] for t in own) / len(own))


def test_the_report_is_paired_and_repeatable():
    model, images = make_vit("small_vit"), make_images(1)
    report = masking_report(model, images, counts=(5,), seeds=3, places=("random",), ways=("attention", "tokens"))
    by = {way: [t["kl"] for t in report["trials"] if t["way"] == way] for way in ("attention", "tokens")}
    assert by["attention"] == pytest.approx(by["tokens"], rel=1e-3) and len(set(by["tokens"])) == 3
    options = {"counts": (5,), "seeds": 3, "ways": ("noise",)}
    one, other = (masking_report(model, images, **options, batch_size=size) for size in (1, 7))
    for a, b in zip(one["trials"], other["trials"], strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3) and a["seed"] == b["seed"]


def test_top_and_bottom_follow_the_maps_that_are_given():
    model, images = make_convnet(), make_images(1)
    maps = torch.arange(16.0).view(1, 4, 4)
    report = masking_report(model, images, counts=(4,), places=("top", "bottom"), ways=("gray",), maps=maps)
    probability = {t["place"]: t["probability"] for t in report["trials"]}
    label = model(images).argmax(-1).item()
    for place, row in (("top", slice(12, 16)), ("bottom", slice(0, 4))):
        painted = images.clone()
        painted[:, :, row] = 0
        assert probability[place] == pytest.approx(model(painted).softmax(-1)[0, label].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"places": ("left",)}, "places='left' is unknown; choose one of center, random, top, bottom"),
        ({"ways": ("cut",)}, "ways='cut' is unknown; choose one of black"),
        ({"counts": (17,)}, "count=17 must be from 0 to 16"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
    ],
)
def test_reports_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        masking_report(make_vit("vit"), make_images(), **{"counts": (2,), **options})


# --------------------------------------------------------------------------------------------------------- the curves


class Brightness(torch.nn.Module):
    """The logit of class 1 is the sum of the first channel over the left half."""

    def forward(self, x):
        score = x[:, 0, :, : x.shape[-1] // 2].sum((1, 2))
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_curves_of_a_model_that_can_be_worked_out():
    images = torch.full((1, 3, 4, 4), 0.25)
    maps = torch.zeros(1, 4, 4)
    maps[..., :2] = 1  # a correct map: only the left half counts
    right = maps.flip(-1)
    good = curve(Brightness(), images, maps, steps=4, fill="gray", classes=1)  # gray is 0
    torch.testing.assert_close(good.fractions, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    expected = torch.sigmoid(torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(good.probabilities, expected)
    p = expected[0].tolist()
    area = sum((p[i] + p[i + 1]) / 2 * 0.25 for i in range(4))
    assert good.area.item() == pytest.approx(area)
    bad = curve(Brightness(), images, right, steps=4, fill="gray", classes=1)
    assert bad.area > good.area
    inserted = curve(Brightness(), images, maps, mode="insertion", steps=4, fill="gray", classes=1)
    torch.testing.assert_close(inserted.probabilities, expected.flip(1).sort(1).values[:, [0, 3, 4, 4, 4]])


def test_curves_end_in_the_image_and_in_nothing():
    model, images = make_convnet(), make_images(3)
    maps = torch.rand(3, 16, 16, generator=draw())
    found = curve(model, images, maps, steps=7, batch_size=2)
    whole, nothing = (model(x).softmax(-1) for x in (images, torch.zeros_like(images)))
    picked = whole.argmax(-1)
    assert torch.equal(found.classes, picked)
    torch.testing.assert_close(found.probabilities[:, 0], whole.gather(1, picked[:, None])[:, 0])
    torch.testing.assert_close(found.probabilities[:, -1], nothing.gather(1, picked[:, None])[:, 0])
    inserted = curve(model, images, maps, mode="insertion", steps=7)
    torch.testing.assert_close(inserted.probabilities[:, -1], found.probabilities[:, 0])


def test_curves_that_cannot_be_are_refused():
    model, images = make_convnet(), make_images()
    with pytest.raises(ValueError, match="mode='erase' is unknown; choose one of deletion, insertion"):
        curve(model, images, torch.rand(2, 16, 16), mode="erase")
    with pytest.raises(
        ValueError, match="maps has shape \\(2, 4, 4\\). Expected the size of the images, \\(2, 16, 16\\)"
    ):
        curve(model, images, torch.rand(2, 4, 4))
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        curve(model, images, torch.rand(2, 16, 16), steps=0)
