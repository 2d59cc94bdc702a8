from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_dl import demo
from hf_dl.explain import WAYS, attention_maps, fill_patches, ranked_patches
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification, image_processor
from hf_dl.models.small_vit import SmallViTConfig, SmallViTForImageClassification, SmallViTImageProcessor
from hf_dl.publishing.command import main as publish

from .pages import (
    HOSTILE,
    ROOT,
    build_demo,
    check_hostile_files,
    check_space,
    check_unknown_model,
    load_app,
    make_image,
    press,
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
    return demo.load_classifier(str(folder))


@pytest.fixture
def explorer(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DL_MODEL", str(folder))
    return app.Explorer(tmp_path)


class TestPatches:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("", []), ("1", [0]), ("1-4, 9", [0, 1, 2, 3, 8]), ("9 2 - 3,3", [1, 2, 8]), ("16,,15", [14, 15])],
    )
    def test_parse(self, text, expected):
        assert app.parse_patches(text, 16) == expected

    @pytest.mark.parametrize("text", ["0", "17", "4-2", "1-17"])
    def test_out_of_range(self, text):
        with pytest.raises(ValueError, match="is out of range; the patches are 1 to 16"):
            app.parse_patches(text, 16)

    @pytest.mark.parametrize("text", ["x", "1;2", "-3", "1.5", "__import__('os')", "9" * 9])
    def test_no_patches(self, text):
        with pytest.raises(ValueError, match="is no patch; write numbers and ranges"):
            app.parse_patches(text, 16)

    @pytest.mark.parametrize("indices", [[], [0], [0, 1, 2], [0, 2, 3, 7, 14, 15], list(range(16))])
    def test_format_turns_parse_back(self, indices):
        assert app.parse_patches(app.format_patches(indices), 16) == indices

    def test_format(self):
        assert app.format_patches([0, 1, 2, 3, 8]) == "1-4, 9"

    @pytest.mark.parametrize(("x", "y", "expected"), [(0, 0, 0), (99, 0, 4), (100, 50, 9), (20, 49, 6), (-1, -1, 0)])
    def test_patch_at(self, x, y, expected):
        assert app.patch_at(x, y, (100, 50), (2, 5)) == expected


class TestChoice:
    attention = torch.arange(16.0).view(4, 4)

    @pytest.mark.parametrize(
        ("place", "expected"), [("top", [13, 14, 15]), ("bottom", [0, 1, 2]), ("chosen", [4]), ("center", [5, 6, 9])]
    )
    def test_mask(self, place, expected):
        mask = app.Choice(place=place, count=3, patches="5").mask(self.attention)
        assert mask.flatten().nonzero()[:, 0].tolist() == expected

    def test_random_is_a_function_of_the_seed(self):
        first, again, other = (app.Choice("random", 5, seed).mask(self.attention) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other) and first.sum() == 5

    def test_refuses(self):
        with pytest.raises(ValueError, match="place='left' is unknown"):
            app.Choice("left").mask(self.attention)
        with pytest.raises(ValueError, match="count=17 must be from 0 to 16"):
            app.Choice("top", 17).mask(self.attention)


