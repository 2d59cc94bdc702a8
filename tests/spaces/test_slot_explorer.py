import json
import os
import shutil
import time
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from scripts.publish import main as publish

from .pages import (
    HOSTILE,
    ROOT,
    build_demo,
    check_hostile_files,
    check_space,
    load_app,
    make_image,
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


app = load_app("slot_explorer")


def make_model(**options):
    torch.manual_seed(0)
    return SlotAutoencoderModel(SlotAutoencoderConfig(**{**TINY, **options})).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


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

    def test_segments_show_one_colour_a_slot(self, model):
        image = Image.new("RGB", (384, 384), "black")
        found = app.explain(model, image)
        pixels = np.asarray(found.segments).reshape(-1, 3)
        for share, colour in zip(found.shares, app.SEGMENT_COLOURS, strict=False):
            shown = (pixels == (0.6 * colour).astype(np.uint8)).all(axis=1).mean()
            assert shown == pytest.approx(share, abs=0.1) and shown <= share

    def test_reconstruction_is_the_models(self, model):
        found = app.explain(model, make_image((16, 16)))
        expected = model.decode(found.slots)[0].permute(1, 2, 0).numpy()
        small = np.asarray(found.reconstruction.resize((16, 16), Image.Resampling.BOX)) / 255
        assert np.abs(small - expected).mean() < 0.03

    def test_largest_slot_comes_first(self, model):
        found = app.explain(model, make_image())
        _, masks = model.decode_parts(found.slots)
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
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    model.save_pretrained(folder / "model")
    with serve("slot_explorer", folder / "model", folder) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


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
