import inspect
import re
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image
from transformers import HfArgumentParser

from hf_dl.data import scenes
from hf_dl.demo import slot_explorer, slots
from hf_dl.demo.decoders import Diffusion
from hf_dl.demo.page import event
from hf_dl.demo.scene_truth import match_slots, render_moved, render_selection, squared_error
from hf_dl.demo.slot_explorer import Explorer, make_training, show_first, show_mix
from hf_dl.demo.slots import get_frame, load_scene, move_slot
from hf_dl.demo.welcome import welcome_text
from scripts.train_slots import Args

from ..pipelines.test_slot_diffusion import make_pipe
from ..spaces.pages import ROOT, make_image, wait_for, write_script
from .tiny import explain_perfectly, make_slots

# diffusers 0.42 passes a tensor to np.array in set_timesteps of DPM-Solver++.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def welcome(explorer):
    return welcome_text(explorer, kind="a slot autoencoder", space="slot_explorer")


def drawn(frames):
    """Return the final picture."""
    *_, last = frames
    return last.picture


class TestTwoDecoders:
    @pytest.fixture
    def explorer(self, model, pipe):
        return Explorer(model, pipe=pipe)

    @pytest.fixture
    def two(self, explorer):
        found = [explorer.get("diffusion").explain(make_image(seed=seed)) for seed in (1, 2)]
        found[0].seed = 0
        return found

    def test_which_there_are(self, model, pipe, tmp_path):
        both, one, other = (
            Explorer(model, pipe=pipe), Explorer(model, root=tmp_path),
            Explorer(None, root=tmp_path, pipe=pipe),
        )  # fmt: skip
        assert both.ready and one.ready and other.ready
        assert (both.default, one.default, other.default) == ("broadcast", "broadcast", "diffusion")
        assert list(both.decoders) == ["broadcast", "diffusion"] and not both.missing_text()
        with pytest.raises(
            ValueError, match="The diffusion decoder has no model yet. Train one, or set HF_DL_DIFFUSION_MODEL"
        ):
            one.get("diffusion")
        assert "set <code>HF_DL_DIFFUSION_MODEL</code> to a Hub id" in one.missing_text()  # on a Space
        for name in ("train_slots.py", "train_slot_diffusion.py"):
            write_script(tmp_path, name, "")
        one, other = Explorer(model, root=tmp_path), Explorer(None, root=tmp_path, pipe=pipe)
        command = "<code>scripts/run accelerate launch scripts/"
        assert f"{command}train_slot_diffusion.py --prepare</code>" in one.missing_text()
        assert f"{command}train_slots.py</code>" in other.missing_text()

    def test_a_problem_is_said(self, model, tmp_path):
        for explorer in (
            Explorer(model, pipe_problem="The <pipeline> is damaged."),
            Explorer(None, "The <pipeline> is damaged.", pipe=make_pipe()),
        ):
            assert explorer.ready and "The &lt;pipeline&gt; is damaged." in explorer.missing_text()
        neither = Explorer(None, root=tmp_path, pipe_problem="The <pipeline> is damaged.")
        assert not neither.ready and "The &lt;pipeline&gt; is damaged." in welcome(neither)

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
        (shown,) = explorer.paint(explorer.get("broadcast").explain(make_image()), [0, 1])
        assert shown["label"] == "Painted from the selected slots"
        shown = list(explorer.paint(two[0], [0, 1], 5, True, 3))
        labels = [f"Drawn from the selected slots · step {step} of 3" for step in (1, 2, 3)]
        assert [each["label"] for each in shown] == [*labels, "Drawn from the selected slots"]
        expected = drawn(Diffusion(explorer.get("diffusion").pipe).frames((two[0], [0, 1]), seed=5, steps=3))
        assert shown[-1]["value"].tobytes() == expected.tobytes()

    def test_slots_of_two_decoders_are_not_mixed(self, explorer, two):
        other = explorer.get("broadcast").explain(make_image())
        assert list(explorer.mix(two[0], other, [0], [0])) == []
        assert list(explorer.swap(other, two[0], 0, 0)) == list(explorer.insert(None, other, 0)) == []
        assert list(explorer.mix_in_steps(two[0], other)) == []
        assert explorer.mix_afresh(two[0], other) == gr.skip()
        assert show_mix(explorer.begin_mixing(two[0], other)) == gr.skip()

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
            and alone["value"].tobytes() == explorer.get("broadcast").at_once((broadcast, [0, 1, 2, 3])).tobytes()
        )
        assert list(explorer.paint_afresh(None)) == list(explorer.paint_again(None, [])) == []

    def test_edits_keep_the_noise(self, explorer, two):
        found = two[0]
        *_, (whole, alone) = explorer.paint_again(found, [0, 2], 0, False, 3)
        assert whole == gr.skip()
        fresh = Diffusion(explorer.get("diffusion").pipe)
        expected = drawn(fresh.frames((found, [0, 2]), seed=found.seed, steps=3))
        assert alone["value"].tobytes() == expected.tobytes()
        *_, mixed = explorer.mix(*two, [0, 2], [1], 0, False, 3)
        expected = drawn(fresh.frames((found, [0, 2]), (two[1], [1]), seed=found.seed, steps=3))
        assert mixed["value"].tobytes() == expected.tobytes()
        assert mixed["value"].tobytes() != alone["value"].tobytes()

    def test_the_seed_is_new_or_kept(self, explorer, monkeypatch):
        seeds = iter(range(100, 200))
        monkeypatch.setattr(slots.secrets, "randbelow", lambda _: next(seeds))
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
                event(explorer.set_noise)(first, wrong)
            with pytest.raises(gr.Error, match=f"The noise seed {wrong} is out of range"):
                list(event(explorer.paint)(second, [0], wrong, True, 1))
        assert first.seed == 55
        explorer.set_noise(None, 3)
        assert explorer.renew_noise(None) == gr.skip()

    def test_no_slot_is_a_sentence(self, explorer, two):
        assert inspect.isgeneratorfunction(event(explorer.paint))
        with pytest.raises(gr.Error, match="No slot is selected"):
            list(event(explorer.paint)(two[0], []))

    def test_diffusion_starts_with_one_object_of_the_second(self, explorer, two):
        first, second, picture = explorer.mix_afresh(*two)
        assert (first.value, second.value, picture) == ([0, 1, 2], [1], None)
        *_, noted_first, noted_second, _, mine, theirs = show_mix(explorer.begin_mixing(*two))
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


