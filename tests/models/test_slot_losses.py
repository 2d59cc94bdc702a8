"""Loss terms of slot autoencoders."""

import math

import pytest
import torch

from hf_dl.models.slot_losses import area_penalty, color_error, matching_error, mixture_error


def test_color_error_is_that_of_the_mean_colors():
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    attention = torch.rand(2, 3, 16, generator=draw, dtype=torch.float64).softmax(1)
    error = 0.0
    for b in range(2):
        cells = [
            image[b, :, 2 * (i // 4) : 2 * (i // 4) + 2, 2 * (i % 4) : 2 * (i % 4) + 2].mean((1, 2)) for i in range(16)
        ]
        means = [sum(attention[b, k, i] * cells[i] for i in range(16)) / attention[b, k].sum() for k in range(3)]
        for i in range(16):
            error += (cells[i] - sum(attention[b, k, i] * means[k] for k in range(3))).square().sum() / (2 * 16 * 3)
    torch.testing.assert_close(color_error(attention, image), error)


def test_a_partition_by_place_does_not_lower_the_color_error():
    draw = torch.Generator().manual_seed(0)
    image = torch.zeros(64, 3, 16, 16)
    owner = torch.zeros(64, 16, 16, dtype=torch.long)
    for b in range(64):
        x, y = torch.randint(0, 12, (2,), generator=draw).tolist()
        image[b, :, y : y + 4, x : x + 4] = 1.0
        owner[b, y : y + 4, x : x + 4] = 1
    by_object = torch.nn.functional.one_hot(owner, 2).float().flatten(1, 2).transpose(1, 2)
    by_place = torch.nn.functional.one_hot(torch.arange(256) % 16 // 8, 2).float().T.expand(64, -1, -1)
    uniform = torch.full((64, 2, 256), 0.5)
    assert color_error(by_object, image) < 1e-10
    assert color_error(by_place, image) > 0.9 * color_error(uniform, image)


def test_area_penalty_prefers_one_slot_to_two_and_is_finite_for_none():
    def penalty(*areas):
        return area_penalty(torch.tensor(areas).view(1, -1, 1, 1)).item()

    assert penalty(0.9, 0.1, 0.0) < penalty(0.9, 0.05, 0.05)
    assert penalty(1.0, 0.0, 0.0) == pytest.approx(0.02)
    masks = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    area_penalty(masks).backward()
    assert masks.grad.isfinite().all()


def test_matching_error_is_lowest_when_attention_equals_the_masks():
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, 4, 4, generator=draw).mul(3).softmax(1).requires_grad_()
    logits = masks.detach().log().flatten(2).requires_grad_()
    matching_error(logits.softmax(1), masks).backward()
    assert masks.grad is None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-6, rtol=0)


def test_matching_learns_nothing_from_pixels_that_two_slots_share():
    masks = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).view(1, 2, 1, 2).expand(1, 2, 2, 2)
    logits = torch.zeros(1, 2, 4).requires_grad_()
    error = matching_error(logits.softmax(1), masks)
    assert error.item() == pytest.approx(0.5 * math.log(2))  # half of the pixels count
    error.backward()
    assert logits.grad[0, 0].tolist() == pytest.approx([0.0, -0.125, 0.0, -0.125])


def test_mixture_error_is_the_likelihood_of_a_mixture_of_gaussians():
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 4, 4, generator=draw, dtype=torch.float64)
    contents = torch.rand(2, 3, 3, 4, 4, generator=draw, dtype=torch.float64)
    masks = torch.rand(2, 3, 4, 4, generator=draw, dtype=torch.float64).softmax(1)
    std = 0.3
    normal = torch.distributions.Normal(contents, std)
    each = normal.log_prob(image[:, None]).sum(2) + masks.log()
    best = torch.distributions.Normal(0.0, std).log_prob(torch.tensor(0.0, dtype=torch.float64)) * 3
    expected = -(each.logsumexp(1) - best).mean() * 2 * std**2 / 3
    torch.testing.assert_close(mixture_error(image, contents, masks, pixel_std=std), expected)
    one = mixture_error(image, contents[:, :1], torch.ones_like(masks[:, :1]), pixel_std=std)
    torch.testing.assert_close(one, (contents[:, 0] - image).square().mean())
