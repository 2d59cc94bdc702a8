import threading

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from hf_dl.demo.decoders import MAX_FRAMES, Broadcast, Diffusion
from hf_dl.demo.pictures import SIDE, to_picture
from hf_dl.demo.slots import move_slot
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.reporting.grids import SEGMENT_COLORS

from ..pipelines.test_slot_diffusion import make_pipe
from ..spaces.pages import make_image
from .tiny import make_slots

# diffusers 0.42 passes a tensor to np.array in set_timesteps of DPM-Solver++.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def differ(first, second):
    return np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() > 0.5


def drawn(frames):
    """The picture in the end."""
    *_, last = frames
    return last.picture


class TestBroadcast:
    def test_any_number_of_drawn_slots(self):
        decoder = Broadcast(make_slots(slot_init="gaussian", gradient="full"))
        assert len(decoder.explain(make_image(), num_slots=14).parts) == 14

    @pytest.mark.parametrize("size", [(60, 40), (40, 60), (16, 16), (384, 1)])
    def test_pictures_have_the_shape_of_the_image(self, model, broadcast, size):
        found = broadcast.explain(make_image(size))
        assert max(found.segments.size) == SIDE
        assert found.segments.size == found.reconstruction.size
        assert found.segments.size[0] >= found.segments.size[1] or size[0] < size[1]
        assert len(found.parts) == len(found.shares) == found.slots.shape[1] == 4
        assert sum(found.shares) == pytest.approx(1)

    def test_agrees_with_segment(self, model, broadcast):
        image = make_image((384, 256))
        found = broadcast.explain(image)
        counts = torch.bincount(model.segment(image).flatten(), minlength=4) / (384 * 256)
        assert sorted(found.shares) == pytest.approx(sorted(counts.tolist()))

    def test_segments_show_one_color_a_slot(self, model, broadcast):
        image = Image.new("RGB", (384, 384), "black")
        found = broadcast.explain(image)
        pixels = np.asarray(found.segments).reshape(-1, 3)
        for share, color in zip(found.shares, SEGMENT_COLORS, strict=False):
            shown = (pixels == (0.6 * color).astype(np.uint8)).all(axis=1).mean()
            assert shown == pytest.approx(share, abs=0.1) and shown <= share

    def test_reconstruction_is_the_models(self, model, broadcast, monkeypatch):
        monkeypatch.setattr(model.config, "prune_error", -1.0)  # a new model paints better with a single slot
        found = broadcast.explain(make_image((16, 16)))
        expected = to_picture(model.decode(found.slots)[0], found.reconstruction.size)
        assert np.abs(np.asarray(found.reconstruction, int) - np.asarray(expected, int)).max() <= 2  # of 255

    def test_largest_slot_comes_first(self, model, broadcast, monkeypatch):
        monkeypatch.setattr(model.config, "prune_error", -1.0)
        found = broadcast.explain(make_image())
        assert found.shares == sorted(found.shares, reverse=True) and found.shares[1] > 0

    def test_k_and_t(self, model, broadcast):
        image = make_image()
        assert len(broadcast.explain(image, num_slots=2).parts) == 2
        once, often = (broadcast.explain(image, num_iterations=n).slots for n in (1, 6))
        assert not torch.allclose(once, often, atol=1e-4)

    def test_unused_slots(self):
        model = make_slots()
        found = Broadcast(model).explain(make_image(seed=1))
        pixel_values = model.prepare_images([found.image])
        output = model(pixel_values)
        assert len(found.parts) == 4 and found.used == list(range((output.masks.amax(dim=(2, 3)) > 0).sum()))
        assert 0 < len(found.used) < 4 and all(share == 0 for share in found.shares[len(found.used) :])
        painted = np.asarray(Broadcast(model).at_once((found, found.used)), int)
        assert np.abs(painted - np.asarray(found.reconstruction, int)).max() <= 1

    def test_recall_paints_again(self, broadcast):
        found = broadcast.explain(make_image())
        (frame,) = broadcast.recall((found, [0, 2]), seed=0, steps=3)
        assert frame == (broadcast.at_once((found, [0, 2])), "")

    def test_a_moved_slot_is_painted_elsewhere(self, broadcast):
        found = broadcast.explain(make_image())
        moved = move_slot(found, 1, 0.2, 0.9)
        assert differ(broadcast.at_once((moved, [0, 1])), broadcast.at_once((found, [0, 1])))

    def test_more_slots_than_learned(self, model, broadcast):
        with pytest.raises(ValueError, match="num_slots=9 is more than the 4 slots"):
            broadcast.explain(make_image(), num_slots=9)

    def test_paint_leaves_slots_out(self, model, broadcast):
        found = broadcast.explain(make_image())
        keep = torch.tensor([[True, False, True, False]])
        expected = to_picture(model.decode(found.slots, keep=keep)[0], found.segments.size)
        difference = np.asarray(broadcast.at_once((found, [2, 0])), int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1
        assert np.abs(np.asarray(broadcast.at_once((found, [0, 1, 2, 3])), int) - np.asarray(expected, int)).max() > 1
        assert broadcast.at_once((found, [])) is None

    def test_paint_mixes_two_images(self, model, broadcast):
        first, second = (broadcast.explain(make_image(seed=seed)) for seed in (1, 2))
        union = torch.cat([first.slots[:, :1], second.slots[:, 1:3]], dim=1)
        expected = to_picture(model.decode(union)[0], first.segments.size)
        assert broadcast.at_once((first, [0]), (second, [1, 2])).tobytes() == expected.tobytes()


class TestDiffusion:
    @pytest.mark.parametrize("size", [(60, 40), (40, 60), (384, 1)])
    def test_pictures_have_the_shape_of_the_image(self, diffusion, size):
        found = diffusion.explain(make_image(size))
        assert max(found.segments.size) == SIDE
        assert len(found.parts) == len(found.shares) == found.slots.shape[1] == 3
        assert sum(found.shares) == pytest.approx(1) and found.reconstruction is None
        assert drawn(diffusion.frames((found, [0]), seed=0, steps=2)).size == found.segments.size

    def test_agrees_with_segment(self, pipe, diffusion):
        image = make_image((384, 256))
        found = diffusion.explain(image)
        mask = pipe.segment(image)
        assert len(mask.unique()) > 1
        counts = torch.bincount(mask.flatten(), minlength=3) / (384 * 256)
        assert sorted(found.shares) == pytest.approx(sorted(counts.tolist()))
        output = pipe.encode(image)
        assert torch.equal(found.slots, output.slots[:, counts.argsort(descending=True)])

    def test_parts_are_what_each_slot_attends_to(self, diffusion):
        image = make_image((384, 384))
        parts = [np.asarray(part, float)[10:-10, 10:-10] for part in diffusion.explain(image).parts]
        together = sum(255 - part for part in parts)  # on white
        assert np.abs(together - (255 - np.asarray(image, float))).max() <= len(parts)

    def test_k_and_t(self, diffusion):
        image = make_image()
        assert len(diffusion.explain(image, num_slots=5).parts) == 5
        once, often = (diffusion.explain(image, num_iterations=n).slots for n in (1, 6))
        assert not torch.allclose(once, often, atol=1e-4)

    def test_the_end_is_what_the_solver_draws(self, pipe, diffusion):
        found = diffusion.explain(make_image())
        solver = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=2)
        other = SlotDiffusionPipeline(**{**pipe.components, "scheduler": solver})
        other.set_progress_bar_config(disable=True)
        keep = torch.tensor([[True, False, True]])
        arguments = {"num_inference_steps": 6, "generator": torch.Generator().manual_seed(7), "output_type": "pt"}
        expected = to_picture(other(slots=found.slots, keep=keep, **arguments).images[0], found.segments.size)
        picture = drawn(diffusion.frames((found, [2, 0]), seed=7, steps=6))
        assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 2

    def test_its_scheduler_stays_as_it_is(self, pipe, diffusion):
        scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
        drawn(diffusion.frames((diffusion.explain(make_image()), [0, 1]), seed=0, steps=3))
        assert pipe.scheduler is scheduler and type(scheduler) is DDPMScheduler and dict(scheduler.config) == config
        assert scheduler.num_inference_steps is None

    def test_frames_show_what_each_step_expects(self, pipe, diffusion):
        found, expected = diffusion.explain(make_image()), []

        def watch(pipe, step, timestep, tensors):
            expected.append(to_picture(pipe.decode(tensors["denoised"], "pt")[0], found.segments.size))

        diffusion._with_solver()(
            slots=found.slots, num_inference_steps=4, generator=torch.Generator().manual_seed(3),
            callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["denoised"],
        )  # fmt: skip
        *frames, last = diffusion.frames((found, [0, 1, 2]), seed=3, steps=4)
        assert [frame.note for frame in frames] == [f"step {step} of 4" for step in range(1, 5)] and not last.note
        for frame, picture in zip(frames, expected, strict=True):
            assert frame.picture.tobytes() == picture.tobytes()

    def test_there_are_not_too_many_frames(self, diffusion):
        found = diffusion.explain(make_image())
        notes = [frame.note for frame in diffusion.frames((found, [0]), seed=0, steps=50)]
        assert len(notes) <= MAX_FRAMES + 1 and notes[-2:] == ["step 50 of 50", ""]

    def test_what_a_scheduler_cannot_tell_is_not_asked(self):
        diffusion = Diffusion(make_pipe(scheduler=noise_schedule(prediction_type="sample")))
        found = diffusion.explain(make_image())
        *frames, last = diffusion.frames((found, [0, 1, 2]), seed=3, steps=4)
        assert len(frames) == 4 and not differ(frames[-1].picture, last.picture)  # the latents of each step

    def test_the_seed_decides(self, pipe):
        found = Diffusion(pipe).explain(make_image())
        first, again, other = (
            drawn(Diffusion(pipe).frames((found, [0, 1, 2]), seed=seed, steps=3)) for seed in (1, 1, 2)
        )
        assert first.tobytes() == again.tobytes() and differ(first, other)

    def test_what_was_drawn_is_not_drawn_again(self, diffusion):
        found = diffusion.explain(make_image())
        first = list(diffusion.frames((found, [0, 1]), seed=1, steps=3))
        again = list(diffusion.frames((found, [1, 0]), seed=1, steps=3))
        assert len(first) == 4 and again == first[-1:]
        for changed in ({"seed": 2, "steps": 3}, {"seed": 1, "steps": 4}):
            assert len(list(diffusion.frames((found, [0, 1]), **changed))) > 3
        for seed in range(20):
            drawn(diffusion.frames((found, [0]), seed=seed, steps=1))
        assert len(diffusion._drawn) == 16

    @pytest.mark.parametrize("steps", [1, 7, 50])
    def test_recall_has_all_frames(self, diffusion, steps):
        found = diffusion.explain(make_image())
        assert diffusion.recall((found, [0, 1]), seed=1, steps=steps) == []
        frames = list(diffusion.frames((found, [0, 1]), seed=1, steps=steps))
        assert diffusion.recall((found, [1, 0]), seed=1, steps=steps) == frames and 1 < len(frames) <= MAX_FRAMES + 1
        assert diffusion.recall((found, [0, 1]), seed=2, steps=steps) == []

    def test_a_drawing_ends_when_nobody_looks(self, diffusion):
        found = diffusion.explain(make_image())
        frames = diffusion.frames((found, [0, 1, 2]), seed=0, steps=50)
        before = threading.active_count()
        next(frames)
        assert threading.active_count() == before + 1
        frames.close()
        assert threading.active_count() == before and not diffusion._drawn

    def test_an_error_of_the_pipeline_arrives(self):
        diffusion = Diffusion(make_pipe(scheduler=noise_schedule(clip_sample=True)))
        with pytest.raises(ValueError, match="scheduler clips"):
            drawn(diffusion.frames((diffusion.explain(make_image()), [0]), seed=0, steps=3))

    @pytest.mark.parametrize(
        "keep, options, message",
        [
            ([], {}, "No slot is selected. Select at least one"),
            ([0], {"seed": -1}, "The noise seed -1 is out of range. Expected a whole number from 0 to 2147483647"),
            ([0], {"seed": 2**31}, "The noise seed 2147483648 is out of range"),
            ([0], {"steps": 0}, "num_inference_steps=0 must be"),
            ([0], {"steps": 1001}, "num_inference_steps=1001 must be from 1 to the 1000"),
        ],
    )
    def test_what_cannot_be_is_a_sentence(self, diffusion, keep, options, message):
        found = diffusion.explain(make_image())
        with pytest.raises(ValueError, match=message):
            drawn(diffusion.frames((found, keep), **{"seed": 0, "steps": 3, **options}))