class TestFind:
    """The paths of `checkpoints` are tested there; here is the pair of decoders."""

    def test_environment_then_bundled_then_runs(self, model, pipe, tmp_path, monkeypatch):
        space, root = tmp_path / "space", tmp_path / "root"
        assert not Explorer.find(space=space, root=root).ready
        pipe.save_pretrained(root / "runs" / "drawn")
        assert list(Explorer.find(space=space, root=root).decoders) == ["diffusion"]  # its encoder has no decoder
        model.save_pretrained(space / "model")
        assert list(Explorer.find(space=space, root=root).decoders) == ["broadcast", "diffusion"]
        monkeypatch.setenv("HF_DL_MODEL", str(tmp_path / "nowhere"))
        monkeypatch.setenv("HF_DL_DIFFUSION_MODEL", str(space / "model"))
        found = Explorer.find(space=space, root=root)
        assert not found.ready and "nowhere' was not found" in found.problem and "cannot be loaded" in found.problem
        assert "nowhere" in welcome(found)


class TestExplorer:
    def test_scenes_are_computed_once_but_noise_is_not_shared(self, model, monkeypatch):
        explorer = Explorer(model)
        first, again = (explorer.draw("plain", 3, 4, 3) for _ in range(2))
        assert first.slots is again.slots and first is not again
        explorer.set_noise(first, 5)
        assert again.seed != 5 or explorer.draw("plain", 3, 4, 3).seed != 5
        assert explorer.draw("plain", 3, 3, 3).slots is not first.slots

    def test_the_message_for_a_value_error(self, model):
        explorer = Explorer(None)
        with pytest.raises(gr.Error, match="no model yet") as caught:
            event(explorer.draw)("plain", 0, 4, 3)
        assert caught.value.print_exception is False

    def test_second_image_starts_without_its_background(self, model, broadcast):
        found = broadcast.explain(make_image())
        first, second, picture = Explorer(model).mix_afresh(found, found)
        assert (first.value, second.value) == ([0, 1, 2, 3], [1, 2, 3])
        assert picture.tobytes() == broadcast.at_once((found, first.value), (found, second.value)).tobytes()

    def test_with_scripts_it_offers_to_train(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "")
        explorer = Explorer(None, root=tmp_path)
        assert explorer.can_train and explorer.training.shown in re.sub("</?span>", "", welcome(explorer))

    def test_without_scripts_it_asks_for_a_model(self, tmp_path):
        explorer = Explorer(None, root=tmp_path)
        assert not explorer.can_train and "HF_DL_MODEL" in welcome(explorer)

    def test_a_problem_is_said(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "")
        explorer = Explorer(None, "The model 'x' was not <found>.", tmp_path)
        assert not explorer.can_train and "was not &lt;found&gt;." in welcome(explorer)


