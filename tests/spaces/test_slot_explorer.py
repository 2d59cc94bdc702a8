import inspect
import json
import os
import shutil
import threading
import time
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from hf_dl.models.slot_decoders import blend_slots
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.publishing.command import main as publish

from ..pipelines.test_slot_diffusion import make_pipe
from .pages import (
    HOSTILE,
    ROOT,
    build_demo,
    check_hostile_files,
    check_space,
    load_app,
    make_image,
    press,
    serve,
    shown,
    upload,
    wait_for,
    write_hostile,
    write_script,
)

SPACE = ROOT / "spaces" / "slot_explorer"
TINY = {
    "image_size": 16, "encoder_channels": [8], "encoder_strides": [2], "token_dim": 8, "num_slots": 4, "slot_dim": 8,
    "slot_mlp_dim": 8, "slot_init": "learned", "gradient": "bilevel", "decoder": "pixel_shuffle",
    "decoder_channels": [8], "decoder_size": 4,
}  # fmt: skip


# diffusers 0.42 hands a tensor to np.array in set_timesteps of DPM-Solver++.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
app = load_app("slot_explorer")


def make_model(**options):
    torch.manual_seed(0)
    return SlotAutoencoderModel(SlotAutoencoderConfig(**{**TINY, **options})).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipe():
    """One whose pictures depend on the slots more than those of a new one do."""
    pipe = make_pipe()
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "cross_attention" in name:
                parameter.mul_(100)
    return pipe


@pytest.fixture
def diffusion(pipe):
    return app.Diffusion(pipe)


def drawn(frames):
    """The picture in the end."""
    *_, last = frames
    return last.picture


def differ(first, second):
    return np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() > 0.5


