import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data import editing_tasks
from hf_dl.models import SlotAutoencoderModel, SlotEncoderModel, SlotUNetModel, make_autoencoder
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.pipelines.slot_edits import edited_region
from hf_dl.recipes import editing
from hf_dl.recipes.editing import EditFlags, EditRequest, Edits, SlotEditor, Slots, edit_slots, match_slots
from hf_dl.recipes.scene_images import to_pixel_values
from tests.recipes.test_slots import make_model

SIZE = 16

# DPMSolverMultistepScheduler makes arrays of tensors: pytorch/pytorch#136264
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def paint(squares):
    """An image of squares on black, and the mask of each square; a square has its corner, its side and its color."""
    image, masks = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(len(squares), SIZE, SIZE).bool()
    for mask, (x, y, side, color) in zip(masks, squares, strict=True):
        mask[y : y + side, x : x + side] = True
        image[:, mask] = torch.tensor(color, dtype=torch.uint8)[:, None]
    return image, masks


RED, BLUE, GREEN = (1, 1, 5, (200, 30, 30)), (9, 2, 6, (20, 40, 220)), (8, 9, 5, (30, 180, 60))
OBJECT = {"box": [1, 1, 6, 6], "color": "red", "shape": "cube", "edited": False}


def make_edits(kind):
    """Two edits without shadows: the blue square is removed, replaced by the green one, or the green one is added."""
    image, masks = paint([RED, BLUE])
    other, other_masks = paint([GREEN])
    truth, truth_masks = paint({"remove": [RED], "swap": [RED, GREEN], "insert": [RED, BLUE, GREEN]}[kind])
    mask = masks[1] if kind != "insert" else torch.zeros_like(masks[1])
    new = truth_masks[-1] if kind != "remove" else torch.zeros_like(mask)
    others = {} if kind == "remove" else {"other_images": other[None], "other_masks": other_masks}
    request = EditRequest(kind, image[None], mask[None], **others)
    return Edits(request, truth[None], new[None], [[OBJECT]])


def perfect_encode(pixel_values):
    """The slots are the pictures of the colors; slot 0 is the ground, and there are always four."""
    images = ((pixel_values + 1) * 127.5).round()
    slots, segments = torch.zeros(len(images), 4, images[0].numel()), torch.zeros(images[:, 0].shape, dtype=torch.long)
    for number, image in enumerate(images):
        flat = image.flatten(1).T
        for place, color in enumerate(sorted({tuple(c) for c in flat.tolist()})):
            mask = (image == torch.tensor(color).view(3, 1, 1)).all(0)
            slots[number, place] = (image * mask).flatten()
            segments[number][mask] = place
    return Slots(slots, torch.ones(slots.shape[:2], dtype=torch.bool), segments)


def perfect_draw(slots, keep):
    return (slots * keep[:, :, None]).sum(1).view(-1, 3, SIZE, SIZE) / 255


class TestSlotEditor:
    @pytest.mark.parametrize("kind", editing_tasks.KINDS)
    def test_a_perfect_model_succeeds(self, kind):
        edits = make_edits(kind)
        scores, edited = editing.evaluate(SlotEditor(perfect_encode, perfect_draw, "cpu"), edits)
        assert torch.equal(edited, edits.truths)
        assert scores["success"] == 1 and scores["change_error"] == 0

    def test_many_edits_are_split_into_batches(self, monkeypatch):
        monkeypatch.setattr(editing, "BATCH_SIZE", 2)
        image, masks = paint([RED, BLUE])
        other, other_masks = paint([GREEN])
        request = EditRequest("swap", image.expand(5, -1, -1, -1), masks[[0, 1, 0, 1, 0]], *[None] * 2)
        others = {"other_images": other.expand(5, -1, -1, -1), "other_masks": other_masks.expand(5, -1, -1)}
        request = EditRequest("swap", request.images, request.masks, **others)
        edited = (SlotEditor(perfect_encode, perfect_draw, "cpu")(request) * 255).round().byte()
        expected = [paint([kept, GREEN])[0] for kept in (BLUE, RED, BLUE, RED, BLUE)]
        assert torch.equal(edited, torch.stack(expected))

    def test_the_slots_of_each_kind(self):
        slots, used = torch.arange(2 * 3).view(2, 3, 1), torch.tensor([[True, True, True], [True, False, True]])
        mine, chosen, new = Slots(slots, used, torch.empty(0)), torch.tensor([2, 0]), torch.tensor([[11], [14]])
        edited, keep = edit_slots("remove", mine, chosen)
        assert torch.equal(edited, slots) and keep.tolist() == [[True, True, False], [False, False, True]]
        edited, keep = edit_slots("swap", mine, chosen, new)
        assert edited[:, :, 0].tolist() == [[0, 1, 11], [14, 4, 5]] and torch.equal(keep, used)
        edited, keep = edit_slots("insert", mine, chosen, new)
        assert edited[:, :, 0].tolist() == [[0, 1, 2, 11], [3, 4, 5, 14]]
        assert keep.tolist() == [[True, True, True, True], [True, False, True, True]]
        assert slots.flatten().tolist() == list(range(6)) and used.sum() == 5  # unchanged
        last = Slots(slots[:, :1], used[:, :1], torch.empty(0))
        assert edit_slots("remove", last, torch.zeros(2).long())[1].all()  # the last slot stays

    def test_the_slot_with_the_highest_iou(self):
        segments = torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 2]], [[3, 3, 1, 1], [3, 3, 1, 1]]])
        masks = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 0, 0]]]).bool()
        # IoU of image 0: 2/8, 2/5, 1/5, 0; of image 1: 0, 2/8, 0, 4/6
        assert match_slots(segments, masks, 4).tolist() == [1, 3]