class TestUnusedSlots:
    def test_they_are_not_selected(self, broadcast):
        found = broadcast.explain(make_image())
        found.used = [0, 1, 2]
        *_, boxes, ticks = show_first(found)
        assert boxes.value == ticks == [0, 1, 2]
        assert [name for name, _ in boxes.choices][2:] == [f"Slot 3 · {found.shares[2]:.0%}", "Slot 4 · unused"]
        explorer = Explorer(broadcast.model)
        (first, second), edits = explorer.begin(found, found), explorer.swap(found, found, 1, 2)
        assert (first, second) == ([0, 1, 2], [1, 2]) and next(edits)[2:4] == ([0, 2], [2])
        ((_, whole, alone),) = explorer.paint_afresh(found)
        assert whole == gr.skip() and alone["value"] == broadcast.at_once((found, [0, 1, 2]))


class TestMove:
    @pytest.fixture
    def explorer(self, model, pipe):
        return Explorer(model, pipe=pipe)

    @pytest.mark.parametrize("kind", ["broadcast", "diffusion"])
    def test_move(self, explorer, kind):
        found = explorer.get(kind).explain(make_image(), num_slots=3)
        slot, x, y, scale, controls, sentence = explorer.begin_moving(found)
        assert (slot.value, scale, controls.visible, sentence.visible) == (1, 1, True, False)
        assert [value for _, value in slot.choices] == [0, 1, 2]
        assert (x, y) == pytest.approx(get_frame(found, 1)[:2], abs=5e-4)
        assert explorer.choose_moving(found, 2)[:2] == pytest.approx(get_frame(found, 2)[:2], abs=5e-4)
        *_, before = explorer.move(found, 1, x, y, 1, 0, True, 3)
        *_, whole = explorer.paint(found, [0, 1, 2], 0, True, 3)
        assert before["value"] == whole["value"]
        *steps, after = explorer.move(found, 1, 0.9, 0.1, 1.5, 0, True, 3)
        moved = move_slot(found, 1, 0.9, 0.1, 1.5)
        *_, expected = explorer.get(kind).frames((moved, [0, 1, 2]), seed=0, steps=3)
        assert after["value"] == expected.picture != before["value"]
        assert after["label"].endswith("with the moved slot")
        assert len(steps) == (0 if kind == "broadcast" else 3)

    def test_without_frames(self):
        explorer = Explorer(make_slots(frames=False))
        found = explorer.get("broadcast").explain(make_image())
        *_, controls, sentence = explorer.begin_moving(found)
        assert not controls.visible and sentence.visible
        assert list(explorer.move(found, 0, 0.5, 0.5, 1)) == []
        assert explorer.choose_moving(found, 0) == (gr.skip(),) * 3
        assert explorer.check_move(found, 0, 0.5, 0.5, 1) == gr.skip()

    def test_nothing_to_move(self, explorer):
        found = explorer.get("broadcast").explain(make_image())
        assert explorer.begin_moving(None) == explorer.check_move(None, None, 0, 0, 1) == gr.skip()
        for slot in (None, 4):  # the page has no slot yet, or one of the previous image
            assert list(explorer.move(found, slot, 0.5, 0.5, 1)) == list(explorer.move(None, slot, 0.5, 0.5, 1)) == []

    def test_an_unused_slot_is_painted_too(self, explorer, broadcast):
        found = broadcast.explain(make_image())
        found.used = [0, 1]
        (shown,) = explorer.move(found, 3, 0.1, 0.1, 1)
        assert shown["value"] == broadcast.at_once((move_slot(found, 3, 0.1, 0.1), [0, 1, 3]))


