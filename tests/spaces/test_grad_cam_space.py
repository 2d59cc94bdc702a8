import re
import shutil
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_dl.demo import pictures
from hf_dl.demo.classifiers import Classifier, describe, load_classifier
from hf_dl.demo.page import event
from hf_dl.demo.pictures import Picture, draw_examples
from hf_dl.explain import grad_cam
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification, image_processor
from hf_dl.publishing.command import main as publish
from hf_dl.reporting.grids import color_heat

from ..demo.tiny import save_vit
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
    write_script,
)

app = load_app("grad_cam")
NAMES = ["cat", "dog", "a <b>bird</b>", "fish", "cow", "hen"]


def save_model(folder):
    torch.manual_seed(0)
    config = NormResNetConfig(n=1, widths=[4, 8, 8], image_size=16, id2label=dict(enumerate(NAMES)))
    NormResNetForImageClassification(config).save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
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


class TestExplain:
    def test_agrees_with_grad_cam(self, classifier):
        image = make_image((16, 16))
        found = app.explain(classifier, image, label=3)
        output = grad_cam(classifier.model, classifier.prepare(image), classes=3)
        expected = color_heat(pictures.resize_heat(output.maps[0].numpy(), (384, 384)))
        assert np.array_equal(np.asarray(found.heat), expected)
        pixels = np.asarray(image).repeat(24, 0).repeat(24, 1)  # the model gets 16 x 16 pixels
        assert np.array_equal(np.asarray(found.image), pixels)
        assert found.label == "fish" and found.layers == output.layers
        assert found.probability == pytest.approx(output.logits.softmax(-1)[0, 3].item())

    def test_explains_the_predicted_class_by_itself(self, classifier):
        found = app.explain(classifier, make_image())
        assert found.label == found.top[0][0] and found.probability == pytest.approx(found.top[0][1])
        assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
        assert len(found.top) == 5

    def test_the_explained_class_is_always_listed(self, classifier):
        tops = [app.explain(classifier, make_image(), label=label).top for label in range(6)]
        assert sorted(map(len, tops)) == [5, 5, 5, 5, 5, 6]
        assert all(name in dict(top) for name, top in zip(NAMES, tops, strict=True))

    def test_no_evidence_is_said(self, classifier):
        found = app.explain(classifier, make_image())
        assert "Bright areas are evidence for" in app.summarize(Picture(make_image()), found)
        found.found = False
        assert "The selected layers have no evidence for" in app.summarize(Picture(make_image()), found)

    @pytest.mark.parametrize("size", [(60, 40), (16, 16), (384, 1), (1, 1)])
    def test_pictures_have_one_size(self, classifier, size):
        found = app.explain(classifier, make_image(size))
        assert found.image.size == found.overlay.size == found.heat.size == (384, 384)

    def test_classes_and_layers_differ(self, classifier):
        image, layers = make_image(), app.find_layers(classifier)
        pictures = [app.explain(classifier, image, label=label).heat.tobytes() for label in range(6)]
        pictures += [app.explain(classifier, image, layers=chosen).heat.tobytes() for chosen in (layers[:1], layers)]
        assert len(set(pictures)) > 4

    def test_unknown_class_or_layer(self, classifier):
        with pytest.raises(ValueError, match="from 0 to 5"):
            app.explain(classifier, make_image(), label=6)
        with pytest.raises(ValueError, match="is not a layer of"):
            app.explain(classifier, make_image(), layers=["nowhere"])

    def test_the_pixels_of_the_model_are_shown(self, classifier):
        found = app.explain(classifier, make_image((300, 300)))
        pixels = np.asarray(found.image)
        assert np.array_equal(pixels, pixels[::24, ::24].repeat(24, 0).repeat(24, 1))


class TestFindLayers:
    def test_of_a_residual_network(self, classifier):
        layers = app.find_layers(classifier)
        assert layers[-1] == "norm_resnet.stages.2" and len(layers) == 8
        assert layers[0] == "norm_resnet.stem.0"

    def test_of_a_vision_transformer(self):
        config = ViTConfig(
            image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_labels=4
        )
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        vit = Classifier(ViTForImageClassification(config).eval(), processor, "vit")
        layers = app.find_layers(vit)
        assert len(layers) == 3
        assert app.explain(vit, make_image(), layers=layers).heat.size == (384, 384)


