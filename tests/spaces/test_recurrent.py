import json
import re
import shutil
import time

import gradio as gr
import pytest
from PIL import Image
from transformers import HfArgumentParser

from hf_dl.demo import captioner, characters, gradients
from hf_dl.demo.captioner import draw_scenes
from hf_dl.demo.characters import train
from hf_dl.demo.page import event
from hf_dl.publishing.command import main as publish

from ..demo.tiny import save_captioner
from .pages import (
    HOSTILE,
    ROOT,
    as_url,
    build_demo,
    call_tool,
    check_hostile_files,
    check_space,
    check_unknown_model,
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

app = load_app("recurrent")
TOOLS = ["caption", "generate", "cells", "gradient_flow"]
HTML = "<img src=x onerror=alert(1)>"
TEXT = 'The owl sees a jay (a girl).\nAnn said "I call a bird." Ben said "we see a jay."\nA goat (a king) hears.'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a model of characters that was trained for two steps."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "SENTENCES", 300)
        train("lstm", root / "runs" / "recurrent_characters" / "lstm", steps=2)
    return root


@pytest.fixture
def explorer(folder, root, monkeypatch):
    monkeypatch.setenv("HF_DL_MODEL", str(folder))
    monkeypatch.delenv("HF_DL_TEXT_MODEL", raising=False)
    return app.Explorer(root, steps=2)


class TestExplorer:
    def test_the_first_scene_has_beams_maps_and_truth(self, explorer):
        scene, image, name, line, beams, sentence, words, truth = explorer.start(0, 3)
        assert scene is draw_scenes(0)[0] and image is scene.image and name == explorer.models.default
        assert "attention" in line and [place for _, place in beams] == [0, 1, 2]
        assert sentence.startswith("### ") and "Found 0 of" in sentence
        assert words.count("<img") == words.count("<figure") > 1 and "the caption says" in truth

    def test_another_beam_needs_no_search(self, explorer, monkeypatch):
        scene, *_, words, truth = explorer.start(0, 3)
        monkeypatch.setattr(captioner, "search", None)
        sentence, others, _ = explorer.choose_beam(scene, explorer.models.default, 3, 2)
        assert sentence and others != words and truth

    def test_an_upload_has_no_truth(self, explorer, tmp_path):
        make_image().save(tmp_path / "a.png")
        scene, image, beams, sentence, words, truth = explorer.open(str(tmp_path / "a.png"), None, 1)
        assert scene.image is image and len(beams) == 1 and truth == "" and "Found" not in sentence

    def test_without_an_image_nothing_changes(self, explorer):
        assert len(explorer.describe(None, None, 3)) == 4

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, explorer, kind, tmp_path):
        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(gr.Error, match=HOSTILE[kind]) as caught:
            event(explorer.open)(str(tmp_path / "a.png"), None, 1)
        assert caught.value.print_exception is False

    def test_a_model_of_characters_opens_with_a_text(self, explorer):
        line, name, layers, cells, text, layer, unit, told, colored = explorer.open_text_model("lstm")
        assert "lstm" in line and (name, layers, cells) == ("lstm", 1, 64) and text == characters.held_out_text()
        assert layer == 0 and f"cell {unit}" in told and colored.count("<span style=") == len(text)

    def test_another_model_writes_its_own_text(self, explorer, root):
        name = str(root / "runs" / "recurrent_characters" / "lstm")
        _, _, _, _, text, *_, colored = explorer.open_text_model(name)
        assert text != characters.held_out_text() and colored.count("<span style=") == len(text)

    @pytest.mark.parametrize("prompt", ["naïve", "x" * 10_000])
    def test_hostile_prompts_get_a_sentence(self, explorer, prompt):
        with pytest.raises(gr.Error, match=r"does not have: 'ï'|has 10,000 characters"):
            event(explorer.write)("lstm", prompt, 10, 0.7, 0, 1.0, 0)
        with pytest.raises(gr.Error, match=r"does not have: 'ï'|has 10,000 characters"):
            event(explorer.color)("lstm", prompt, 0, 0)

    def test_the_dials_draw_one_curve_per_cell(self, explorer):
        assert explorer.flow(["lstm", "rnn"], 1.5, 20, 3, 0).count("<polyline") == 2
        assert explorer.flow([], 1.5, 20, 3, 0) == "<p>Choose at least one cell.</p>"
        with pytest.raises(gr.Error, match="length=5000 is out of range"):
            event(explorer.flow)(["rnn"], 1.5, 5000, 3, 0)


