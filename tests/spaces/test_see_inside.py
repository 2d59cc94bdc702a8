import re

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl import explain
from hf_dl.demo import inside
from hf_dl.demo.classifiers import load_classifier
from hf_dl.demo.page import event
from hf_dl.demo.pictures import Picture, draw_examples
from hf_dl.publishing.command import main as publish

from ..demo.tiny import save_resnet, save_vit
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
    run_example,
    serve,
    shown,
    text_of,
    upload,
    wait_for,
    write_hostile,
)

app = load_app("see_inside")
NAMES = ["cat", "dog", "a <b>bird</b>", "fish", "cow", "hen"]
TOOLS = ["explain", "patches", "class_image", "invert", "attack", "arithmetic"]
LAYER = "norm_resnet.stages.1.0.first.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_resnet(tmp_path_factory.mktemp("model"), names=NAMES)


@pytest.fixture(scope="module")
def classifier(folder):
    return load_classifier(str(folder))


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(inside, "NUM_IMAGES", 8)


@pytest.fixture
def explorer(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DL_MODEL", str(folder))
    return app.Explorer(tmp_path)


def make_settings(**changes):
    usual = {
        "picture": Picture(make_image()), "name": None, "label": -1, "layer": LAYER, "channel": 0,
        "window": "medium", "attack": "fgsm", "epsilon": 8, "formulas": False,
    }  # fmt: skip
    return app.Settings(**usual | changes)


def size_of(file):
    with Image.open(file["path"]) as picture:
        return picture.size


class TestMethods:
    def test_evidence_is_the_map_of_explain(self, classifier):
        image = make_image((16, 16))
        found = inside.occlude(classifier, image, 3, "medium")
        mean, std = classifier.statistics
        expected = explain.explain(
            classifier.model, classifier.prepare(image), method="occlusion", target=3, patch=2, image_mean=mean,
            image_std=std,
        )  # fmt: skip
        assert torch.equal(found.output.drops, expected.output.drops) and found.label == "fish"
        assert found.heat.size == found.overlay.size == (384, 384) and found.signed is None
        assert "lowers the logit of fish by" in inside.summarize_occlusion(found)

    def test_the_predicted_class_is_the_default(self, classifier):
        found = inside.find_evidence(classifier, make_image(), "gradient")
        assert found.label == classifier.top(found.logits)[0][0] and found.signed.size == found.heat.size

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "magic"}, "method='magic' is unknown. Choose one of: grad_cam, "),
            ({"method": "gradient", "label": 6}, "from 0 to 5"),
            ({"method": "rollout"}, "attention|transformer"),
        ],
    )
    def test_evidence_that_is_impossible(self, classifier, options, message):
        with pytest.raises(ValueError, match=message):
            inside.find_evidence(classifier, make_image(), **options)

    def test_layers_have_their_channels(self, classifier):
        layers = inside.find_layers(classifier)
        assert next(iter(layers.values())) == 4 and list(layers.values())[-1] == 8 and layers[LAYER] == 8

    def test_patches_are_the_strongest(self, classifier):
        images = [make_image((16, 16), seed) for seed in range(4)]
        found = inside.find_patches(classifier, LAYER, 1, images)
        values = [value for value, _ in found]
        reader = explain.LayerReader(classifier.model, classifier.prepare(images[0]), LAYER)
        with torch.no_grad():
            highest = [reader.as_map(classifier.prepare(image))[0, 1].max().item() for image in images]
        assert values == pytest.approx(sorted(highest, reverse=True), rel=1e-4)
        with pytest.raises(ValueError, match="Expected numbers from 0 to 7"):
            inside.find_patches(classifier, LAYER, 8, images)

    def test_the_image_of_a_class_is_the_image_of_explain(self, classifier, monkeypatch):
        monkeypatch.setattr(inside, "FRAME_SECONDS", 0)
        frames = list(inside.climb(classifier, make_image(), 3, 12))
        assert [frame.step for frame in frames] == list(range(1, 13)) and frames[0].label == "fish"
        expected = inside.run(classifier, classifier.prepare(make_image()), "class_model", 3, steps=12)
        assert frames[-1].score == pytest.approx(expected.output.scores.item(), rel=1e-4)
        assert frames[0].picture.tobytes() != frames[-1].picture.tobytes()

    def test_slow_pages_show_fewer_frames(self, classifier, monkeypatch):
        monkeypatch.setattr(inside, "FRAME_SECONDS", 1000)
        assert [frame.step for frame in inside.climb(classifier, make_image(), -1, 8)] == [1, 8]

    def test_inversion_by_depth(self, classifier):
        found = list(inside.invert(classifier, make_image(), 5))
        pixel_values = classifier.prepare(make_image())
        assert [each.layer for each in found] == explain.spread_layers(classifier.model, pixel_values, 4)
        assert all(each.error > 0 and each.picture.size == (384, 384) for each in found)
        with pytest.raises(ValueError, match="nowhere"):
            list(inside.invert(classifier, make_image(), 5, ["nowhere"]))

    def test_epsilon_is_in_steps_of_pixels(self, classifier):
        image = make_image((16, 16))
        for method in explain.ATTACKS:
            found = inside.attack(classifier, image, method, 3)
            change = np.asarray(found.changed, dtype=int) - np.asarray(found.image)
            assert 0 < np.abs(change).max() <= 3
        still = inside.attack(classifier, image, "fgsm", 0)
        assert not still.flipped and dict(still.after) == pytest.approx(dict(still.before), rel=1e-4)
        assert inside.summarize_attack(still).startswith("### Not flipped: ")

    def test_the_label_flips(self, classifier):
        found = inside.attack(classifier, make_image(), "pgd", 128)
        assert found.flipped and found.before[0][0] != found.after[0][0]
        assert inside.summarize_attack(found).startswith("### Flipped: ")
        wanted = next(number for number, name in enumerate(NAMES) if name != found.before[0][0])
        assert inside.attack(classifier, make_image(), "pgd", 4, wanted).target == NAMES[wanted]

    @pytest.mark.parametrize(
        ("method", "epsilon", "message"),
        [("magic", 1, "method='magic' is unknown"), ("fgsm", -1, "epsilon=-1 is out of range"), ("fgsm", 256, "255")],
    )
    def test_attacks_that_are_impossible(self, classifier, method, epsilon, message):
        with pytest.raises(ValueError, match=message):
            inside.attack(classifier, make_image(), method, epsilon)

    def test_arithmetic_shows_numbers_and_formulas(self, classifier):
        before = {name: value.clone() for name, value in classifier.model.state_dict().items()}
        result = inside.count(classifier, make_image())
        chart, table = inside.show_arithmetic(result, formulas=True)
        assert result.image == (1, 3, 16, 16) and result.parameters == classifier.model.num_parameters()
        assert "(16 - 3 + 2*1)/1 + 1 = 16" in table and "data:image/svg+xml" in chart
        assert "+ 1 = 16" not in inside.show_arithmetic(result, formulas=False)[1]
        assert not classifier.model.training
        assert all(torch.equal(value, before[name]) for name, value in classifier.model.state_dict().items())

    def test_a_transformer(self, tmp_path):
        vit = load_classifier(str(save_vit(tmp_path)))
        inside.check(vit)
        text = inside.show_gradients(vit, make_image(), -1)
        assert text.count("<figure>") == 6 and text.count("ReLU") >= 2  # two methods get a sentence
        assert "<img" in inside.show_filters(vit)