class TestExplorer:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refuses_in_a_sentence(self, explorer, kind, tmp_path):
        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(gr.Error, match=HOSTILE[kind]) as caught:
            event(explorer.open)(str(tmp_path / "a.png"), None, -1, [])
        assert caught.value.print_exception is False

    def test_open(self, explorer, tmp_path):
        make_image().save(tmp_path / "a.png")
        picture, found = explorer.open(str(tmp_path / "a.png"), None, 1, [])
        assert picture.truth == "" and found.label == "dog"

    def test_choose_knows_what_it_shows(self, explorer):
        picture, found = explorer.choose(1, 0, None, -1, [])
        assert picture is draw_examples(0)[1] and picture.truth
        assert f"correct class is {picture.truth}" in app.summarize(picture, found)

    def test_load_another_model(self, explorer, tmp_path):
        save_model(tmp_path / "other")
        classifier, layers, picture, found = explorer.load(f" {tmp_path / 'other'} ", Picture(make_image()))
        assert classifier.name == str(tmp_path / "other") and found.layers == (layers[-1],)
        assert str(tmp_path) not in describe(classifier)

    def test_an_unknown_model(self, explorer):
        with pytest.raises(gr.Error, match="The model '/no/such/model' was not found"):
            event(explorer.load)("/no/such/model", Picture(make_image()))

    def test_sentence(self, explorer):
        picture = Picture(make_image())
        found = explorer.explain(picture, None, 2, [])
        text = app.summarize(picture, found)
        assert text.startswith("### Prediction: ") and "<b>" not in text
        assert re.search(r"\*\*a &#60;b&#62;bird&#60;/b&#62;\*\*, which has a probability of [\d.]+%", text)
        picture.truth = found.top[0][0]
        assert "(correct)" in app.summarize(picture, found)