class TestExplain:
    @pytest.mark.parametrize("size", [(60, 40), (40, 60), (16, 16), (384, 1)])
    def test_pictures_have_the_shape_of_the_image(self, model, size):
        found = app.explain(model, make_image(size))
        assert max(found.segments.size) == app.SIDE
        assert found.segments.size == found.reconstruction.size
        assert found.segments.size[0] >= found.segments.size[1] or size[0] < size[1]
        assert len(found.parts) == len(found.shares) == found.slots.shape[1] == 4
        assert sum(found.shares) == pytest.approx(1)

    def test_agrees_with_segment(self, model):
        image = make_image((384, 256))
        found = app.explain(model, image)
        counts = torch.bincount(model.segment(image).flatten(), minlength=4) / (384 * 256)
        assert sorted(found.shares) == pytest.approx(sorted(counts.tolist()))

    def test_segments_show_one_color_a_slot(self, model):
        image = Image.new("RGB", (384, 384), "black")
        found = app.explain(model, image)
        pixels = np.asarray(found.segments).reshape(-1, 3)
        for share, color in zip(found.shares, app.SEGMENT_COLORS, strict=False):
            shown = (pixels == (0.6 * color).astype(np.uint8)).all(axis=1).mean()
            assert shown == pytest.approx(share, abs=0.1) and shown <= share

    def test_reconstruction_is_the_models(self, model):
        found = app.explain(model, make_image((16, 16)))
        expected = model.decode(found.slots)[0].permute(1, 2, 0).numpy()
        small = np.asarray(found.reconstruction.resize((16, 16), Image.Resampling.BOX)) / 255
        assert np.abs(small - expected).mean() < 0.03

    def test_largest_slot_comes_first(self, model):
        found = app.explain(model, make_image())
        _, _, masks = blend_slots(model.decoder, model.config, found.slots)
        areas = masks.mean(dim=(2, 3))[0]
        assert areas.tolist() == sorted(areas.tolist(), reverse=True)

    def test_k_and_t(self, model):
        image = make_image()
        assert len(app.explain(model, image, num_slots=2).parts) == 2
        once, often = (app.explain(model, image, num_iterations=n).slots for n in (1, 6))
        assert not torch.allclose(once, often, atol=1e-4)

    def test_more_slots_than_learned(self, model):
        with pytest.raises(ValueError, match="num_slots=9 is more than the 4 slots"):
            app.explain(model, make_image(), num_slots=9)

    def test_any_number_of_drawn_slots(self):
        model = make_model(slot_init="gaussian", gradient="full")
        assert len(app.explain(model, make_image(), num_slots=14).parts) == 14
        assert app.sliders(model)[0].maximum == app.NUM_SLOTS and app.sliders(make_model())[0].maximum == 4

    def test_paint_leaves_slots_out(self, model):
        found = app.explain(model, make_image())
        keep = torch.tensor([[True, False, True, False]])
        expected = app._picture(model.decode(found.slots, keep=keep)[0], found.segments.size)
        difference = np.asarray(app.paint(model, (found, [2, 0])), int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1
        assert np.abs(np.asarray(app.paint(model, (found, [0, 1, 2, 3])), int) - np.asarray(expected, int)).max() > 1
        assert app.paint(model, (found, [])) is None

    def test_paint_mixes_two_images(self, model):
        first, second = (app.explain(model, make_image(seed=seed)) for seed in (1, 2))
        union = torch.cat([first.slots[:, :1], second.slots[:, 1:3]], dim=1)
        expected = app._picture(model.decode(union)[0], first.segments.size)
        assert app.paint(model, (first, [0]), (second, [1, 2])).tobytes() == expected.tobytes()


@pytest.mark.parametrize("style", ["plain", "textured"])
def test_scenes_are_functions_of_the_seed(style):
    first, again, other = (app.draw_scene(style, seed) for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first.mode == "RGB"


class TestDiffusion:
    @pytest.mark.parametrize("size", [(60, 40), (40, 60), (384, 1)])
    def test_pictures_have_the_shape_of_the_image(self, diffusion, size):
        found = diffusion.explain(make_image(size))
        assert max(found.segments.size) == app.SIDE
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
        order = output.attentions[-1][0].mean(dim=1).argsort(descending=True)
        assert torch.equal(found.slots, output.slots[:, order])

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
        expected = app._picture(other(slots=found.slots, keep=keep, **arguments).images[0], found.segments.size)
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
            expected.append(app._picture(pipe.decode(tensors["denoised"], "pt")[0], found.segments.size))

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
        assert len(notes) <= app.MAX_FRAMES + 1 and notes[-2:] == ["step 50 of 50", ""]

    def test_what_a_scheduler_cannot_tell_is_not_asked(self):
        diffusion = app.Diffusion(make_pipe(scheduler=noise_schedule(prediction_type="sample")))
        found = diffusion.explain(make_image())
        *frames, last = diffusion.frames((found, [0, 1, 2]), seed=3, steps=4)
        assert len(frames) == 4 and not differ(frames[-1].picture, last.picture)  # the latents of each step

    def test_the_seed_decides(self, pipe):
        found = app.Diffusion(pipe).explain(make_image())
        first, again, other = (
            drawn(app.Diffusion(pipe).frames((found, [0, 1, 2]), seed=seed, steps=3)) for seed in (1, 1, 2)
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

    def test_a_drawing_ends_when_nobody_looks(self, diffusion):
        found = diffusion.explain(make_image())
        frames = diffusion.frames((found, [0, 1, 2]), seed=0, steps=50)
        before = threading.active_count()
        next(frames)
        assert threading.active_count() == before + 1
        frames.close()
        assert threading.active_count() == before and not diffusion._drawn

    def test_an_error_of_the_pipeline_arrives(self):
        diffusion = app.Diffusion(make_pipe(scheduler=noise_schedule(clip_sample=True)))
        with pytest.raises(ValueError, match="scheduler clips"):
            drawn(diffusion.frames((diffusion.explain(make_image()), [0]), seed=0, steps=3))

    @pytest.mark.parametrize(
        "keep, options, message",
        [
            ([], {}, "No slot is left to draw from; tick at least one"),
            ([0], {"seed": -1}, "The noise seed -1 is out of range; it is a whole number from 0 to 2147483647"),
            ([0], {"seed": 2**31}, "The noise seed 2147483648 is out of range"),
            ([0], {"steps": 0}, "num_inference_steps=0 must be"),
            ([0], {"steps": 1001}, "num_inference_steps=1001 must be from 1 to the 1000"),
        ],
    )
    def test_what_cannot_be_is_a_sentence(self, diffusion, keep, options, message):
        found = diffusion.explain(make_image())
        with pytest.raises(ValueError, match=message):
            drawn(diffusion.frames((found, keep), **{"seed": 0, "steps": 3, **options}))


class TestFindAndLoad:
    def test_environment_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", "someone/slots")
        assert app.find_model(tmp_path) == "someone/slots"

    def test_newest_run_of_the_right_kind(self, model, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        assert app.find_model(tmp_path) is None
        for age, name in enumerate(["new", "old"]):
            model.save_pretrained(tmp_path / "runs" / name)
            then = time.time() - 1000 * (1 + age)
            os.utime(tmp_path / "runs" / name / "model.safetensors", (then, then))
        other = tmp_path / "runs" / "other"
        shutil.copytree(tmp_path / "runs" / "new", other)
        (other / "config.json").write_text('{"model_type": "vit"}')
        bare = tmp_path / "runs" / "bare" / "checkpoints"
        bare.mkdir(parents=True)
        (bare / "model.safetensors").write_bytes(b"weights without a config")
        assert app.find_model(tmp_path) == str(tmp_path / "runs" / "new")

    def test_load(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = app.load_model(str(tmp_path))
        assert not loaded.training
        image = make_image()
        assert torch.equal(app.explain(loaded, image).slots, app.explain(model, image).slots)

    def test_missing(self, tmp_path):
        with pytest.raises(ValueError, match="was not found.*Set HF_DL_MODEL"):
            app.load_model(str(tmp_path / "nowhere"))

    def test_another_kind(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(ValueError, match="is a 'vit'; this page needs a 'slot_autoencoder'"):
            app.load_model(str(tmp_path))

    def test_of_another_version(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "slot_mlp_dim": 12}))
        with pytest.raises(ValueError, match="does not fit this version of hf_dl: 3 of its tensors"):
            app.load_model(str(tmp_path))

    def test_damaged(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be loaded"):
            app.load_model(str(tmp_path))


class TestFindAndLoadPipeline:
    @pytest.fixture
    def saved(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "runs" / "drawn")
        return tmp_path / "runs" / "drawn"

    def test_environment_comes_first(self, saved, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_DIFFUSION_MODEL", "someone/scenes")
        assert app.find_pipeline(tmp_path) == "someone/scenes"

    def test_newest_run(self, saved, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_DIFFUSION_MODEL", raising=False)
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        assert app.find_pipeline(tmp_path / "nowhere") is None
        assert app.find_pipeline(tmp_path) == str(saved)
        assert app.find_model(tmp_path) is None  # its slot encoder has no decoder

    def test_load(self, pipe, saved):
        loaded, image = app.load_pipeline(str(saved)), make_image()
        found = [app.Diffusion(each).explain(image) for each in (loaded, pipe)]
        assert torch.equal(found[0].slots, found[1].slots)
        assert "16 × 16 pixels" in app.Diffusion(loaded).describe() and "drawn" in app.Diffusion(loaded).describe()

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for name in (str(tmp_path / "nowhere"), "/not/a/repo/id"):
            with pytest.raises(ValueError, match="was not found.*Set HF_DL_DIFFUSION_MODEL"):
                app.load_pipeline(name)

    def test_another_kind(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot be loaded .*has no model_index.json of a SlotDiffusionPipeline"):
            app.load_pipeline(str(tmp_path))

    @pytest.mark.parametrize("part", ["slot_encoder", "unet", "autoencoder"])
    @pytest.mark.parametrize("damage", ["cut", "gone", "fewer", "other"])
    def test_damaged(self, saved, part, damage):
        (weights,) = (saved / part).glob("*.safetensors")
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:100])
        elif damage == "gone":
            weights.unlink()
        else:
            tensors = load_file(weights)
            name = next(iter(tensors))
            tensors[name] = torch.zeros(1, 2, 3)
            if damage == "fewer":
                del tensors[name]
            save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="The diffusion pipeline .* cannot be loaded") as caught:
            app.load_pipeline(str(saved))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

    def test_find_and_load(self, saved, tmp_path, monkeypatch):
        which = {"find": app.find_pipeline, "load": app.load_pipeline}
        monkeypatch.delenv("HF_DL_DIFFUSION_MODEL", raising=False)
        found, problem = app.find_and_load(tmp_path, **which)
        assert isinstance(found, SlotDiffusionPipeline) and not problem
        assert app.find_and_load(tmp_path / "nowhere", **which) == (None, "")
        (saved / "model_index.json").write_text("{")
        monkeypatch.setenv("HF_DL_DIFFUSION_MODEL", str(saved))
        found, problem = app.find_and_load(tmp_path, **which)
        assert found is None and "cannot be loaded" in problem


class TestTwoDecoders:
    @pytest.fixture
    def explorer(self, model, pipe):
        return app.Explorer(model, pipe=pipe)

    @pytest.fixture
    def two(self, explorer):
        found = [explorer.get("diffusion").explain(make_image(seed=seed)) for seed in (1, 2)]
        found[0].seed = 0
        return found

    def test_which_there_are(self, model, pipe, tmp_path):
        both, one, other = (
            app.Explorer(model, pipe=pipe), app.Explorer(model, root=tmp_path),
            app.Explorer(None, root=tmp_path, pipe=pipe),
        )  # fmt: skip
        assert both.ready and one.ready and other.ready
        assert (both.default, one.default, other.default) == ("broadcast", "broadcast", "diffusion")
        assert list(both.decoders) == ["broadcast", "diffusion"] and not app.missing_text(both)
        with pytest.raises(ValueError, match="There is no model yet; train one, or set HF_DL_DIFFUSION_MODEL"):
            one.get("diffusion")
        assert "set HF_DL_DIFFUSION_MODEL to a Hub id" in app.missing_text(one)  # on a Space
        for name in ("train_slots.py", "train_slot_diffusion.py"):
            write_script(tmp_path, name, "")
        command = "<code>scripts/run accelerate launch scripts/"
        assert f"{command}train_slot_diffusion.py</code>" in app.missing_text(one)
        assert f"{command}train_slots.py</code>" in app.missing_text(other)

    def test_a_problem_is_said(self, model, tmp_path):
        for explorer in (
            app.Explorer(model, pipe_problem="The <pipeline> is damaged."),
            app.Explorer(None, "The <pipeline> is damaged.", pipe=make_pipe()),
        ):
            assert explorer.ready and "The &lt;pipeline&gt; is damaged." in app.missing_text(explorer)
        neither = app.Explorer(None, root=tmp_path, pipe_problem="The <pipeline> is damaged.")
        assert not neither.ready and "The &lt;pipeline&gt; is damaged." in app.welcome_text(neither)

    def test_the_page_is_built(self, model, pipe):
        for options in ({"pipe": pipe}, {}, {"pipe_problem": "It is damaged."}):
            for each in (model, None):
                demo = build_demo(app, each, **options)
                (radio,) = (block for block in demo.blocks.values() if getattr(block, "elem_id", "") == "decoder")
                assert radio.visible == (each is not None and "pipe" in options)
                assert radio.value == ("diffusion" if each is None and "pipe" in options else "broadcast")

    def test_sliders_go_as_far_as_the_encoder(self, explorer):
        most, _ = app.sliders(explorer.get("diffusion"))
        assert (most.value, most.maximum) == (3, app.NUM_SLOTS)
        assert app.sliders(explorer.get("broadcast"))[0].maximum == 4

    def test_another_decoder_takes_both_images_apart(self, explorer):
        first, second = (explorer.draw("plain", seed, 4, 3) for seed in (0, 1))
        assert explorer.again(first, None, 4, 3, "diffusion") is None
        assert explorer.again(first, second, 4, 3, "broadcast") is None  # it has been done
        for numbers in ((3, 3, "broadcast"), (4, 2, "broadcast"), (4, 3, "diffusion")):
            found = explorer.again(first, second, *numbers)
            assert [each.image for each in found] == [first.image, second.image]
            assert explorer.again(*found, *numbers) is None
            assert all(each.made == (numbers[2], *numbers[:2]) for each in found)

    def test_slots_are_painted_by_whom_they_are_of(self, explorer, two):
        (shown,) = explorer.paint(app.explain(explorer.model, make_image()), [0, 1])
        assert shown["label"] == "Painted with these slots alone"
        shown = list(explorer.paint(two[0], [0, 1], 5, True, 3))
        labels = [f"Drawn from these slots alone · step {step} of 3" for step in (1, 2, 3)]
        assert [each["label"] for each in shown] == [*labels, "Drawn from these slots alone"]
        expected = drawn(app.Diffusion(explorer.get("diffusion").pipe).frames((two[0], [0, 1]), seed=5, steps=3))
        assert shown[-1]["value"].tobytes() == expected.tobytes()

    def test_slots_of_two_decoders_are_not_mixed(self, explorer, two):
        other = explorer.get("broadcast").explain(make_image())
        assert list(explorer.mix(two[0], other, [0], [0])) == []
        assert list(explorer.swap(other, two[0], 0, 0)) == list(explorer.insert(None, other, 0)) == []
        assert list(explorer.mix_in_steps(two[0], other)) == []
        assert explorer.mix_afresh(two[0], other) == gr.skip()
        assert app.show_mix(explorer.begin_mixing(two[0], other)) == gr.skip()

    def test_ticks_of_former_slots_are_not_painted(self, explorer, two):
        assert list(explorer.paint(two[0], [0, 3])) == list(explorer.mix(*two, [0], [1, 5])) == []

    def test_a_new_image_is_drawn_with_all_slots(self, explorer, two):
        found = two[0]
        (seed, *_), *rest = shown = list(explorer.paint_afresh(found, 99, False, 3))
        assert seed == found.seed and all(each[0] == gr.skip() for each in rest)
        assert [whole["value"] is alone["value"] for _, whole, alone in shown] == [True] * 4
        assert shown[0][1]["label"] == "Drawn from all slots · step 1 of 3"
        broadcast = explorer.get("broadcast").explain(make_image())
        ((_, whole, alone),) = explorer.paint_afresh(broadcast)
        assert (
            whole == gr.skip()
            and alone["value"].tobytes() == app.paint(explorer.model, (broadcast, [0, 1, 2, 3])).tobytes()
        )
        assert list(explorer.paint_afresh(None)) == list(explorer.paint_again(None, [])) == []

    def test_edits_keep_the_noise(self, explorer, two):
        found = two[0]
        *_, (whole, alone) = explorer.paint_again(found, [0, 2], 0, False, 3)
        assert whole == gr.skip()
        fresh = app.Diffusion(explorer.get("diffusion").pipe)
        expected = drawn(fresh.frames((found, [0, 2]), seed=found.seed, steps=3))
        assert alone["value"].tobytes() == expected.tobytes()
        *_, mixed = explorer.mix(*two, [0, 2], [1], 0, False, 3)
        expected = drawn(fresh.frames((found, [0, 2]), (two[1], [1]), seed=found.seed, steps=3))
        assert mixed["value"].tobytes() == expected.tobytes()
        assert mixed["value"].tobytes() != alone["value"].tobytes()

    def test_the_seed_is_new_or_kept(self, explorer, monkeypatch):
        seeds = iter(range(100, 200))
        monkeypatch.setattr(app.secrets, "randbelow", lambda _: next(seeds))
        first, second = (explorer.get("diffusion").explain(make_image()) for _ in range(2))
        assert (first.seed, second.seed) == (100, 101)
        assert next(explorer.paint_afresh(first, 7, False, 1))[0] == 100
        assert next(explorer.paint_afresh(second, 7, True, 1))[0] == second.seed == 7
        assert next(explorer.paint_afresh(second, None, True, 1))[0] == 7  # while another one is typed
        assert explorer.renew_noise(first) == first.seed == 102
        explorer.set_noise(first, 55)
        explorer.set_noise(first, None)
        assert first.seed == 55
        for wrong in (-1, 2**31):
            with pytest.raises(gr.Error, match=f"The noise seed {wrong} is out of range"):
                app.event(explorer.set_noise)(first, wrong)
            with pytest.raises(gr.Error, match=f"The noise seed {wrong} is out of range"):
                list(app.event(explorer.paint)(second, [0], wrong, True, 1))
        assert first.seed == 55
        explorer.set_noise(None, 3)
        assert explorer.renew_noise(None) == gr.skip()

    def test_no_slot_is_a_sentence(self, explorer, two):
        assert inspect.isgeneratorfunction(app.event(explorer.paint))
        with pytest.raises(gr.Error, match="No slot is left to draw from"):
            list(app.event(explorer.paint)(two[0], []))

    def test_diffusion_starts_with_one_object_of_the_second(self, explorer, two):
        first, second, picture = explorer.mix_afresh(*two)
        assert (first.value, second.value, picture) == ([0, 1, 2], [1], None)
        *_, noted_first, noted_second, _, mine, theirs = app.show_mix(explorer.begin_mixing(*two))
        assert (noted_first, noted_second) == (first.value, second.value)
        assert (mine.value, theirs.value) == (1, 1) and [value for _, value in mine.choices] == [0, 1, 2]
        *_, last = explorer.mix_in_steps(*two, 0, False, 3)
        *_, expected = explorer.mix(*two, first.value, second.value, 0, False, 3)
        assert last["value"].tobytes() == expected["value"].tobytes()
        broadcast = [explorer.get("broadcast").explain(make_image(seed=seed)) for seed in (1, 2)]
        assert list(explorer.mix_in_steps(*broadcast)) == []  # painted at once, with the ticks

    @pytest.mark.parametrize("kind", ["broadcast", "diffusion"])
    def test_swap_and_insert(self, explorer, kind):
        two = [explorer.get(kind).explain(make_image(seed=seed), num_slots=3) for seed in (1, 2)]
        for edit, ticks in (
            (explorer.swap(*two, 0, 2, 0, True, 3), ([1, 2], [2])),
            (explorer.insert(*two, 1, 0, True, 3), ([0, 1, 2], [1])),
        ):
            (first, second, *noted, nothing), *shown = edit
            assert (first.value, second.value) == tuple(noted) == ticks and nothing == gr.skip()
            *_, expected = explorer.mix(*two, *ticks, 0, True, 3)
            assert shown[-1][4]["value"].tobytes() == expected["value"].tobytes()
            assert len(shown) == (1 if kind == "broadcast" else 4)


class TestPage:
    def test_the_message_for_a_value_error(self, model):
        explorer = app.Explorer(None)
        with pytest.raises(gr.Error, match="no model yet") as caught:
            app.event(explorer.draw)("plain", 0, 4, 3)
        assert caught.value.print_exception is False

    def test_the_message_is_no_html(self, tmp_path):
        def refuse():
            raise ValueError("<b>bold</b>")

        with pytest.raises(gr.Error, match="&lt;b&gt;"):
            app.event(refuse)()

    def test_nothing_from_elsewhere_is_loaded(self, model):
        assert build_demo(app, model).analytics_enabled is False

    def test_second_image_starts_without_its_background(self, model):
        found = app.explain(model, make_image())
        first, second, picture = app.Explorer(model).mix_afresh(found, found)
        assert (first.value, second.value) == ([0, 1, 2, 3], [1, 2, 3])
        assert picture.tobytes() == app.paint(model, (found, first.value), (found, second.value)).tobytes()

    def test_with_scripts_it_offers_to_train(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "")
        explorer = app.Explorer(None, root=tmp_path)
        assert explorer.can_train and explorer.training.shown in app.welcome_text(explorer)

    def test_without_scripts_it_asks_for_a_model(self, tmp_path):
        explorer = app.Explorer(None, root=tmp_path)
        assert not explorer.can_train and "HF_DL_MODEL" in app.welcome_text(explorer)

    def test_a_problem_is_said(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "")
        explorer = app.Explorer(None, "The model 'x' was not <found>.", tmp_path)
        assert not explorer.can_train and "was not &lt;found&gt;." in app.welcome_text(explorer)

    def test_a_model_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(tmp_path / "nowhere"))
        found, problem = app.find_and_load(tmp_path)
        assert found is None and problem.endswith("Set HF_DL_MODEL to one, and start again.")
        assert "nowhere" in app.welcome_text(app.Explorer(found, problem, tmp_path))
        monkeypatch.delenv("HF_DL_MODEL")
        assert app.find_and_load(tmp_path) == (None, "")


class TestTraining:
    def test_progress_then_a_model(self, model, tmp_path):
        trained = tmp_path / "trained"
        model.save_pretrained(trained)
        write_script(
            tmp_path,
            "train_slots.py",
            "import shutil, sys, time, pathlib\n"
            "folder = sys.argv[sys.argv.index('--output_dir') + 1]\n"
            "print('Generating train split: 120 examples', file=sys.stderr, flush=True)\n"
            "print('step 25/100 loss 0.1 val_loss 0.2 val_posterior_fg_ari 0.9', file=sys.stderr, flush=True)\n"
            "while not pathlib.Path(folder, 'go').exists(): time.sleep(0.05)\n"
            f"shutil.copytree({str(trained)!r}, folder, dirs_exist_ok=True)\n",
        )
        explorer = app.Explorer(None, root=tmp_path)
        assert not explorer.ready
        explorer.training.start()
        first = explorer.training.process
        try:
            explorer.training.start()  # a second click
            assert explorer.training.process is first
            wait_for(lambda: explorer.training.progress()[0])
            assert explorer.training.progress() == (0.25, "Step 25 of 100 · loss 0.1 · foreground ARI 0.9")
            assert "width: 25.0%" in app.welcome_text(explorer)
            (explorer.training.folder / "go").touch()
            wait_for(lambda: not explorer.training.running)
        finally:
            first.kill()
        assert explorer.ready and explorer.model.config.num_slots == 4
        assert not explorer.training.failure()

    def test_the_real_script_takes_the_flags(self, tmp_path):
        from transformers import HfArgumentParser

        from scripts.train_slots import Args

        command = app.make_training(ROOT).command
        assert Path(command[1]).is_file()
        (args,) = HfArgumentParser(Args).parse_args_into_dataclasses(command[2:])
        assert args.resume and Path(args.output_dir).parent.name == "runs"

    def test_a_failure_is_said(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "raise SystemExit('The disk is full.')")
        explorer = app.Explorer(None, root=tmp_path)
        explorer.training.start()
        explorer.training.process.wait(60)
        assert not explorer.ready and explorer.can_train
        assert "Training ended before its time: The disk is full." in app.welcome_text(explorer)

    def test_stop(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "import time\ntime.sleep(60)")
        training = app.make_training(tmp_path)
        training.start()
        training.stop()
        assert training.process.wait(30) != 0 and not training.running
        assert training.failure() == "Training was stopped before its first step."


def test_publish_accepts_the_space(capsys):
    status = publish([str(SPACE), "user/slot-explorer", "--type", "space", "--dry_run"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "app.py" in captured.out


def test_requirements_and_front_matter_fit_the_project():
    check_space("slot_explorer")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(model, pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    model.save_pretrained(folder / "model")
    pipe.save_pretrained(folder / "pipeline")
    with serve("slot_explorer", folder / "model", folder, HF_DL_DIFFUSION_MODEL=folder / "pipeline") as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text(), server[1].read_text()


def call(address, path, folder):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, download_files=str(folder))
    return client.predict(handle_file(path), 3, 2, api_name="/explain")


@pytest.mark.slow
class TestClient:
    def test_explain(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        *pictures, parts, _ = call(address, tmp_path / "a.png", tmp_path)
        for path in pictures:
            with Image.open(path) as picture:
                assert picture.size == (384, 256)
        assert len(pictures) == len(parts) == 3

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, address, kind, tmp_path):
        from gradio_client.exceptions import AppError

        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(AppError, match=HOSTILE[kind]):
            call(address, tmp_path / "a.png", tmp_path)


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "segments") and shown(browser, "painted"))

    def test_an_image_goes_in_and_masks_come_out(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "segments")
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png", "file_first")
        wait_for(lambda: shown(browser, "segments") != before)
        picture = browser.find_element(By.CSS_SELECTOR, "#segments img")
        wait_for(lambda: browser.execute_script("return arguments[0].naturalWidth", picture) == 384)
        assert browser.execute_script("return arguments[0].naturalHeight", picture) == 192
        assert len(browser.find_elements(By.CSS_SELECTOR, "#gallery .grid-container img")) == 4

    def test_a_slot_is_left_out(self, browser, address):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "painted")
        browser.find_element(By.CSS_SELECTOR, "#keep input[type=checkbox]").click()
        wait_for(lambda: shown(browser, "painted") not in (None, before))

    def test_fewer_slots(self, browser, address):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.open(browser, address)
        number = browser.find_element(By.CSS_SELECTOR, "#num_slots input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys("3", Keys.TAB)
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#gallery .grid-container img")) == 3)
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#keep input[type=checkbox]")) == 3)

    def test_two_images_are_mixed(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        tab = next(b for b in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if "Mix" in b.text)
        tab.click()
        wait_for(lambda: shown(browser, "mixed"))
        before = shown(browser, "mixed")
        make_image(seed=3).save(tmp_path / "second.png")
        upload(browser, tmp_path / "second.png", "file_second")
        wait_for(lambda: shown(browser, "mixed") != before)
        before = shown(browser, "mixed")
        browser.find_element(By.CSS_SELECTOR, "#mix_second input[type=checkbox]").click()
        wait_for(lambda: shown(browser, "mixed") != before)

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, browser, address, kind, tmp_path):
        self.open(browser, address)
        check_hostile_files(browser, kind, tmp_path, "segments", "file_first")


@pytest.mark.slow
class TestBrowserWithDiffusion:
    def label(self, browser, name):
        label = f"document.querySelector('#{name} [data-testid=block-label]')"
        return browser.execute_script(f"return {label}?.innerText ?? ''").strip()

    def ticked(self, browser, name):
        boxes = f"[...document.querySelectorAll('#{name} input[type=checkbox]')]"
        return browser.execute_script(f"return {boxes}.map(box => box.checked)")

    def seed(self, browser):
        from selenium.webdriver.common.by import By

        return browser.find_element(By.CSS_SELECTOR, "#noise input")

    def write_seed(self, browser, text):
        from selenium.webdriver.common.keys import Keys

        self.seed(browser).send_keys(Keys.CONTROL, "a")
        self.seed(browser).send_keys(text, Keys.TAB)

    def wait(self, browser, *names):
        """Until nothing is drawn any more: the pictures have stayed the same for a second."""
        state = before = None
        while before is None or state != before or not all(each[1] and each[2] for each in state):
            before = state
            state = [(name, shown(browser, name), "step" not in self.label(browser, name)) for name in names]
            time.sleep(1)
        return [each[1] for each in state]

    @pytest.fixture
    def page(self, browser, address):
        TestBrowser().open(browser, address)
        press(browser, "decoder", "diffusion")
        wait_for(lambda: self.label(browser, "reconstruction").startswith("Drawn from all slots"))
        wait_for(lambda: len(self.ticked(browser, "keep")) == 3)
        self.wait(browser, "reconstruction", "painted")
        self.write_seed(browser, "0")  # with it, these pictures change with the slots
        self.wait(browser, "reconstruction", "painted")
        return browser

    def test_choosing_it_changes_the_whole_page_and_back(self, page):
        from selenium.webdriver.common.by import By

        assert self.label(page, "gallery") == "What each slot attends to"
        assert len(page.find_elements(By.CSS_SELECTOR, "#gallery .grid-container img")) == 3
        assert self.seed(page).is_displayed() and "Pipeline" in page.page_source
        press(page, "decoder", "broadcast")
        wait_for(lambda: len(self.ticked(page, "keep")) == 4 and self.label(page, "painted").startswith("Painted"))
        wait_for(lambda: not page.find_elements(By.CSS_SELECTOR, "#noise input"))
        assert self.label(page, "reconstruction") == "Reconstruction"

    def test_a_slot_is_left_out_with_the_same_noise(self, page):
        from selenium.webdriver.common.by import By

        seed, (whole, before) = self.seed(page).get_attribute("value"), self.wait(page, "reconstruction", "painted")
        page.find_element(By.CSS_SELECTOR, "#keep input[type=checkbox]").click()
        wait_for(lambda: shown(page, "painted") != before)
        again, painted = self.wait(page, "reconstruction", "painted")
        assert again == whole and painted != before and self.seed(page).get_attribute("value") == seed
        page.find_element(By.CSS_SELECTOR, "#keep input[type=checkbox]").click()
        wait_for(lambda: shown(page, "painted") == before)

    def test_frames_come_live(self, page):
        labels = set()
        page.find_element("id", "other_noise").click()

        def seen():
            labels.add(self.label(page, "reconstruction"))
            return len(labels) > 3

        wait_for(seen, seconds=60)
        assert any("· step " in label and label.endswith(" of 20") for label in labels)

    def test_no_slot_is_a_sentence(self, page):
        from selenium.webdriver.common.by import By

        for box in page.find_elements(By.CSS_SELECTOR, "#keep input[type=checkbox]"):
            box.click()
        wait_for(lambda: "No slot is left to draw from" in page.page_source)

    def test_the_seed_is_shown_and_kept(self, page):
        before = self.wait(page, "reconstruction")
        self.write_seed(page, "12")
        wait_for(lambda: shown(page, "reconstruction") != before[0])
        twelve = self.wait(page, "reconstruction")
        page.find_element("id", "other_noise").click()
        wait_for(lambda: self.seed(page).get_attribute("value") != "12")
        assert self.wait(page, "reconstruction") != twelve
        self.write_seed(page, "12")
        wait_for(lambda: shown(page, "reconstruction") == twelve[0])
        self.write_seed(page, "-3")
        wait_for(lambda: "The noise seed -3 is out of range" in page.page_source)
        self.write_seed(page, "12")
        page.find_element("css selector", "#keep_noise input").click()
        page.find_element("id", "draw_first").click()
        wait_for(lambda: shown(page, "reconstruction") not in (None, twelve[0]))
        self.wait(page, "reconstruction")
        assert self.seed(page).get_attribute("value") == "12"
        assert not page.find_element("id", "other_noise").is_enabled()

    def test_swap_and_insert(self, page):
        from selenium.webdriver.common.by import By

        next(b for b in page.find_elements(By.CSS_SELECTOR, "button[role=tab]") if "Mix" in b.text).click()
        wait_for(lambda: shown(page, "mixed"))
        inserted = self.wait(page, "mixed")
        assert (self.ticked(page, "mix_first"), self.ticked(page, "mix_second")) == ([True] * 3, [False, True, False])
        page.find_element("id", "swap").click()
        wait_for(lambda: self.ticked(page, "mix_first") == [True, False, True])
        wait_for(lambda: shown(page, "mixed") != inserted[0])  # the frames on the way, if not the end
        self.wait(page, "mixed")
        page.find_element("id", "insert").click()
        wait_for(lambda: shown(page, "mixed") == inserted[0])

    def test_in_haste(self, page):
        """Clicks that come faster than pictures: in the end, all is of the latest."""
        from selenium.webdriver.common.by import By

        before = self.wait(page, "painted")
        for _ in range(3):
            page.find_element(By.CSS_SELECTOR, "#keep input[type=checkbox]").click()
            page.find_element("id", "other_noise").click()
        press(page, "decoder", "broadcast")
        press(page, "decoder", "diffusion")
        page.find_element("id", "draw_first").click()
        end = "Drawn from these slots alone"
        wait_for(
            lambda: (
                self.ticked(page, "keep") == [True] * 3
                and shown(page, "reconstruction") == shown(page, "painted") not in (None, *before)
                and self.label(page, "painted") == end
            )
        )
        assert "not in the list of choices" not in page.page_source