class TestCompare:
    def test_before_is_the_models_answer(self, classifier):
        image = make_image()
        found = app.compare(classifier, image, app.Choice())
        with torch.no_grad():
            logits = classifier.model(classifier.prepare(image)).logits[0]
        assert found.before[0][0] == NAMES[int(logits.argmax())]
        assert [p for _, p in found.before] == pytest.approx([p for _, p in classifier.top(logits)])

    @pytest.mark.parametrize("way", WAYS)
    def test_nothing_taken_changes_nothing(self, classifier, way):
        found = app.compare(classifier, make_image(), app.Choice(way=way))
        assert [name for name, _ in found.after] == [name for name, _ in found.before]
        assert [p for _, p in found.after] == pytest.approx([p for _, p in found.before], abs=1e-6)
        assert found.rank == 1 and found.kl == pytest.approx(0, abs=1e-6) and found.patches == []

    def test_takes_the_most_attended(self, classifier):
        image = make_image()
        for layer, head in ((1, app.MEAN_HEAD), (3, 2)):
            found = app.compare(classifier, image, app.Choice("top", 5, layer=layer, head=head))
            maps, _ = attention_maps(
                classifier.model, classifier.prepare(image), layer=layer - 1, head=None if head < 0 else head - 1
            )
            expected = ranked_patches(maps[0], 5).flatten().nonzero()[:, 0].tolist()
            assert found.patches == expected

    def test_after_is_the_answer_to_the_filled_image(self, classifier):
        image, choice = make_image(), app.Choice("center", 6, seed=3, way="noise")
        found = app.compare(classifier, image, choice)
        pixel_values = classifier.prepare(image)
        mask = choice.mask(torch.zeros(4, 4))
        filled = fill_patches(pixel_values, mask, "noise", generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits = classifier.model(filled).logits[0]
        assert dict(found.after)[found.before[0][0]] == pytest.approx(
            logits.softmax(-1)[NAMES.index(found.before[0][0])].item(), abs=1e-5
        )
        # and the picture shows the noise that the model was given
        small = classifier.show(filled, (384, 384))
        big = np.asarray(mask.numpy().repeat(96, 0).repeat(96, 1))
        assert np.array_equal(np.asarray(found.given)[big], np.asarray(small)[big])

    def test_hidden_and_dropped_are_the_same(self, classifier):
        image = make_image()
        hidden, dropped = (
            app.compare(classifier, image, app.Choice("top", 7, way=way)) for way in ("attention", "tokens")
        )
        assert [p for _, p in hidden.after] == pytest.approx([p for _, p in dropped.after], abs=1e-6)
        assert hidden.kl > 1e-4
        assert hidden.given.tobytes() == dropped.given.tobytes()

    @pytest.mark.parametrize("way", WAYS)
    def test_all_taken(self, classifier, way):
        found = app.compare(classifier, make_image(), app.Choice("bottom", 16, way=way))
        assert len(found.patches) == 16 and np.isfinite(found.kl)

    def test_the_former_label_is_always_listed(self, classifier):
        for seed in range(20):
            found = app.compare(classifier, make_image(seed=seed), app.Choice("random", 12, seed, way="black"))
            assert found.before[0][0] in dict(found.after)
            assert (found.rank == 1) == (found.after[0][0] == found.before[0][0])

    @pytest.mark.parametrize("size", [(60, 40), (16, 16), (1, 1)])
    def test_pictures_have_one_size(self, classifier, size):
        found = app.compare(classifier, make_image(size), app.Choice("top", 4))
        assert found.image.size == found.attention.size == found.given.size == (384, 384)

    def test_refuses(self, classifier):
        for choice, message in (
            (app.Choice(way="magic"), "way='magic' is unknown"),
            (app.Choice(layer=9), "layer=8 must be"),
            (app.Choice(head=3), "head=2 must be"),
        ):
            with pytest.raises(ValueError, match=message):
                app.compare(classifier, make_image(), choice)

    def test_a_vit_of_transformers(self):
        vit = ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=24, num_labels=7)).eval()
        tiny = demo.Classifier(vit, ViTImageProcessor(size={"height": 16, "width": 16}), "vit")
        assert app.sizes(tiny) == (3, 2, 16)
        assert len(app.compare(tiny, make_image(), app.Choice("top", 4, way="tokens")).patches) == 4