def test_the_broadcast_editor_decodes_the_other_slots():
    model = make_model(size=SIZE).eval()
    model.config.prune_error = -1e9  # no slot is spare
    request = make_edits("swap").request
    with torch.no_grad():
        output, other = (model(to_pixel_values(x)) for x in (request.images, request.other_images))
        segments = model.posterior(to_pixel_values(request.images), output).argmax(1)[0]
        other_segments = model.posterior(to_pixel_values(request.other_images), other).argmax(1)[0]

    def iou(segments, mask, slot):
        return ((segments == slot) & mask).sum() / ((segments == slot) | mask).sum()

    mine = max(range(4), key=lambda slot: iou(segments, request.masks[0], slot))
    theirs = max(range(4), key=lambda slot: iou(other_segments, request.other_masks[0], slot))
    slots = output.slots.clone()
    slots[0, mine] = other.slots[0, theirs]
    assert output.keep.all()
    torch.testing.assert_close(editing.broadcast_editor(model)(request), model.decode(slots, keep=output.keep))
    removed = editing.broadcast_editor(model)(EditRequest("remove", request.images, request.masks))
    keep = output.keep & (torch.arange(4)[None] != mine)
    torch.testing.assert_close(removed, model.decode(output.slots, keep=keep))


def make_pipeline(kind=SlotEncoderModel, *, size=SIZE):
    torch.manual_seed(0)
    encoder = kind(make_model(size=size).config)
    unet = SlotUNetModel(
        sample_size=size // 4, block_out_channels=(8, 8), layers_per_block=1, attention_resolutions=(),
        attention_head_dim=4, cross_attention_dim=encoder.config.slot_dim, norm_num_groups=4,
    )  # fmt: skip
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3}
    autoencoder = make_autoencoder("small", sample_size=size, **small)
    return SlotDiffusionPipeline(encoder, unet, autoencoder, noise_schedule())