class TestTruth:
    """A perfect model made the slots; the tiny decoder that paints them is not perfect."""

    @pytest.fixture
    def explorer(self, model, pipe):
        return Explorer(model, pipe=pipe)

    @pytest.fixture
    def two(self):
        return [explain_perfectly(load_scene("plain", seed)) for seed in (0, 1)]

    def test_the_scene_of_a_drawn_image_is_known(self, explorer):
        found = explorer.draw("plain", 3, 4, 3)
        assert found.scene["image"] is found.image and found.scene["objects"]
        again = explorer.again(found, found, 3, 2, "diffusion")
        assert [each.scene is found.scene for each in again] == [True, True]

    def test_removal(self, explorer, two):
        found = two[0]
        keep = [slot for slot in found.used if slot != 1]
        picture, text = explorer.check_selection(found, keep)
        truth = render_selection((found, keep))
        expected = truth.image.resize(found.segments.size, Image.Resampling.BICUBIC)
        assert picture["visible"] and picture["value"] == expected
        painted = explorer.get("broadcast").at_once((found, keep))
        error, before = (squared_error(image, truth.image, size=16) for image in (painted, found.image))
        assert text == f"{truth.text} Squared error: {error:.4f}. Unedited image: {before:.4f}."
        picture, text = explorer.check_selection(found, found.used)
        assert "The original scene. Squared error: " in text and "Unedited" not in text

    def test_what_has_no_true_result_is_a_sentence(self, explorer, two):
        picture, text = explorer.check_selection(two[0], two[0].used[1:])
        assert text == "Slot 1 covers the background, so this edit has no true result."
        assert not picture["visible"] and picture["value"] is None

    def test_photos_have_none(self, explorer, two):
        photo = explorer.get("broadcast").explain(make_image())
        for picture, text in (
            explorer.check_selection(photo, [0, 1]),
            explorer.check_move(photo, 1, 0.5, 0.5, 1),
            explorer.check_mix(photo, two[0], [0], [1]),
            explorer.check_mix(two[0], photo, two[0].used, [1]),
        ):
            assert text == "" and not picture["visible"]
        assert explorer.check_mix(two[0], photo, two[0].used, [])[1].startswith("The original scene.")

    def test_nothing_yet(self, explorer, two):
        assert explorer.check_selection(None, []) == explorer.check_mix(None, two[0], [], []) == gr.skip()
        assert explorer.check_selection(two[0], [9]) == gr.skip()  # the boxes of another image
        assert explorer.check_selection(two[0], [])[1].startswith("Slot 1 covers the background")

    def test_exchange(self, explorer, two):
        first, second = two
        texts, keep = [], [slot for slot in first.used if slot != 1]
        for theirs in second.used[1:]:
            picture, text = explorer.check_mix(first, second, keep, [theirs])
            texts.append(text)
            if picture["visible"]:
                truth = render_selection((first, keep), (second, [theirs]))
                assert text.startswith(f"{truth.text} Squared error: ") and " and with the " in text
            else:
                assert "would overlap" in text
        assert any("Squared error" in text for text in texts)

    def test_move(self, explorer, two):
        found = two[0]
        moves = [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.4, 0.7)]
        checked = [explorer.check_move(found, 1, x, y, 1.5) for x, y in moves]
        seen = [(place, *each) for place, each in zip(moves, checked, strict=True) if each[0]["visible"]]
        assert seen and all("would overlap" in text for picture, text in checked if not picture["visible"])
        for place, picture, text in seen:
            truth = render_moved(found, 1, *place)
            assert picture["value"] == truth.image.resize(found.segments.size, Image.Resampling.BICUBIC)
            assert text.startswith(f"{truth.text} Squared error: ")
            assert text.endswith(" The rendered object keeps its size.")
        (x, y, _), index = get_frame(found, 1), match_slots(found)[1] - 1
        text = explorer.check_move(found, 1, round(x, 3), round(y, 3), 1)[1]
        assert text.startswith("The original scene. Squared error: ") and "size" not in text
        assert scenes.counterfactual(found.scene, remove=index)["image"] != found.scene["image"]

    def test_diffusion_is_measured_after_it_has_drawn(self, explorer):
        found = explorer.draw("plain", 0, 3, 3, "diffusion")
        found.labels = explain_perfectly(found.scene, [[0], [1], [2]]).labels
        keep, settings = [0, 1], (found.seed, True, 3)
        picture, text = explorer.check_selection(found, keep, *settings)
        assert picture["visible"] and "Squared error" not in text
        *_, last = explorer.paint(found, keep, *settings)
        picture, text = explorer.check_selection(found, keep, *settings)
        truth = render_selection((found, keep))
        assert f" Squared error: {squared_error(last['value'], truth.image, size=16):.4f}." in text


