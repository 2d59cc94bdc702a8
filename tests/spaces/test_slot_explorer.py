import time

import gradio as gr
import pytest
from PIL import Image

from hf_dl.demo.decoders import Broadcast, Diffusion
from hf_dl.demo.slot_explorer import Explorer
from hf_dl.publishing.command import main as publish

from ..demo.tiny import make_slot_pipe, make_slots
from .pages import (
    HOSTILE,
    ROOT,
    as_url,
    build_demo,
    call_tool,
    check_hostile_files,
    check_space,
    download,
    find_endpoint,
    load_app,
    make_image,
    phone,
    press,
    run_example,
    serve,
    shown,
    text_of,
    upload,
    wait_for,
    write_hostile,
)

SPACE = ROOT / "spaces" / "slot_explorer"
app = load_app("slot_explorer")


NO_TRUTH = "Slot {} covers no single object, so this edit has no true result."  # the model is untrained


@pytest.fixture(scope="module")
def model():
    return make_slots()


@pytest.fixture(scope="module")
def pipe():
    return make_slot_pipe()


class TestPage:
    def test_nothing_from_elsewhere_is_loaded(self, model):
        assert build_demo(app, Explorer(model)).analytics_enabled is False

    def test_the_page_is_built(self, model, pipe):
        for options in ({"pipe": pipe}, {}, {"pipe_problem": "It is damaged."}):
            for each in (model, None):
                demo = build_demo(app, Explorer(each, **options))
                (radio,) = (block for block in demo.blocks.values() if getattr(block, "elem_id", "") == "decoder")
                assert radio.visible == (each is not None and "pipe" in options)
                assert radio.value == ("diffusion" if each is None and "pipe" in options else "broadcast")

    def test_sliders_go_as_far_as_the_encoder(self, model, pipe):
        most, _ = app.sliders(Diffusion(pipe))
        assert (most.value, most.maximum) == (3, app.NUM_SLOTS)
        assert app.sliders(Broadcast(model))[0].maximum == 4

    def test_sliders_of_drawn_slots(self):
        drawn = Broadcast(make_slots(slot_init="gaussian", gradient="full"))
        assert app.sliders(drawn)[0].maximum == app.NUM_SLOTS


class TestEndpoint:
    def test_explain(self, model, pipe, tmp_path):
        explain = find_endpoint(build_demo(app, Explorer(model, pipe=pipe)), "explain")
        make_image().save(tmp_path / "a.png")
        found, expected = explain(image=tmp_path / "a.png"), Broadcast(model).explain(make_image())
        assert found["decoder"] == "broadcast"
        assert [(each["share"], each["used"]) for each in found["slots"]] == [
            (share, slot in expected.used) for slot, share in enumerate(expected.shares)
        ]
        for name in ("segments", "reconstruction"):
            with Image.open(found[name]["path"]) as picture:
                assert picture.tobytes() == getattr(expected, name).tobytes()
        assert len(explain(image=tmp_path / "a.png", num_slots=2, num_iterations=1)["slots"]) == 2
        with pytest.raises(gr.Error, match="num_iterations=99 is invalid. Input should be less than or equal to 10."):
            explain(image=tmp_path / "a.png", num_iterations=99)

    @pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
    def test_a_decoder_that_draws_in_steps(self, pipe, tmp_path):
        explain = find_endpoint(build_demo(app, Explorer(pipe=pipe)), "explain")
        make_image().save(tmp_path / "a.png")
        found = explain(image=tmp_path / "a.png")
        with Image.open(found["reconstruction"]["path"]) as picture:
            assert found["decoder"] == "diffusion" and picture.size == (384, 256)
        with pytest.raises(gr.Error, match="The broadcast decoder has no model yet"):
            explain(image=tmp_path / "a.png", decoder="broadcast")


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