class TestPage:
    def test_with_a_model(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(folder))
        page = build_demo(app, app.Explorer(tmp_path))
        assert page.analytics_enabled is False

    def test_without_one(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        assert build_demo(app, app.Explorer(tmp_path)).analytics_enabled is False

    def test_lists_of_classes_and_layers(self, classifier):
        label, layers = app.choices(classifier, app.find_layers(classifier))
        assert label.choices[0] == ("the predicted class", -1) and label.choices[3] == ("a <b>bird</b>", 2)
        assert layers.value == ["norm_resnet.stages.2"] and layers.choices[-1][0] == "stages.2"


class TestEndpoint:
    @pytest.fixture
    def explain(self, explorer):
        return find_endpoint(build_demo(app, explorer), "explain")

    def test_explain(self, explain, classifier, tmp_path):
        image = make_image()
        image.save(tmp_path / "a.png")
        found, expected = explain(image=tmp_path / "a.png", label="dog"), app.explain(classifier, image, label=1)
        assert found["label"] == "dog" and found["score"] == pytest.approx(expected.probability)
        assert [each["label"] for each in found["top"]] == [name for name, _ in expected.top]
        assert found["layers"] == ["norm_resnet.stages.2"] and found["has_evidence"] is expected.found
        for name, picture in (("image", expected.image), ("overlay", expected.overlay), ("map", expected.heat)):
            with Image.open(found[name]["path"]) as opened:
                assert opened.format == "PNG" and opened.tobytes() == picture.tobytes()

    def test_other_arguments(self, explain, tmp_path):
        make_image().save(tmp_path / "a.png")
        predicted = explain(image=tmp_path / "a.png")
        assert predicted["label"] == predicted["top"][0]["label"]
        layers = ["norm_resnet.stem.0", "norm_resnet.stages.2"]
        assert explain(image=tmp_path / "a.png", label="3", layers=layers)["layers"] == layers
        for arguments, message in (
            ({"label": "unicorn"}, "label='unicorn' is unknown. Choose one of: cat, dog, .*; or an index below 6."),
            ({"label": "6"}, "label='6' is unknown"),
            ({"layers": ["nowhere"]}, "is not a layer of"),
            ({"layers": "norm_resnet.stages.2"}, "layers='norm_resnet.stages.2' is invalid. Input should be .* list."),
        ):
            with pytest.raises(gr.Error, match=message):
                explain(image=tmp_path / "a.png", **arguments)

    def test_a_vision_transformer_needs_no_other_arguments(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(save_vit(tmp_path / "vit")))
        make_image().save(tmp_path / "a.png")
        found = find_endpoint(build_demo(app, app.Explorer(tmp_path)), "explain")(image=tmp_path / "a.png")
        assert len(found["layers"]) == 1 and found["label"] == found["top"][0]["label"]

    def test_only_uploaded_files_are_opened(self, explorer):
        (function,) = (each.fn for each in build_demo(app, explorer).fns.values() if each.api_name == "explain")
        for image in ("/etc/passwd", {"path": "/etc/passwd"}, {"path": "/etc/passwd", "meta": {}}, None):
            with pytest.raises(gr.Error, match="image=.* is invalid. Pass an uploaded file"):
                function(image, None, None)


class TestTraining:
    def test_trains_then_shows(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        write_script(
            tmp_path,
            "train_classifier.py",
            "import shutil, sys, time, pathlib\n"
            "folder = sys.argv[sys.argv.index('--output_dir') + 1]\n"
            "print('step 25/100 train_loss 3 loss 0.5 val_loss 0.7 val_accuracy 0.9', file=sys.stderr, flush=True)\n"
            "while not pathlib.Path(folder, 'go').exists(): time.sleep(0.05)\n"
            f"shutil.copytree({str(folder)!r}, folder, dirs_exist_ok=True)\n",
        )
        models = app.Explorer(tmp_path).models
        assert not models.ready and models.can_train
        models.training.start()
        try:
            wait_for(lambda: models.training.progress()[0])
            assert models.training.progress() == (0.25, "Step 25 of 100 · loss 0.5 · accuracy 0.9")
            (models.training.folder / "go").touch()
            wait_for(lambda: not models.training.running)
        finally:
            models.training.process.kill()
        assert models.ready and models.get().names == NAMES

    def test_the_real_script_takes_the_flags(self):
        from scripts.train_classifier import Args

        training = app.make_training(ROOT)
        assert Path(training.command[1]).is_file()
        (args,) = HfArgumentParser(Args).parse_args_into_dataclasses(training.command[2:])
        assert args.resume and args.model == "norm_resnet" and Path(args.output_dir).parent.name == "runs"
        assert training.shown == "scripts/run accelerate launch scripts/train_classifier.py"

    def test_runs_of_the_script_are_found(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        shutil.copytree(folder, tmp_path / "runs" / "norms" / "0123abcd")
        assert app.Explorer(tmp_path).models.get().name == str(tmp_path / "runs" / "norms" / "0123abcd")


def test_publish_accepts_the_space(capsys):
    status = publish([str(ROOT / "spaces" / "grad_cam"), "user/grad-cam", "--type", "space", "--dry_run"])
    assert status == 0, capsys.readouterr().err


def test_requirements_and_front_matter_fit_the_project():
    check_space("grad_cam")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serve("grad_cam", folder, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
class TestClients:
    def test_the_example_in_the_readme(self, address, tmp_path):
        found = run_example("grad_cam", address, tmp_path)
        assert found["label"] in NAMES and len(found["top"]) == 5
        for name in ("image", "overlay", "map"):
            with Image.open(found[name]) as picture:
                assert picture.size == (384, 384)

    def test_a_client_of_the_model_context_protocol(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        found = call_tool(address, "explain", image=as_url(tmp_path / "a.png"), label="dog")
        assert found["label"] == "dog" and download(found["overlay"]).size == (384, 384)
        assert "label='unicorn' is unknown" in call_tool(
            address, "explain", image=as_url(tmp_path / "a.png"), label="unicorn"
        )


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "overlay") and "Prediction" in text_of(browser, "sentence"))

    def test_on_a_phone(self, browser, address):
        with phone(browser):
            self.open(browser, address)

    def test_an_image_goes_in_and_a_map_comes_out(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "overlay")
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png")
        wait_for(lambda: shown(browser, "overlay") not in (None, before))
        picture = browser.find_element(By.CSS_SELECTOR, "#overlay img")
        wait_for(lambda: browser.execute_script("return arguments[0].naturalWidth", picture) == 384)
        assert len(browser.find_elements(By.CSS_SELECTOR, "#bars .row")) == 5

    def test_an_example_is_chosen(self, browser, address):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "overlay")
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")) == 8)
        browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")[2].click()
        wait_for(lambda: shown(browser, "overlay") not in (None, before))

    def test_another_class(self, browser, address):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = text_of(browser, "sentence")
        predicted = re.search(r"evidence for (.+?)(?:, which|\.)", before)[1]
        other = next(name for name in NAMES if name != predicted)
        browser.find_element(By.CSS_SELECTOR, "#label input").click()
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#label [role=option], ul[role=listbox] li"))
        options = browser.find_elements(By.CSS_SELECTOR, "#label [role=option], ul[role=listbox] li")
        next(option for option in options if other in option.text).click()
        wait_for(lambda: f"evidence for {other}, which has" in text_of(browser, "sentence"))

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, browser, address, kind, tmp_path):
        self.open(browser, address)
        check_hostile_files(browser, kind, tmp_path, "overlay")

    def test_an_unknown_model_gets_a_sentence(self, browser, address):
        self.open(browser, address)
        check_unknown_model(browser)