class TestReplay:
    @pytest.fixture
    def explorer(self, model, pipe, monkeypatch):
        monkeypatch.setattr(slot_explorer, "PAUSE", 0)
        return Explorer(model, pipe=pipe)

    @pytest.mark.parametrize("steps", [1, 4, 50])
    def test_all_frames_of_a_drawing(self, explorer, steps):
        found = explorer.get("diffusion").explain(make_image())
        settings = found.seed, True, steps
        assert list(explorer.replay(found, *settings)) == list(explorer.replay(None, *settings)) == []
        drawn = [whole for _, whole, _ in explorer.paint_afresh(found, *settings)]
        shown = list(explorer.replay(found, *settings))
        assert shown == drawn and len(shown) > 1
        assert shown[0]["label"].startswith("Drawn from all slots · step ")
        assert shown[-1]["label"] == "Drawn from all slots"


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
        explorer = Explorer(None, root=tmp_path)
        assert not explorer.ready
        explorer.training.start()
        first = explorer.training.process
        try:
            explorer.training.start()  # a second click
            assert explorer.training.process is first
            wait_for(lambda: explorer.training.progress()[0])
            assert explorer.training.progress() == (0.25, "Step 25 of 100 · loss 0.1 · foreground ARI 0.9")
            assert "width: 25.0%" in welcome(explorer)
            (explorer.training.folder / "go").touch()
            wait_for(lambda: not explorer.training.running)
        finally:
            first.kill()
        assert explorer.ready and explorer.get("broadcast").config.num_slots == 4
        assert not explorer.training.failure()

    def test_the_real_script_takes_the_flags(self, tmp_path):
        command = make_training(ROOT).command
        assert Path(command[1]).is_file()
        (args,) = HfArgumentParser(Args).parse_args_into_dataclasses(command[2:])
        assert args.resume and Path(args.output_dir).parent.name == "runs"

    def test_a_failure_is_said(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "raise SystemExit('The disk is full.')")
        explorer = Explorer(None, root=tmp_path)
        explorer.training.start()
        explorer.training.process.wait(60)
        assert not explorer.ready and explorer.can_train
        assert "Training failed: The disk is full." in welcome(explorer)

    def test_stop(self, tmp_path):
        write_script(tmp_path, "train_slots.py", "import time\ntime.sleep(60)")
        training = make_training(tmp_path)
        training.start()
        training.stop()
        assert training.process.wait(30) != 0 and not training.running
        assert training.failure() == "Training was stopped before its first step."