class TestExplorer:
    def test_the_first_example(self, explorer):
        found, layers, (picture, text, image, bars) = explorer.start(0)
        assert picture is draw_examples(0)[0] and "the correct class is" in text and image.size == (384, 384)
        assert found.name == explorer.models.default and LAYER in layers and bars.count("class='row") == 5

    @pytest.mark.parametrize(
        ("tab", "content"),
        [
            ("patches", ["image/png", "image/png"]),
            ("occlusion", ["lowers the logit|No window", None, None]),
            ("gradients", ["Integrated gradients"]),
            ("attack", ["lipped", "scaled to the full range", "of the changed image"]),
            ("arithmetic", ["svg", "multiply-adds"]),
            ("class_model", []),
            ("inversion", []),
        ],
    )
    def test_tabs(self, explorer, tab, content):
        found = explorer.look(tab, make_settings())
        for value, expected in zip(found, content, strict=True):
            assert isinstance(value, Image.Image) if expected is None else re.search(expected, value)
        assert explorer.look(tab, make_settings(picture=None)) == []

    def test_names_with_html_are_shown(self, explorer):
        found = explorer.look("occlusion", make_settings(label=2))
        assert "<b>" not in found[0]
        assert "<b>bird" not in list(explorer.climb(make_settings().picture, None, 2, 2))[-1][0]

    def test_the_class_image_develops(self, explorer):
        progress, picture, bars = list(explorer.climb(make_settings().picture, None, 1, 4))[-1]
        assert "width: 100.0%" in progress and "dog: step 4 of 4, logit " in progress
        assert picture.size == (384, 384) and "of this picture" in bars

    def test_the_inversions_appear(self, explorer):
        shown_parts = list(explorer.invert_layers(make_settings().picture, None, 2))
        assert [each[1].count("<figure>") for each in shown_parts] == [1, 2, 3, 4, 5, 5]
        assert "Done: 4 layers" in shown_parts[-1][0]

    def test_a_channel_stays_inside_of_its_layer(self, explorer):
        slider = explorer.channels(None, "norm_resnet.stem.0", 7)
        assert (slider.maximum, slider.value) == (3, 3)
        assert explorer.channels(None, LAYER, 5).value == 5

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, explorer, kind, tmp_path):
        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(gr.Error, match=HOSTILE[kind]) as caught:
            event(explorer.open)(str(tmp_path / "a.png"), None)
        assert caught.value.print_exception is False

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"channel": 99}, "from 0 to 7"), ({"layer": "nowhere"}, "nowhere"), ({"name": "/no/such"}, "was not found")],
    )
    def test_hostile_settings_get_a_sentence(self, explorer, changes, message):
        with pytest.raises(gr.Error, match=message):
            event(explorer.look)("patches", make_settings(**changes))

    def test_without_a_model(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        explorer = app.Explorer(tmp_path)
        assert build_demo(app, explorer).analytics_enabled is False
        assert explorer.models.can_train and explorer.models.training.folder.name == "see_inside"


class TestEndpoints:
    @pytest.fixture
    def page(self, explorer):
        return build_demo(app, explorer)

    @pytest.fixture
    def image(self, tmp_path):
        make_image().save(tmp_path / "a.png")
        return tmp_path / "a.png"

    def test_explain(self, page, image):
        explain_image = find_endpoint(page, "explain", tools=TOOLS)
        found = explain_image(image=image, method="guided_backprop", label="dog")
        assert found["label"] == "dog" and len(found["top"]) == 5 and found["method"] == "guided_backprop"
        assert size_of(found["overlay"]) == (384, 384)
        with pytest.raises(gr.Error, match="method='magic' is invalid"):
            explain_image(image=image, method="magic")

    def test_patches(self, page):
        find = find_endpoint(page, "patches", tools=TOOLS, required=0)
        found = find(channel=2)
        values = [each["activation"] for each in found["results"]]
        assert found["layer"] in found["layers"] and values == sorted(values, reverse=True) and len(values) == 8
        for arguments in ({"channel": -1}, {"channel": 99}, {"layer": "nowhere"}):
            with pytest.raises(gr.Error, match="channel|nowhere"):
                find(**arguments)

    def test_class_image_and_inversion(self, page, image):
        found = find_endpoint(page, "class_image", tools=TOOLS)(label="3", steps=3)
        assert found["label"] == "fish" and size_of(found["image"]) == (384, 384)
        invert = find_endpoint(page, "invert", tools=TOOLS)
        found = invert(image=image, layers=[LAYER], steps=3)
        assert [each["layer"] for each in found["results"]] == [LAYER]
        for arguments, message in (({"steps": 0}, "steps=0 is invalid"), ({"layers": [LAYER] * 13}, "at most 12")):
            with pytest.raises(gr.Error, match=message):
                invert(image=image, **arguments)

    def test_attack_and_arithmetic(self, page, image):
        attack = find_endpoint(page, "attack", tools=TOOLS)
        found = attack(image=image, epsilon=128, method="pgd")
        assert found["flipped"] is True and found["before"][0]["label"] != found["after"][0]["label"]
        for arguments in ({"epsilon": 1000}, {"epsilon": "nan"}, {"epsilon": "much"}):
            with pytest.raises(gr.Error, match="epsilon="):
                attack(image=image, **arguments)
        found = find_endpoint(page, "arithmetic", tools=TOOLS)(image=image)
        assert found["parameters"] == sum(row["parameters"] for row in found["rows"])


def test_publish_accepts_the_space(capsys):
    status = publish([str(ROOT / "spaces" / "see_inside"), "user/see-inside", "--type", "space", "--dry_run"])
    assert status == 0, capsys.readouterr().err


def test_requirements_and_front_matter_fit_the_project():
    check_space("see_inside")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serve("see_inside", folder, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
class TestClients:
    def test_the_example_in_the_readme(self, address, tmp_path):
        found = run_example("see_inside", address, tmp_path)
        assert found["flipped"] in (True, False) and found["before"][0]["label"] in NAMES

    def test_a_client_of_the_model_context_protocol(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        found = call_tool(address, "explain", tools=TOOLS, image=as_url(tmp_path / "a.png"), label="dog")
        assert found["label"] == "dog" and download(found["overlay"]).size == (384, 384)


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: "Prediction" in text_of(browser, "sentence") and shown(browser, "patches"))

    def choose_tab(self, browser, key):
        script = """
        const find = part => [...document.querySelectorAll(part)].find(e => e.textContent.trim() == arguments[0]);
        const button = find('[role=tab]') || find('.overflow-dropdown button');
        if (button) button.click();
        else if (!document.querySelector('.overflow-dropdown:not(.hide)'))  // a phone has a menu of other tabs
            document.querySelector('.overflow-menu > button').click();
        return Boolean(button);
        """
        wait_for(lambda: browser.execute_script(script, app.TABS[key]))

    def click(self, browser, name):
        browser.execute_script("document.getElementById(arguments[0]).click()", name)

    def test_on_a_phone(self, browser, address):
        contents = {
            "patches": "patches", "occlusion": "drop", "gradients": "gradients", "class_model": "make",
            "inversion": "invert", "attack": "flip", "arithmetic": "table",
        }  # fmt: skip
        with phone(browser):
            self.open(browser, address)
        for tab, name in contents.items():
            with phone(browser):
                self.choose_tab(browser, tab)
                wait_for(lambda name=name: text_of(browser, name))

    def test_the_class_image_is_stopped(self, browser, address):
        self.open(browser, address)
        self.choose_tab(browser, "class_model")
        number = "document.querySelector('#steps input[type=number]')"
        browser.execute_script(f"{number}.value = 500; {number}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        self.click(browser, "make")
        wait_for(lambda: shown(browser, "made") and "step " in text_of(browser, "progress"))
        self.click(browser, "stop")
        wait_for(lambda: "Stopped" in text_of(browser, "progress"))
        step, steps = map(int, re.search(r"step (\d+) of (\d+)", text_of(browser, "progress")).groups())
        assert step < steps == 500
        self.click(browser, "make")  # the page is free again
        wait_for(lambda: "Stopped" not in text_of(browser, "progress") and text_of(browser, "progress"))
        self.click(browser, "stop")
        wait_for(lambda: "Stopped" in text_of(browser, "progress"))

    def test_inversions_and_the_attack(self, browser, address):
        self.open(browser, address)
        self.choose_tab(browser, "inversion")
        self.click(browser, "invert")
        wait_for(lambda: "Done: 4 layers" in text_of(browser, "depth"))
        self.choose_tab(browser, "attack")
        wait_for(lambda: "lipped" in text_of(browser, "flip"))
        changed = "return [...document.querySelectorAll('#attacked img')].at(-1)?.src"
        before = browser.execute_script(changed)
        number = "document.querySelector('#epsilon input[type=number]')"
        browser.execute_script(f"{number}.value = 32; {number}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        wait_for(lambda: browser.execute_script(changed) not in (None, before))

    def test_an_image_and_an_example(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "image")
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png")
        wait_for(lambda: shown(browser, "image") not in (None, before))
        before = shown(browser, "image")
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")) == 8)
        browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")[1].click()
        wait_for(lambda: shown(browser, "image") not in (None, before))

    def test_hostile_files_get_a_sentence(self, browser, address, tmp_path):
        self.open(browser, address)
        check_hostile_files(browser, "text", tmp_path, "image")

    def test_an_unknown_model_gets_a_sentence(self, browser, address):
        self.open(browser, address)
        check_unknown_model(browser)