@pytest.mark.parametrize("kind", editing_tasks.KINDS)
def test_the_diffusion_editor_is_the_edit_of_the_pipeline(kind):
    pipe, request = make_pipeline(), make_edits(kind).request
    edited = editing.diffusion_editor(pipe, num_inference_steps=2, seed=3)(request)
    pixel_values = to_pixel_values(request.images)
    mine = match_slots(torch.stack(pipe.segment(pixel_values)), request.masks, 4).item()
    options = {"remove": [mine]}
    if kind != "remove":
        other = to_pixel_values(request.other_images)
        theirs = match_slots(torch.stack(pipe.segment(other)), request.other_masks, 4).item()
        options = {"other": other} | ({"swap": {mine: theirs}} if kind == "swap" else {"add": [theirs]})
    generator = torch.Generator().manual_seed(3)
    output = pipe.edit(pixel_values, **options, generator=generator, num_inference_steps=2, output_type="pt")
    torch.testing.assert_close(edited, output.images, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", editing_tasks.KINDS)
def test_a_blended_edit_draws_near_the_edited_slots_only(kind):
    """The region has the masks of the slot before and after the edit; see `edited_region`."""
    edits, given = make_edits(kind), []

    def draw(slots, keep, background, region):
        given.append((background, region))
        return perfect_draw(slots, keep)

    def masks(slots, keep):
        return (slots.view(*slots.shape[:2], 3, SIZE, SIZE).amax(2) > 0).float() * keep[:, :, None, None]

    edited = SlotEditor(perfect_encode, draw, "cpu", masks)(edits.request)
    assert edited.shape == edits.truths.shape
    ((background, region),) = given
    assert background.equal(to_pixel_values(edits.request.images))
    expected = edited_region(edits.request.masks.float()) | edited_region(edits.truth_masks.float())
    assert region.equal(expected) and not region.all()


def test_the_blended_diffusion_editor_keeps_the_input_outside():
    pipe, request = make_pipeline(SlotAutoencoderModel), make_edits("remove").request
    edited = editing.diffusion_editor(pipe, num_inference_steps=2, seed=3, blend=True)(request)
    same = (edited - request.images / 255).abs().amax(1) < 1e-5
    assert same.any()
    free = editing.diffusion_editor(pipe, num_inference_steps=2, seed=3)(request)
    assert ((free - request.images / 255).abs().amax(1) > 1e-5).all()
    with pytest.raises(ValueError, match="diffusion_blended needs the masks of a slot autoencoder"):
        editing.diffusion_editor(make_pipeline(), blend=True)


class TestEvaluate:
    def test_the_copy_fails_and_the_truth_succeeds(self):
        for kind in editing_tasks.KINDS:
            copy, images = editing.evaluate(editing.METHODS["copy"](None), make_edits(kind))
            truth, _ = editing.evaluate(editing.METHODS["truth"](None), make_edits(kind))
            assert (copy["success"], copy["change_error"], truth["success"]) == (0, 1, 1)
            assert torch.equal(images, make_edits(kind).request.images)

    def test_with_a_probe(self):
        def probe(images, boxes):
            return {"color": ["red"], "shape": ["cone"]}

        scores, _ = editing.evaluate(editing.copy_images, make_edits("remove"), probe=probe)
        assert (scores["kept_color"], scores["kept_shape"], scores["kept_objects"]) == (1, 0, 1)

    def test_images_of_another_shape(self):
        with pytest.raises(ValueError, match=r"returned images of shape \(1, 3, 8, 16\). Expected \(1, 3, 16, 16\)"):
            editing.evaluate(lambda request: request.images[:, :, :8], make_edits("remove"))

    def test_the_mean_over_the_kinds(self):
        scores = {
            "remove": {"success": 1.0, "kept_color": 0.5, "edits": 5.0, "kept_objects": 3.0},
            "swap": {"success": 0.5, "kept_color": 1.0, "new_color": 0.25, "edits": 4.0, "kept_objects": 3.0},
        }
        joined = editing.summarize(scores)
        assert joined == {
            "remove_success": 1, "remove_kept_color": 0.5, "remove_edits": 5, "remove_kept_objects": 3,
            "swap_success": 0.5, "swap_kept_color": 1, "swap_new_color": 0.25, "swap_edits": 4, "swap_kept_objects": 3,
            "success": 0.75, "kept_color": 0.75, "new_color": 0.25,
        }  # fmt: skip

    def test_an_unknown_method(self):
        with pytest.raises(ValueError, match="methods='gan' is unknown. Choose from: truth, copy, broadcast, diff"):
            editing.EditorFlags(methods=["copy", "gan"])


def test_the_edits_of_the_flags():
    flags = EditFlags(style="textured", image_size=32, num_test=5)
    data = editing_tasks.load("test", kind="swap", style="textured", size=32, num_scenes=5)
    edits = editing.load_edits(flags, "swap")
    assert len(edits.truths) == len(data) and edits.request.kind == "swap"
    for number, row in enumerate(data):
        pairs = {
            "image": edits.request.images, "other_image": edits.request.other_images, "truth": edits.truths,
            "mask": edits.request.masks, "other_mask": edits.request.other_masks, "truth_mask": edits.truth_masks,
        }  # fmt: skip
        for column, tensor in pairs.items():
            assert np.array_equal(np.asarray(row[column]), tensor[number].movedim(0, -1 if tensor.ndim == 4 else 0))
        assert edits.objects[number] == row["objects"]
    assert editing.load_edits(flags, "remove").request.other_images is None


def test_the_picture_marks_success(tmp_path):
    edits = {kind: make_edits(kind) for kind in ("remove", "swap")}
    copies = [each.request.images for each in edits.values()]
    truths = [each.truths for each in edits.values()]
    path = editing.draw_edits(edits, {"copy": copies, "truth": truths}, tmp_path / "edits.png")
    with Image.open(path) as picture:
        pixels = {tuple(color) for color in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
    assert set(editing.MARKS.values()) <= pixels
    assert not math.isclose(*(sum(color) for color in editing.MARKS.values()))