class TestExplorer:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refuses_in_a_sentence(self, explorer, kind, tmp_path):
        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(gr.Error, match=HOSTILE[kind]) as caught:
            app.event(explorer.open)(str(tmp_path / "a.png"), None, "top", 3)
        assert caught.value.print_exception is False

    def test_a_model_without_attention(self, explorer, tmp_path):
        config = NormResNetConfig(n=1, widths=[4, 8, 8], image_size=16)
        NormResNetForImageClassification(config).save_pretrained(tmp_path)
        image_processor(config).save_pretrained(tmp_path)
        with pytest.raises(gr.Error, match="does not fit this page .*attention"):
            app.event(explorer.load)(str(tmp_path), demo.Picture(make_image()))

    def test_an_unknown_model(self, explorer):
        with pytest.raises(gr.Error, match="The model '/no/such/model' was not found"):
            app.event(explorer.load)("/no/such/model", demo.Picture(make_image()))

    def test_start(self, explorer):
        classifier, choice, picture, found = explorer.start(0)
        assert choice == app.Choice("top", 2, layer=3) and len(found.patches) == 2
        assert picture is demo.draw_examples(0)[0] and picture.truth in app.tell(picture, found)

    def test_clicks_take_and_give_back(self, explorer):
        picture = demo.Picture(make_image())
        first = explorer.compare(picture, None, "center", 4)
        assert first.patches == [5, 6, 9, 10]
        second = explorer.toggle((5, 5), picture, None, "center", 4)
        assert second.patches == [0, 5, 6, 9, 10]
        third = explorer.toggle((150, 150), picture, None, "chosen", 4, 0, app.format_patches(second.patches))
        assert third.patches == [0, 6, 9, 10]

    def test_sentences(self, explorer):
        picture = demo.Picture(make_image())
        none = explorer.compare(picture, None, "top", 0)
        assert "Nothing is taken away yet" in app.tell(picture, none)
        texts = set()
        for count in (1, 12):
            found = explorer.compare(picture, None, "random", count, 0, "", "black")
            text = app.tell(picture, found)
            assert ("still says" in text) == (found.rank == 1) and ("becomes" in text) == (found.rank > 1)
            texts.add(found.rank == 1)
        assert texts == {True, False}


class TestPage:
    def test_with_a_model(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(folder))
        assert build_demo(app, root=tmp_path).analytics_enabled is False

    def test_without_one(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        assert build_demo(app, root=tmp_path).analytics_enabled is False

    def test_controls_go_as_far_as_the_model(self):
        place, count, seed, patches, way, layer, head = app.controls(12, 6, 196, app.Choice("random", 20, layer=12))
        assert count.maximum == 196 and layer.maximum == 12 and len(head.choices) == 7
        assert seed.visible and count.visible and [value for _, value in way.choices] == list(WAYS)
        assert not app.controls(12, 6, 196, app.Choice("chosen"))[1].visible


class TestTraining:
    def test_only_vision_transformers_are_taken(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        write_script(tmp_path, "train_classifier.py", "")
        config = NormResNetConfig(n=1, widths=[4, 8, 8])
        NormResNetForImageClassification(config).save_pretrained(tmp_path / "runs" / "resnet")
        shelf = app.Explorer(tmp_path).shelf
        assert not shelf.ready and shelf.can_train
        save_model(tmp_path / "runs" / "vit")
        assert app.Explorer(tmp_path).shelf.get().name == str(tmp_path / "runs" / "vit")

    def test_the_real_script_takes_the_flags(self):
        from scripts.train_classifier import Args

        training = app.make_training(ROOT)
        assert Path(training.command[1]).is_file()
        (args,) = HfArgumentParser(Args).parse_args_into_dataclasses(training.command[2:])
        assert args.resume and args.model == "small_vit" and Path(args.output_dir).parent.name == "runs"
        assert "--model small_vit" in demo.training_text(training, problem="", can_train=True, kind="a ViT")


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
def test_client(address, tmp_path):
    from gradio_client import Client, handle_file

    make_image().save(tmp_path / "a.png")
    client = Client(address, verbose=False, download_files=str(tmp_path))
    numbers, sentence, *pictures, before, after = client.predict(
        handle_file(tmp_path / "a.png"), "chosen", 0, 0, "1-3", "gray", 3, -1, api_name="/compare"
    )
    assert numbers == "1-3" and "nats" in sentence and "Without 3 of 16 patches" in after
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (384, 384)


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "given") and "Without 2 of 16" in text_of(browser, "after"))

    def numbers(self, browser):
        from selenium.webdriver.common.by import By

        return browser.find_element(By.CSS_SELECTOR, "#patches textarea, #patches input").get_attribute("value")

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
        wait_for(lambda: "Nothing is taken away yet" in text_of(browser, "sentence"))
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
        wait_for(lambda: "is out of range; the patches are 1 to 16" in browser.page_source)
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