class TestPage:
    def test_with_a_model(self, explorer):
        assert build_demo(app, explorer).analytics_enabled is False

    def test_without_a_model_the_curves_are_there(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        page = build_demo(app, app.Explorer(tmp_path))
        values = [getattr(block, "value", None) for block in page.blocks.values()]
        assert any(isinstance(value, str) and value.count("<polyline") == 3 for value in values)


class TestEndpoints:
    @pytest.fixture
    def page(self, explorer):
        return build_demo(app, explorer)

    def test_caption(self, page, explorer, tmp_path):
        make_image().save(tmp_path / "a.png")
        caption = find_endpoint(page, "caption", tools=TOOLS)
        found = caption(image=tmp_path / "a.png", num_beams=2)
        with Image.open(tmp_path / "a.png") as image:
            expected = captioner.search(explorer.models.get(), image.convert("RGB"), 2)
        assert [each["caption"] for each in found["beams"]] == [beam.text for beam in expected]
        assert [each["word"] for each in found["words"]] == list(expected[0].words)
        with Image.open(found["words"][0]["map"]["path"]) as heat:
            assert heat.size == (60, 40)
        with pytest.raises(gr.Error, match="num_beams=99 is invalid. Input should be less than or equal to 10."):
            caption(image=tmp_path / "a.png", num_beams=99)

    def test_generate(self, page, explorer):
        generate = find_endpoint(page, "generate", tools=TOOLS, required=0)
        assert generate(prompt="Ann", length=5) == {
            "text": characters.write(explorer.texts.get("lstm"), "Ann", length=5)
        }
        with pytest.raises(gr.Error, match="cell='elman' is invalid. Input should be 'lstm', 'gru' or 'rnn'."):
            generate(cell="elman")

    def test_cells(self, page):
        cells = find_endpoint(page, "cells", tools=TOOLS)
        found = cells(text=TEXT)
        assert 0 <= found["cell"] < 64 and found["svg"].startswith("<svg") and len(found["activations"]) == len(TEXT)
        json.dumps(found)
        with pytest.raises(gr.Error, match="constant in one half"):
            cells(text="no quotes here")

    def test_gradient_flow(self, page):
        flow = find_endpoint(page, "gradient_flow", tools=TOOLS, required=0)
        found = flow(cell="rnn", length=10, spectral_radius=0.5)
        assert tuple(found["norms"]) == gradients.measure("rnn", 10, spectral_radius=0.5, forget_bias=None, seed=0)
        assert found["description"].startswith("vanishes") and len(flow()["norms"]) == 60
        with pytest.raises(gr.Error, match="spectral_radius=50.0 is out of range"):
            flow(spectral_radius=50)


class TestTraining:
    def test_the_real_script_takes_the_flags(self, monkeypatch):
        from scripts import train_captioner

        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        training = app.make_training(ROOT)
        (args,) = HfArgumentParser(train_captioner.Args).parse_args_into_dataclasses(training.command[2:])
        assert args.resume and args.output_dir == str(training.folder)

    def test_runs_of_the_script_are_found(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        shutil.copytree(folder, tmp_path / "runs" / "captions" / "0123abcd")
        assert app.Explorer(tmp_path).models.get().name == str(tmp_path / "runs" / "captions" / "0123abcd")


def test_publish_bundles_the_model(folder, capsys):
    words = [str(ROOT / "spaces" / "recurrent"), "user/recurrent", "--type", "space", "--dry_run"]
    assert publish([*words, "--model", str(folder)]) == 0, capsys.readouterr().err
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    names = ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert {f"model/{name}" for name in names} <= listed


def test_requirements_and_front_matter_fit_the_project():
    check_space("recurrent")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(folder, root, tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    shutil.copytree(root / "runs", place / "runs")
    with serve("recurrent", folder, place) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
class TestClients:
    def test_the_example_in_the_readme(self, address, tmp_path):
        found = run_example("recurrent", address, tmp_path)
        assert len(found["beams"]) == 3
        with Image.open(found["words"][0]["map"]) as heat:
            assert heat.size == (60, 40)

    def test_a_client_of_the_model_context_protocol(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        found = call_tool(address, "caption", tools=TOOLS, image=as_url(tmp_path / "a.png"))
        assert download(found["words"][0]["map"]).size == (60, 40)
        found = call_tool(address, "gradient_flow", tools=TOOLS, cell="lstm", forget_bias=5.0)
        assert found["norms"][-1] > 0.3
        sentence = call_tool(address, "cells", tools=TOOLS, text="naïve")
        assert "does not have: 'ï'" in sentence


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "words") and "Found" in text_of(browser, "sentence"))

    def choose_tab(self, browser, label):
        from selenium.webdriver.common.by import By

        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "button[role=tab]"))
        next(e for e in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if e.text.strip() == label).click()

    def set_number(self, browser, name, value):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        number = browser.find_element(By.CSS_SELECTOR, f"#{name} input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys(value, Keys.ENTER)

    def write(self, browser, name, text):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        box = browser.find_element(By.CSS_SELECTOR, f"#{name} textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.DELETE, text)

    def test_on_a_phone(self, browser, address):
        from selenium.webdriver.common.by import By

        with phone(browser):
            self.open(browser, address)
        with phone(browser):
            self.choose_tab(browser, "Characters")
            wait_for(lambda: "follows the property" in text_of(browser, "told"))
            wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#colored pre span"))
        with phone(browser):
            self.choose_tab(browser, "Gradients")
            wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#flow polyline"))

    def test_beams_and_examples(self, browser, address):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#beams label")) == 3)
        before = text_of(browser, "sentence")
        browser.find_elements(By.CSS_SELECTOR, "#beams label")[1].click()
        wait_for(lambda: text_of(browser, "sentence") not in ("", before))
        self.set_number(browser, "num_beams", "5")
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#beams label")) == 5)
        assert text_of(browser, "sentence") == before
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")) == 8)
        picture = shown(browser, "image")
        browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")[1].click()
        wait_for(lambda: shown(browser, "image") not in (None, picture))
        assert "closest object" in text_of(browser, "truth")

    def test_an_upload(self, browser, address, tmp_path):
        self.open(browser, address)
        before = shown(browser, "words")
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png")
        wait_for(lambda: shown(browser, "words") not in (None, before))
        wait_for(lambda: not text_of(browser, "truth"))

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, browser, address, kind, tmp_path):
        self.open(browser, address)
        check_hostile_files(browser, kind, tmp_path, "image")

    def test_an_unknown_model_gets_a_sentence(self, browser, address):
        self.open(browser, address)
        check_unknown_model(browser)

    def test_a_text_is_written_and_colored(self, browser, address):
        from selenium.webdriver.common.by import By

        browser.get(address)
        self.choose_tab(browser, "Characters")
        wait_for(lambda: "depth of brackets" in text_of(browser, "told"))
        press(browser, "property", "position")
        browser.find_element(By.ID, "find").click()
        wait_for(lambda: "position in the line" in text_of(browser, "told"))
        colors = "return document.querySelector('#colored').innerHTML"
        before = browser.execute_script(colors)
        self.set_number(browser, "unit", "63" if "cell 63" not in text_of(browser, "told") else "62")
        wait_for(lambda: browser.execute_script(colors) != before and not text_of(browser, "told"))
        self.write(browser, "prompt", "Cleo")
        browser.find_element(By.ID, "write").click()
        wait_for(lambda: text_of(browser, "colored").startswith("Cleo"))
        self.choose_tab(browser, "Gradients")
        self.choose_tab(browser, "Characters")
        time.sleep(2)
        assert text_of(browser, "colored").startswith("Cleo")  # the text stays
        self.write(browser, "prompt", f"naïve {HTML}")
        browser.find_element(By.ID, "write").click()
        wait_for(lambda: "that the training text does not have" in browser.page_source)
        assert "Traceback" not in browser.page_source
        assert not browser.execute_script("return document.querySelector('img[src=x]')")

    def test_the_dials_move_the_curves(self, browser, address):
        from selenium.webdriver.common.by import By

        browser.get(address)
        self.choose_tab(browser, "Gradients")
        wait_for(lambda: "LSTM" in text_of(browser, "flow"))
        before = text_of(browser, "flow")
        self.set_number(browser, "bias", "6")
        wait_for(lambda: "LSTM: grows" in text_of(browser, "flow"))
        self.set_number(browser, "radius", "0.2")
        wait_for(lambda: re.search("tanh: vanishes: below 1% after [1-4] step", text_of(browser, "flow")))
        press(browser, "cells", "ReLU")
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#flow polyline")) == 4)
        assert text_of(browser, "flow") != before

    def test_without_a_model_the_other_tabs_work(self, browser, tmp_path):
        """A model of characters is trained when the tab is opened; its texts are shown while it learns."""
        from selenium.webdriver.common.by import By

        with serve("recurrent", "", tmp_path) as (address, log):
            browser.get(address)
            wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#recorded figure")) > 2)
            wait_for(lambda: browser.find_elements(By.ID, "train"))
            self.choose_tab(browser, "Characters")
            wait_for(lambda: "After 1 step" in text_of(browser, "learning"))
            with phone(browser):
                wait_for(lambda: re.search("Step [0-9]{2}", text_of(browser, "learning")))
            wait_for(lambda: "follows the property" in text_of(browser, "told"), seconds=600)
            assert float(re.search(r"correlation is [+−-](\d.\d+)", text_of(browser, "told"))[1]) > 0.3
            assert "Traceback" not in log.read_text()