@pytest.mark.slow
class TestClients:
    def test_the_example_in_the_readme(self, address, tmp_path):
        found = run_example("slot_explorer", address, tmp_path)
        assert sum(slot["share"] for slot in found["slots"]) == pytest.approx(1)
        for path in (found["segments"], found["reconstruction"]):
            with Image.open(path) as picture:
                assert picture.size == (384, 256)

    def test_a_client_of_the_model_context_protocol(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        found = call_tool(address, "explain", image=as_url(tmp_path / "a.png"), num_slots=3, decoder="diffusion")
        assert len(found["slots"]) == 3 and download(found["reconstruction"]).size == (384, 256)

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, address, kind, tmp_path):
        from gradio_client import Client, handle_file
        from gradio_client.exceptions import AppError

        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(AppError, match=HOSTILE[kind]):
            Client(address, verbose=False).predict(image=handle_file(tmp_path / "a.png"), api_name="/explain")


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "segments") and shown(browser, "painted"))

    def test_on_a_phone(self, browser, address):
        with phone(browser):
            self.open(browser, address)
            next(b for b in browser.find_elements("css selector", "button[role=tab]") if "Mix" in b.text).click()
            wait_for(lambda: shown(browser, "mixed"))

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
        boxes = browser.find_elements(By.CSS_SELECTOR, "#keep input[type=checkbox]")
        boxes[-1].click()  # a slot that the untrained model does not use
        wait_for(lambda: shown(browser, "painted") not in (None, before))
        boxes[-1].click()
        wait_for(lambda: shown(browser, "painted") == before)

    def test_a_scene_has_a_true_result_and_a_photo_has_none(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        wait_for(lambda: "The original scene. Squared error: 0." in text_of(browser, "painted_note"))
        assert shown(browser, "painted_truth")
        boxes = browser.find_elements(By.CSS_SELECTOR, "#keep input[type=checkbox]")
        boxes[-1].click()  # so that a slot is left
        boxes[0].click()
        wait_for(lambda: NO_TRUTH.format(1) in text_of(browser, "painted_note"))
        wait_for(lambda: not shown(browser, "painted_truth"))
        boxes[0].click()
        wait_for(lambda: shown(browser, "painted_truth"))
        make_image().save(tmp_path / "photo.png")
        upload(browser, tmp_path / "photo.png", "file_first")
        wait_for(lambda: not shown(browser, "painted_truth") and not text_of(browser, "painted_note").strip())

    def test_a_slot_is_moved(self, browser, address):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        def numbers():
            fields = "[...document.querySelectorAll('#x input[type=number], #y input[type=number]')]"
            return [float(text) for text in browser.execute_script(f"return {fields}.map(field => field.value)")]

        self.open(browser, address)
        next(b for b in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if b.text == "Move").click()
        wait_for(lambda: shown(browser, "moved") and NO_TRUTH.format(2) in text_of(browser, "moved_note"))
        assert not shown(browser, "moved_truth")
        before, (_, y) = shown(browser, "moved"), numbers()
        field = browser.find_element(By.CSS_SELECTOR, "#x input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("0.9", Keys.TAB)
        wait_for(lambda: shown(browser, "moved") not in (None, before))
        assert numbers() == [0.9, y]
        before, picture = shown(browser, "moved"), browser.find_element(By.CSS_SELECTOR, "#moved img")
        ActionChains(browser).move_to_element_with_offset(picture, -picture.size["width"] // 4, 0).click().perform()
        wait_for(lambda: shown(browser, "moved") not in (None, before))
        assert numbers() == pytest.approx([0.25, 0.5], abs=0.02)

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
        before = shown(browser, "segments_second")
        make_image(seed=3).save(tmp_path / "second.png")
        upload(browser, tmp_path / "second.png", "file_second")
        wait_for(lambda: shown(browser, "segments_second") != before)
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

        assert self.label(page, "gallery") == "Image area of each slot"
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

    def test_the_steps_are_played_again(self, page):
        (before,), labels = self.wait(page, "reconstruction"), []
        page.find_element("id", "play").click()

        def played():
            label = self.label(page, "reconstruction")
            labels.extend([label] if label not in labels[-1:] else [])
            return len(labels) > 3 and label == "Drawn from all slots"

        wait_for(played)
        assert sum("· step " in label for label in labels) >= 3 and shown(page, "reconstruction") == before

    def test_no_slot_is_a_sentence(self, page):
        from selenium.webdriver.common.by import By

        for box in page.find_elements(By.CSS_SELECTOR, "#keep input[type=checkbox]"):
            box.click()
        wait_for(lambda: "No slot is selected" in page.page_source)

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
        end = "Drawn from the selected slots"
        wait_for(
            lambda: (
                self.ticked(page, "keep") == [True] * 3
                and shown(page, "reconstruction") == shown(page, "painted") not in (None, *before)
                and self.label(page, "painted") == end
            )
        )
        assert "not in the list of choices" not in page.page_source
