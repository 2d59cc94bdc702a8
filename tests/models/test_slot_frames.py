"""Frames of slots: their definition, where they start, what attention, readout and canvas make of them."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_dl.models import SlotAutoencoderConfig, SlotAutoencoderModel
from hf_dl.models.layers_frame_attention import FrameSlotAttention
from hf_dl.models.slot_decoders import CanvasDecoder
from hf_dl.models.slot_frames import (
    CANDIDATES,
    MIN_SIZE,
    SEEDS,
    FrameReadout,
    attention_frames,
    color_seeds,
    draw_seeds,
)


def scene(places, size=64, side=6):
    """Squares of different colors with the given corners (x, y) on gray."""
    image = torch.zeros(1, 3, size, size)
    for number, (x, y) in enumerate(places):
        color = torch.tensor([1.0 if number & 1 else -1.0, 1.0 if number & 2 else -1.0, 0.8])
        image[0, :, y : y + side, x : x + side] = color[:, None, None]
    return image


def test_frames_are_mean_and_deviation_of_the_attention():
    attention = torch.rand(2, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = attention_frames(attention, epsilon=0.0)
    for image in range(2):
        for slot in range(3):
            weights = attention[image, slot] / attention[image, slot].sum()
            x = sum(weights[i].item() * ((i % 8) + 0.5) / 8 for i in range(64))
            y = sum(weights[i].item() * ((i // 8) + 0.5) / 8 for i in range(64))
            spread = sum(
                weights[i].item() * ((((i % 8) + 0.5) / 8 - x) ** 2 + (((i // 8) + 0.5) / 8 - y) ** 2)
                for i in range(64)
            )
            expected = [x, y, math.sqrt(spread / 2 + MIN_SIZE**2)]
            torch.testing.assert_close(frames[image, slot], torch.tensor(expected, dtype=torch.float64))


def test_an_empty_slot_has_a_frame():
    assert attention_frames(torch.zeros(1, 1, 16)).isfinite().all()
    with pytest.raises(ValueError, match="15 tokens"):
        attention_frames(torch.ones(1, 1, 15))


def test_color_seeds_start_on_different_objects():
    places = [(4, 8), (40, 12), (20, 44), (50, 50)]
    frames = draw_seeds("color", scene(places), 5, generator=torch.Generator().manual_seed(0))[0]
    assert frames[0].tolist() == pytest.approx([0.5, 0.5, 0.5])
    found = set()
    for x, y, _ in (frames[1:] * 64).tolist():
        found |= {i for i, (left, top) in enumerate(places) if abs(x - left - 3) < 6 and abs(y - top - 3) < 6}
    assert found == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", SEEDS)
def test_seeds_do_not_depend_on_the_batch(kind):
    images = torch.cat([scene([(4, 8), (40, 12)]), scene([(30, 30), (10, 50)]), torch.zeros(1, 3, 64, 64)])
    noise = torch.rand(4, CANDIDATES, generator=torch.Generator().manual_seed(0))
    frames = draw_seeds(kind, images, 4, noise=noise)
    assert torch.equal(draw_seeds(kind, images[1:2], 4, noise=noise)[0], frames[1])
    assert frames.shape == (3, 4, 3) and frames.isfinite().all() and (frames > 0).all() and (frames < 1).all()


def test_a_plain_image_has_seeds():
    noise = torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(0))
    assert color_seeds(torch.full((1, 3, 32, 32), 0.3), 3, noise).isfinite().all()


def test_logits_of_places_follow_the_formula():
    torch.manual_seed(0)
    layer = FrameSlotAttention(6, 5, mlp_dim=8).double()
    torch.nn.init.normal_(layer.place_weights.weight)
    slots, frames = torch.randn(1, 2, 5, dtype=torch.float64), torch.rand(1, 2, 3, dtype=torch.float64) * 0.5 + 0.1
    logits = layer._place_logits(slots, frames, 16)
    weights = layer.place_weights(layer.norm_slots(slots))[0]
    for k in range(2):
        x, y, size = frames[0, k].tolist()
        for i in range(16):
            dx, dy = (i % 4 + 0.5) / 4 - x, (i // 4 + 0.5) / 4 - y
            square = dx * dx + dy * dy
            terms = [
                -math.log(1 + square / (2 * size**2)),
                -math.log(1 + square / 0.02),
                dx / size / math.sqrt(1 + (dx / size) ** 2),
                dy / size / math.sqrt(1 + (dy / size) ** 2),
            ]
            expected = sum(w * term for w, term in zip(weights[k].tolist(), terms, strict=True))
            assert logits[0, k, i].item() == pytest.approx(expected)


def test_attention_follows_slots_that_move_with_the_image():
    torch.manual_seed(0)
    layer = FrameSlotAttention(6, 5, mlp_dim=8).double()
    torch.nn.init.constant_(layer.place_weights.bias, 4.0)
    tokens = torch.randn(1, 1, 6, dtype=torch.float64).repeat(1, 256, 1)  # equal everywhere: only places differ
    slots = torch.randn(1, 2, 5, dtype=torch.float64)
    frames = torch.tensor([[[0.3, 0.3, 0.05], [0.4, 0.45, 0.05]]], dtype=torch.float64)
    _, (here,) = layer(tokens, torch.cat([slots, frames], -1), num_iterations=1)
    moved = frames + torch.tensor([0.25, 0.125, 0.0])
    _, (there,) = layer(tokens, torch.cat([slots, moved], -1), num_iterations=1)
    here, there = here.view(1, 2, 16, 16), there.view(1, 2, 16, 16)
    torch.testing.assert_close(there[:, :, 2:, 4:], here[:, :, :-2, :-4])


def test_readout_keeps_frames_and_new_slots_prefer_near_tokens():
    torch.manual_seed(0)
    model = SlotAutoencoderModel(SlotAutoencoderConfig(image_size=32))
    assert model.slot_attention.place_weights.bias.tolist() == [3.0, 0.0, 0.0, 0.0]
    tokens, slots = torch.randn(2, 64, 64), torch.rand(2, 5, 64)
    read = model.frame_readout(tokens, slots, torch.rand(2, 5, 64).softmax(1))
    assert torch.equal(read[..., -3:], slots[..., -3:]) and not torch.equal(read[..., :-3], slots[..., :-3])


def test_readout_is_the_weighted_mean_of_the_features():
    torch.manual_seed(0)
    readout = FrameReadout(6, 5, hidden_dim=7).double()
    tokens, slots = torch.randn(1, 16, 6, dtype=torch.float64), torch.rand(1, 2, 8, dtype=torch.float64) + 0.1
    attention = torch.rand(1, 2, 16, dtype=torch.float64)
    found = readout(tokens, slots, attention)
    for k in range(2):
        x, y, size = slots[0, k, -3:].tolist()
        total = torch.zeros(7, dtype=torch.float64)
        for i in range(16):
            place = [((i % 4 + 0.5) / 4 - x) / (2.5 * size), ((i // 4 + 0.5) / 4 - y) / (2.5 * size)]
            waves = [f(o * math.pi * p) for o in (0.5, 1.0) for f in (math.sin, math.cos) for p in place]
            place = torch.tensor([*place, *waves], dtype=torch.float64)
            hidden = readout.from_token(readout.norm(tokens[0, i])) + readout.from_place(place)
            total = total + attention[0, k, i] / attention[0, k].sum() * hidden.relu()
        torch.testing.assert_close(found[0, k, :5], slots[0, k, :5] + readout.to_slot(total))


def test_the_canvas_is_pasted_as_grid_sample_does():
    torch.manual_seed(0)
    config = SlotAutoencoderConfig(image_size=32, canvas_size=16, decoder_channels=(8, 4), slot_dim=9)
    decoder = CanvasDecoder(config).double()
    slots = torch.randn(3, 9, dtype=torch.float64)
    slots[:, -3:] = torch.tensor([[0.5, 0.5, 0.2], [0.2, 0.7, 0.1], [0.9, 0.1, 0.5]], dtype=torch.float64)
    painted = decoder(slots)
    canvas = F.pixel_shuffle(decoder.canvas(slots[:, :-3]), decoder.cell)
    pixels = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    for k, (x, y, size) in enumerate(slots[:, -3:].tolist()):
        grid = torch.stack(torch.meshgrid((pixels - x) / (2.5 * size), (pixels - y) / (2.5 * size), indexing="xy"), -1)
        expected = F.grid_sample(canvas[k][None], grid[None], padding_mode="border", align_corners=False)[0]
        depth = slots[k, :-3] @ decoder.depth.weight[0]
        expected[3] += depth - 20 * (grid.abs() - 1).clamp_min(0).sum(-1)
        torch.testing.assert_close(painted[k], expected)


def test_a_slot_that_paints_no_structure_can_still_learn_its_alphas():
    torch.manual_seed(0)
    decoder = CanvasDecoder(SlotAutoencoderConfig(image_size=32, canvas_size=16, decoder_channels=(8, 4), slot_dim=9))
    with torch.no_grad():
        decoder.canvas.from_slot.bias.fill_(-100.0)  # with ReLU, all units would be 0
    slots = torch.randn(1, 9)
    slots[:, -3:] = torch.tensor([0.5, 0.5, 0.2])
    decoder(slots)[:, 3].sum().backward()
    for name in ("canvas.from_slot.weight", "canvas.layers.1.weight", "depth.weight"):
        assert decoder.get_parameter(name).grad.abs().sum() > 0, name


def test_moving_a_frame_moves_what_the_slot_paints():
    torch.manual_seed(0)
    model = SlotAutoencoderModel(SlotAutoencoderConfig(image_size=32, canvas_size=16)).eval()
    slots = torch.randn(1, 1, 64)
    slots[..., -3:] = torch.tensor([0.4, 0.4, 0.08])
    moved = slots.clone()
    moved[..., -3] += 4 / 32
    here, there = model.decoder(slots[0]), model.decoder(moved[0])
    torch.testing.assert_close(there[:, :, :, 4:], here[:, :, :, :-4], atol=1e-4, rtol=1e-4)
