import shutil
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image
from transformers import HfArgumentParser

from hf_dl.demo import detectors
from hf_dl.demo.detectors import CANDIDATES, FOUND, draw_scenes
from hf_dl.demo.page import event
from hf_dl.publishing.command import main as publish

from ..demo.tiny import save_detector, save_resnet
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

app = load_app("detector")
TOOLS = ["detect", "regions"]
DIALS = (0.4, 0.5, False)  # threshold, NMS and true boxes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("second"), "yolo_v1")


@pytest.fixture
def explorer(folder, second, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DL_MODEL", str(folder))
    monkeypatch.setenv(app.SECOND, str(second))
    return app.Explorer(tmp_path)


def values(dropdown):
    return [value for _, value in dropdown.choices]


class TestExplorer:
    def test_the_first_example_has_two_detectors(self, explorer, folder, second):
        picture, left, right, left_view, right_view, line, *columns = explorer.start(0, *DIALS)
        assert picture is draw_scenes(0)[0] and values(left) == values(right) == [str(folder), str(second)]
        assert (left.value, right.value) == (str(folder), str(second)) and left_view.value == right_view.value == FOUND
        assert not line and str(folder.parent) not in "".join(columns)
        assert f"Anchor-free: {folder.name} · 4 classes" in columns[0] and "YOLO v1: " in columns[1]
        for column in columns:
            assert column.count("<img") == 1 and "objects found" in column and "Time of this run" in column

    def test_one_detector_is_shown_before_and_after_nms(self, explorer, folder, monkeypatch):
        monkeypatch.delenv(app.SECOND)
        _, left, right, left_view, right_view, line, *columns = explorer.start(0, *DIALS)
        assert left.value == right.value == str(folder) and values(left) == [str(folder)]
        assert (left_view.value, right_view.value) == (FOUND, CANDIDATES) and "before NMS" in columns[1]
        assert not line

    def test_newest_runs_are_choices(self, folder, second, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        shutil.copytree(second, tmp_path / "runs" / "yolo_v1")
        for name in ("faster_rcnn", "sliding_window"):
            save_detector(tmp_path / "runs" / name, name)
        (tmp_path / "runs" / "yolo_v1" / "model.safetensors").write_bytes(b"broken")
        explorer = app.Explorer(tmp_path)
        assert [label for label, _ in explorer.choices()] == ["YOLO v1", "Faster R-CNN", "Sliding window"]
        _, left, right, _, _, line, *_ = explorer.start(0, *DIALS)
        assert left.choices[0][0] == "Faster R-CNN" and right.value.endswith("sliding_window")
        assert "YOLO v1 is left out: The model 'yolo_v1' cannot be loaded" in line
        monkeypatch.setenv("HF_DL_MODEL", str(folder))
        assert app.Explorer(tmp_path).choices()[0][1] == str(folder)
        monkeypatch.setenv("HF_DL_MODEL", str(tmp_path / "." / "runs" / "sliding_window" / ".." / "faster_rcnn"))
        labels = [label for label, _ in app.Explorer(tmp_path).choices()]
        assert labels == ["Faster R-CNN", "YOLO v1", "Sliding window"]

    def test_dials_do_not_run_the_network(self, explorer, folder, second, monkeypatch):
        picture, names = draw_scenes(0)[0], (str(folder), str(second))
        before = explorer.look(picture, *names, FOUND, FOUND, *DIALS)
        monkeypatch.setattr(detectors, "detect", None)  # a call raises an error
        after = explorer.look(picture, *names, "cells", CANDIDATES, 0.05, 0.9, True)
        assert all(old != new for old, new in zip(before, after, strict=True))
        nothing = explorer.look(picture, *names, FOUND, FOUND, 0.99, 0.5, False)
        assert all("No object found: no box has a score above 0.99." in each for each in nothing)

    def test_an_upload_and_an_example(self, explorer, folder, tmp_path):
        make_image().save(tmp_path / "a.png")
        settings = (str(folder), str(folder), FOUND, "cells", *DIALS)
        picture, *columns = explorer.open(str(tmp_path / "a.png"), *settings)
        assert picture.image.size == (60, 40) and len(columns) == 2 and "objects found" not in columns[0]
        assert "16 grid cells, " in columns[1]
        picture, *_ = explorer.choose(2, 0, *settings)
        assert picture is draw_scenes(0)[2]
        assert len(explorer.look(None, *settings)) == 2

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, explorer, folder, kind, tmp_path):
        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(gr.Error, match=HOSTILE[kind]) as caught:
            event(explorer.open)(str(tmp_path / "a.png"), str(folder), str(folder), FOUND, FOUND, *DIALS)
        assert caught.value.print_exception is False

    def test_another_model_is_shown_on_the_right(self, explorer, folder, second, tmp_path):
        save_detector(tmp_path / "mine", "faster_rcnn", names=["cat", "dog"])
        picture = draw_scenes(0)[0]
        found = explorer.load(f" {tmp_path / 'mine'} ", picture, str(second), FOUND, *DIALS)
        left, right, view, first, other = found
        assert (left.value, right.value) == (str(second), str(tmp_path / "mine"))
        assert values(left) == values(right) == [str(folder), str(second), str(tmp_path / "mine")]
        assert [key for _, key in view.choices] == [FOUND, CANDIDATES, "proposals", "anchors"]
        assert "Faster R-CNN: mine · 2 classes" in other
        assert "objects found" in first and "The model has other classes than the scene." in other
        assert explorer.switch(str(second), "anchors").value == FOUND
        assert explorer.switch(str(second), "cells").value == "cells"

    def test_unsuitable_models_get_a_sentence(self, explorer, folder, tmp_path):
        save_resnet(tmp_path / "resnet")
        for name, sentence in {
            "/no/such/model": "The model '/no/such/model' was not found",
            str(tmp_path / "resnet"): "which is not an object detector. Choose an object detector.",
        }.items():
            with pytest.raises(gr.Error, match=sentence):
                event(explorer.load)(name, draw_scenes(0)[0], str(folder), FOUND, *DIALS)


class TestTraining:
    def test_trains_both_default_models(self, folder, second, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        write_script(
            tmp_path,
            "train_detector.py",
            "import shutil, sys, pathlib\n"
            "flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
            "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir', 12) + 1])\n"
            f"models = {{'anchor_free': {str(folder)!r}, 'yolo_v1': {str(second)!r}}}\n"
            "shutil.copytree(models[flags['--method']], folder, dirs_exist_ok=True)\n"
            "print('step 3/6 loss 0.5 val_map 0.25', file=sys.stderr)\n"
            "(folder / 'results.json').touch()\n",
        )
        explorer = app.Explorer(tmp_path)
        training = explorer.models.training
        assert not explorer.models.ready and explorer.models.can_train
        training.start()
        try:
            wait_for(lambda: not training.running)
        finally:
            training.stop()
        assert training.progress() == (0.75, "Model 2 of 2. Step 3 of 6 · loss 0.5 · validation mAP 0.25")
        assert explorer.models.ready and [label for label, _ in explorer.choices()] == ["Anchor-free", "YOLO v1"]
        assert "YOLO v1: yolo_v1 · 4 classes" in explorer.start(0, *DIALS)[-1]

    def test_the_real_script_takes_the_flags(self, monkeypatch):
        from scripts import train_detector

        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        training = app.make_training(ROOT)
        for each, method in ((training.first, "anchor_free"), (training, "yolo_v1")):
            assert Path(each.command[1]).is_file()
            (args,) = HfArgumentParser(train_detector.Args).parse_args_into_dataclasses(each.command[2:])
            assert args.resume and Path(args.output_dir) == each.folder and args.method == method
        assert training.shown.count("\n") == 1


class TestPage:
    def test_with_a_model(self, explorer):
        assert build_demo(app, explorer).analytics_enabled is False


class TestEndpoints:
    @pytest.fixture
    def page(self, explorer):
        return build_demo(app, explorer)

    @pytest.fixture
    def image(self, tmp_path):
        make_image().save(tmp_path / "a.png")
        return tmp_path / "a.png"

    def test_detect(self, page, explorer, second, image):
        detect = find_endpoint(page, "detect", tools=TOOLS)
        found = detect(image=image, detector=second.name, threshold=0.1, nms_threshold=0.9)
        detector = explorer.models.get(str(second))
        with Image.open(image) as opened:
            (expected,) = [detectors.detect(detector, opened.convert("RGB"))]
        chosen = detectors.select(expected, (60, 40), threshold=0.1, nms_threshold=0.9)
        assert found["detector"] == "YOLO v1" and len(found["results"]) == len(chosen.boxes) > 0
        for result, box, score in zip(found["results"], chosen.boxes.tolist(), chosen.scores.tolist(), strict=True):
            assert list(result["box"].values()) == pytest.approx(box) and result["score"] == pytest.approx(score)
        assert set(found["milliseconds"]) == {"features", "classification", "other", "nms"}
        with Image.open(found["image"]["path"]) as picture:
            assert picture.size == (768, 512)
        assert (
            detect(image=image)["detector"] == "Anchor-free" and detect(image=image, threshold=0.99)["results"] == []
        )

    def test_regions(self, page, image):
        regions = find_endpoint(page, "regions", tools=TOOLS)
        found = regions(image=image, view="cells", threshold=0)
        assert found["count"] == len(found["regions"]) == 16
        assert found["regions"][0]["box"] == {"xmin": 0, "ymin": 0, "xmax": 15, "ymax": 10}
        assert regions(image=image, threshold=1)["regions"] == []

    @pytest.mark.parametrize(
        ("name", "arguments", "sentence"),
        [
            ("detect", {"detector": "magic"}, "detector='magic' is unknown. Choose one of: "),
            ("detect", {"threshold": 1}, "threshold=1 is invalid. Input should be less than 1"),
            ("detect", {"nms_threshold": 0}, "nms_threshold=0 is invalid. Input should be greater than 0"),
            ("detect", {"threshold": "nan"}, "threshold='nan' is invalid"),
            (
                "regions",
                {"view": "anchors"},
                "view='anchors' is not a view of Anchor-free. Choose one of: candidates, c",
            ),
        ],
    )
    def test_bad_arguments_get_a_sentence(self, page, image, name, arguments, sentence):
        with pytest.raises(gr.Error, match=sentence):
            find_endpoint(page, name, tools=TOOLS)(image=image, **arguments)


def test_publish_bundles_the_model(folder, capsys):
    words = [str(ROOT / "spaces" / "detector"), "user/detector", "--type", "space", "--dry_run"]
    assert publish([*words, "--model", str(folder)]) == 0, capsys.readouterr().err
    assert "model/model.safetensors" in capsys.readouterr().out


def test_requirements_and_front_matter_fit_the_project():
    check_space("detector")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(folder, second, tmp_path_factory):
    with serve("detector", folder, tmp_path_factory.mktemp("server"), **{app.SECOND: second}) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
class TestClients:
    def test_the_example_in_the_readme(self, address, tmp_path):
        found = run_example("detector", address, tmp_path)
        assert found["detector"] == "Anchor-free" and found["milliseconds"]["features"] > 0

    def test_a_client_of_the_model_context_protocol(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        found = call_tool(address, "regions", tools=TOOLS, image=as_url(tmp_path / "a.png"), view="cells")
        assert found["count"] == 16 and download(found["image"]).size == (768, 512)


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "left") and shown(browser, "right") and "Time of" in text_of(browser, "right"))

    def choose(self, browser, name, label):
        """Choose an entry of a dropdown."""
        from selenium.webdriver.common.by import By

        browser.find_element(By.CSS_SELECTOR, f"#{name} input").click()
        entries = (By.CSS_SELECTOR, "[role=option], ul.options li")
        wait_for(lambda: any(label in each.text for each in browser.find_elements(*entries)))
        next(each for each in browser.find_elements(*entries) if label in each.text).click()

    def slide(self, browser, name, value):
        number = f"document.querySelector('#{name} input[type=number]')"
        browser.execute_script(
            f"{number}.value = {value}; {number}.dispatchEvent(new Event('input', {{bubbles: true}}))"
        )

    def test_on_a_phone(self, browser, address):
        with phone(browser):
            self.open(browser, address)

    def test_dials_and_views_change_the_pictures(self, browser, address):
        self.open(browser, address)
        self.slide(browser, "threshold", 0.99)
        wait_for(lambda: "above 0.99" in text_of(browser, "left") and "above 0.99" in text_of(browser, "right"))
        before = shown(browser, "right")
        self.choose(browser, "right_view", "Grid cells")
        wait_for(lambda: "16 grid cells" in text_of(browser, "right") and shown(browser, "right") != before)
        assert "grid cells" not in text_of(browser, "left")
        self.slide(browser, "threshold", 0.05)
        wait_for(lambda: "above 0.05" in text_of(browser, "left"))
        before = shown(browser, "left")
        self.slide(browser, "nms", 1)
        wait_for(lambda: shown(browser, "left") != before)

    def test_true_boxes_and_other_images(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "left")
        browser.execute_script("document.querySelector('#truth input').click()")
        wait_for(lambda: shown(browser, "left") != before)
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")) == 8)
        before = shown(browser, "left")
        browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")[1].click()
        wait_for(lambda: shown(browser, "left") != before and "objects found" in text_of(browser, "left"))
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png")
        wait_for(lambda: "objects found" not in text_of(browser, "left"))

    def test_another_detector_is_chosen(self, browser, address, second):
        self.open(browser, address)
        before = shown(browser, "left")
        self.choose(browser, "left_detector", second.name)
        wait_for(lambda: shown(browser, "left") != before)

    def test_hostile_files_get_a_sentence(self, browser, address, tmp_path):
        self.open(browser, address)
        check_hostile_files(browser, "text", tmp_path, "left")

    def test_an_unknown_model_gets_a_sentence(self, browser, address):
        self.open(browser, address)
        check_unknown_model(browser)

    def test_without_a_model_recorded_results_are_shown(self, browser, tmp_path):
        from selenium.webdriver.common.by import By

        with serve("detector", "", tmp_path) as (address, log):
            with phone(browser):
                browser.get(address)
                wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#recorded figure"))
                wait_for(lambda: browser.find_elements(By.ID, "train"))
            assert "Traceback" not in log.read_text()
