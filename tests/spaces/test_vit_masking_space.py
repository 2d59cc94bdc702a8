from pathlib import Path

import gradio as gr
import pytest
import torch
from PIL import Image
from transformers import HfArgumentParser

from hf_dl.demo.classifiers import load_classifier
from hf_dl.demo.masking import Choice, format_patches
from hf_dl.demo.page import event
from hf_dl.demo.pictures import Picture, draw_examples
from hf_dl.explain import WAYS
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification, image_processor
from hf_dl.models.small_vit import SmallViTConfig, SmallViTForImageClassification, SmallViTImageProcessor
from hf_dl.publishing.command import main as publish

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
    write_script,
)

app = load_app("vit_masking")
NAMES = ["cat", "dog", "bird", "fish", "cow", "hen", "fox"]
SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def save_model(folder):
    torch.manual_seed(0)
    config = SmallViTConfig(**SIZES, intermediate_size=24, initializer_range=0.5, id2label=dict(enumerate(NAMES)))
    SmallViTForImageClassification(config).save_pretrained(folder)
    SmallViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def classifier(folder):
    return load_classifier(str(folder))


@pytest.fixture
def explorer(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DL_MODEL", str(folder))
    return app.Explorer(tmp_path)


class TestExplorer:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refuses_in_a_sentence(self, explorer, kind, tmp_path):
        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(gr.Error, match=HOSTILE[kind]) as caught:
            event(explorer.open)(str(tmp_path / "a.png"), None, "top", 3)
        assert caught.value.print_exception is False

    def test_a_model_without_attention(self, explorer, tmp_path):
        config = NormResNetConfig(n=1, widths=[4, 8, 8], image_size=16)
        NormResNetForImageClassification(config).save_pretrained(tmp_path)
        image_processor(config).save_pretrained(tmp_path)
        with pytest.raises(gr.Error) as caught:
            event(explorer.load)(str(tmp_path), Picture(make_image()))
        assert caught.value.message == (
            f"The model '{tmp_path}' does not fit this page, which needs a vision transformer with a CLS token, "
            "such as google/vit-base-patch16-224."
        )

    def test_an_unknown_model(self, explorer):
        with pytest.raises(gr.Error, match="The model '/no/such/model' was not found"):
            event(explorer.load)("/no/such/model", Picture(make_image()))

    def test_start(self, explorer):
        classifier, choice, picture, found = explorer.start(0)
        assert choice == Choice("top", 2, layer=3) and len(found.patches) == 2
        assert picture is draw_examples(0)[0] and picture.truth in app.summarize(picture, found)

    def test_clicks_take_and_give_back(self, explorer):
        picture = Picture(make_image())
        first = explorer.compare(picture, None, "center", 4)
        assert first.patches == [5, 6, 9, 10]
        second = explorer.toggle((5, 5), picture, None, "center", 4)
        assert second.patches == [0, 5, 6, 9, 10]
        third = explorer.toggle((150, 150), picture, None, "chosen", 4, 0, format_patches(second.patches))
        assert third.patches == [0, 6, 9, 10]

    def test_sentences(self, explorer):
        picture = Picture(make_image())
        none = explorer.compare(picture, None, "top", 0)
        assert "No patch is masked" in app.summarize(picture, none)
        texts = set()
        for count in (1, 12):
            found = explorer.compare(picture, None, "random", count, 0, "", "black")
            text = app.summarize(picture, found)
            assert ("unchanged" in text) == (found.rank == 1) and (" changed from" in text) == (found.rank > 1)
            texts.add(found.rank == 1)
        assert texts == {True, False}


class TestPage:
    def test_with_a_model(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(folder))
        assert build_demo(app, app.Explorer(tmp_path)).analytics_enabled is False

    def test_without_one(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        assert build_demo(app, app.Explorer(tmp_path)).analytics_enabled is False

    def test_controls_go_as_far_as_the_model(self):
        place, count, seed, patches, way, layer, head = app.controls(12, 6, 196, Choice("random", 20, layer=12))
        assert count.maximum == 196 and layer.maximum == 12 and len(head.choices) == 7
        assert seed.visible and count.visible and [value for _, value in way.choices] == list(WAYS)
        assert not app.controls(12, 6, 196, Choice("chosen"))[1].visible


class TestEndpoint:
    @pytest.fixture
    def compare(self, explorer):
        return find_endpoint(build_demo(app, explorer), "compare")

    def test_compare(self, compare, classifier, tmp_path):
        image = make_image()
        image.save(tmp_path / "a.png")
        found = compare(image=tmp_path / "a.png", place="chosen", patches="1-3", way="black")
        expected = app.compare(classifier, image, Choice("chosen", patches="1-3", way="black", layer=3))
        assert found["patches"] == "1-3" and found["grid"] == [4, 4]
        assert (found["rank"], found["kl"]) == (expected.rank, expected.kl)
        for name in ("before", "after"):
            assert [tuple(each.values()) for each in found[name]] == getattr(expected, name)
        for name in ("image", "attention", "given"):
            with Image.open(found[name]["path"]) as picture:
                assert picture.tobytes() == getattr(expected, name).tobytes()

    def test_defaults_and_limits(self, compare, classifier, tmp_path):
        make_image().save(tmp_path / "a.png")
        expected = app.compare(classifier, make_image(), app.first_choice(classifier))
        assert compare(image=tmp_path / "a.png")["patches"] == format_patches(expected.patches)
        assert compare(image=tmp_path / "a.png", count=0)["patches"] == ""
        for arguments, message in (
            ({"way": "magic"}, "way='magic' is invalid. Input should be 'black', 'gray'"),
            ({"layer": 0}, "layer=0 is invalid. Input should be greater than 0."),
            ({"head": 3}, "head=2 must be from 0 to 1"),
            ({"count": 17}, "count=17 must be from 0 to 16"),
            ({"seed": 2**40}, f"seed={2**40} is invalid. Input should be less than or equal to"),
        ):
            with pytest.raises(gr.Error, match=message):
                compare(image=tmp_path / "a.png", **arguments)


class TestTraining:
    def test_only_vision_transformers_are_taken(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        write_script(tmp_path, "train_classifier.py", "")
        config = NormResNetConfig(n=1, widths=[4, 8, 8])
        NormResNetForImageClassification(config).save_pretrained(tmp_path / "runs" / "resnet")
        models = app.Explorer(tmp_path).models
        assert not models.ready and models.can_train
        save_model(tmp_path / "runs" / "vit")
        assert app.Explorer(tmp_path).models.get().name == str(tmp_path / "runs" / "vit")

    def test_the_real_script_takes_the_flags(self):
        from scripts.train_classifier import Args

        training = app.make_training(ROOT)
        assert Path(training.command[1]).is_file()
        (args,) = HfArgumentParser(Args).parse_args_into_dataclasses(training.command[2:])
        assert args.resume and args.model == "small_vit" and Path(args.output_dir).parent.name == "runs"
        assert "--model small_vit" in training.shown


def test_publish_accepts_the_space(capsys):
    status = publish([str(ROOT / "spaces" / "vit_masking"), "user/vit-masking", "--type", "space", "--dry_run"])
    assert status == 0, capsys.readouterr().err


def test_requirements_and_front_matter_fit_the_project():
    check_space("vit_masking")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serve("vit_masking", folder, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
class TestClients:
    def test_the_example_in_the_readme(self, address, tmp_path):
        found = run_example("vit_masking", address, tmp_path)
        assert found["kl"] >= 0 and len(found["before"]) == 5
        for name in ("image", "attention", "given"):
            with Image.open(found[name]) as picture:
                assert picture.size == (384, 384)

    def test_a_client_of_the_model_context_protocol(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        found = call_tool(address, "compare", image=as_url(tmp_path / "a.png"), count=3, way="tokens")
        assert len(found["after"]) >= 5 and download(found["given"]).size == (384, 384)


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "given") and "Without 2 of 16" in text_of(browser, "after"))

    def numbers(self, browser):
        from selenium.webdriver.common.by import By

        return browser.find_element(By.CSS_SELECTOR, "#patches textarea, #patches input").get_attribute("value")

    def test_on_a_phone(self, browser, address):
        with phone(browser):
            self.open(browser, address)

    def test_an_image_goes_in_and_pictures_come_out(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "attention")
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png")
        wait_for(lambda: shown(browser, "attention") not in (None, before))
        picture = browser.find_element(By.CSS_SELECTOR, "#given img")
        wait_for(lambda: browser.execute_script("return arguments[0].naturalWidth", picture) == 384)
        assert len(browser.find_elements(By.CSS_SELECTOR, "#before .row")) == 5
        assert len(browser.find_elements(By.CSS_SELECTOR, "#after .row")) in (5, 6)

    def test_patches_are_clicked(self, browser, address):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        browser.find_element(By.ID, "clear").click()
        wait_for(lambda: "No patch is masked" in text_of(browser, "sentence"))
        picture = browser.find_element(By.CSS_SELECTOR, "#image img")
        side = min(picture.size["width"], picture.size["height"])  # of the square in the middle of the frame
        for column, expected in ((0, "1"), (3, "1, 4"), (0, "4")):
            picture = browser.find_element(By.CSS_SELECTOR, "#image img")
            offset = (round(side * ((column + 0.5) / 4 - 0.5)), round(side * (0.125 - 0.5)))
            ActionChains(browser).move_to_element_with_offset(picture, *offset).click().perform()
            wait_for(lambda expected=expected: self.numbers(browser) == expected)
        wait_for(lambda: "Without 1 of 16" in text_of(browser, "after"))

    def test_patches_are_written(self, browser, address):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.open(browser, address)
        box = browser.find_element(By.CSS_SELECTOR, "#patches textarea, #patches input")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys("1-99", Keys.ENTER)
        wait_for(lambda: "is out of range. The patches are numbered from 1 to 16" in browser.page_source)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys("1-5", Keys.ENTER)
        wait_for(lambda: "Without 5 of 16" in text_of(browser, "after"))

    def test_places_and_ways(self, browser, address):
        self.open(browser, address)
        for name, label in (("place", "random"), ("way", "noise"), ("place", "center"), ("way", "dropped as tokens")):
            before = shown(browser, "given")
            press(browser, name, label)
            wait_for(lambda before=before: shown(browser, "given") not in (None, before))
        wait_for(lambda: "Without 2 of 16" in text_of(browser, "after"))

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, browser, address, kind, tmp_path):
        self.open(browser, address)
        check_hostile_files(browser, kind, tmp_path, "given")

    def test_an_unknown_model_gets_a_sentence(self, browser, address):
        self.open(browser, address)
        check_unknown_model(browser)
