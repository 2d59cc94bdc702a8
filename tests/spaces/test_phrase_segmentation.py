import json
import re
import shutil
import statistics
import time
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from transformers import HfArgumentParser

from hf_dl.demo.page import event
from hf_dl.demo.phrases import draw_scenes
from hf_dl.pipelines.phrase_matching import THRESHOLD
from hf_dl.publishing.command import main as publish
from hf_dl.reporting.report import read_report

from ..demo.tiny import make_gap, save_phrase_model
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

app = load_app("phrase_segmentation")
TOOLS = ["segment", "match", "modality_gap"]
SCRIPTS = ["train_clip.py", "train_phrase_segmentation.py"]
HTML = "<img src=x onerror=alert(1)>"
USUAL = (None, 0.5, "masks")  # model, threshold and view
CLICK_TWO = """
const all = document.querySelectorAll('#examples .thumbnail-item'), ask = window.fetch;
window.fetch = async (...request) => { await new Promise(done => setTimeout(done, 500)); return ask(...request); };
all[1].click();
setTimeout(() => all[2].click(), 250);
"""
HOSTILE_PHRASES = [
    ("", "The phrases are missing. Write at least one, such as 'red cube'."),
    (" \n\n", "The phrases are missing."),
    ("\n".join(f"phrase {number}" for number in range(1000)), "There are 1,000 phrases. Write at most 20."),
    ("cube " * 300, "A phrase has 1499 characters. The limit is 1000."),
    (f"{HTML} " * 20, "The phrase .* tokens. The limit of the model is 8; write a shorter phrase."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_phrase_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def explorer(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DL_MODEL", str(folder))
    (tmp_path / "gap.json").write_text(json.dumps(make_gap()))
    return app.Explorer(tmp_path, tmp_path / "gap.json")


class TestExplorer:
    def test_the_first_example_has_masks_and_matches(self, explorer):
        text, picture, image, name, line, threshold, sentence, masks, best, table = explorer.start(0, "masks")
        assert picture is draw_scenes(0)[0] and image is picture.image and text.split("\n") == list(picture.phrases)
        assert name == explorer.models.default and "decoder clipseg" in line and threshold == 0.3
        assert sentence.startswith("### ") and masks.count("<figure") == len(picture.phrases)
        assert best.startswith("### Most likely phrase: ") and table.count("<tr") == 1 + len(picture.phrases)

    def test_nothing_passes_the_highest_threshold(self, explorer):
        *_, sentence, masks, _, _ = explorer.choose(1, 0, None, 0.99, "masks")
        assert "None of the" in sentence and masks.count("not in the image") == masks.count("<figure") > 1

    def test_an_upload_keeps_the_phrases_of_the_page(self, explorer, tmp_path):
        make_image().save(tmp_path / "a.png")
        picture, image, _, masks, _, table = explorer.open(str(tmp_path / "a.png"), "red cube\ncone\ncone", *USUAL)
        assert picture.image is image and masks.count("<figure") == 2 and table.count("<tr") == 3

    def test_without_an_image_nothing_changes(self, explorer):
        assert len(explorer.look(None, "", *USUAL)) == 4

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, explorer, kind, tmp_path):
        write_hostile(kind, tmp_path / "a.png")
        with pytest.raises(gr.Error, match=HOSTILE[kind]) as caught:
            event(explorer.open)(str(tmp_path / "a.png"), "cube", *USUAL)
        assert caught.value.print_exception is False

    @pytest.mark.parametrize(("text", "sentence"), HOSTILE_PHRASES)
    def test_hostile_phrases_get_a_sentence(self, explorer, text, sentence):
        with pytest.raises(gr.Error, match=sentence) as caught:
            event(explorer.look)(draw_scenes(0)[0], text, *USUAL)
        assert caught.value.print_exception is False and "<img" not in str(caught.value)

    def test_html_in_a_phrase_is_shown(self, explorer):
        views = explorer.look(draw_scenes(0)[0], f"{HTML}\ncube", *USUAL)
        assert all("<img src=x" not in view for view in views) and "&lt;img src=x onerror=alert(1)&gt;" in views[1]

    def test_another_model_brings_its_threshold(self, explorer, tmp_path):
        save_phrase_model(tmp_path / "other", seed=1, threshold=0.62, decoder_type="unet")
        name, line, threshold, *views = explorer.load(f" {tmp_path / 'other'} ", draw_scenes(0)[0], "cube", "masks")
        assert (name, threshold) == (str(tmp_path / "other"), 0.62) and len(views) == 4
        assert "decoder unet" in line and str(tmp_path) not in line
        with pytest.raises(gr.Error, match="The model '/no/such/model' was not found"):
            event(explorer.load)("/no/such/model", draw_scenes(0)[0], "cube", "masks")


class TestPage:
    def test_with_a_model(self, explorer):
        assert build_demo(app, explorer).analytics_enabled is False

    def test_without_a_model_and_points(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        page = build_demo(app, app.Explorer(tmp_path, tmp_path / "none.json"))
        texts = [getattr(block, "value", None) for block in page.blocks.values()]
        assert app.NO_MODEL in texts and app.NO_POINTS in texts

    def test_a_tab_that_opens_before_the_model_does_not_hide_the_inputs(self, explorer):
        page = build_demo(app, explorer)
        tabs = {key: block.elem_id for key, block in page.blocks.items() if isinstance(block, gr.Tab)}
        select = {tabs[key]: each.fn for each in page.fns.values() for key, name in each.targets if key in tabs}
        assert list(select) == ["gap_tab", "masks_tab", "match_tab"] and select["gap_tab"]().visible is False
        for tab in ("masks_tab", "match_tab"):
            assert select[tab](False) == gr.skip() and select[tab](True).visible is True

    def test_the_committed_points_are_small_and_complete(self):
        path = ROOT / "spaces" / "phrase_segmentation" / "gap.json"
        if not path.exists():
            pytest.skip("scripts/make_gap_playground.py has not recorded them yet")
        assert path.stat().st_size < 300_000
        results = app.gap.GapResults(path)
        assert results.commit and results.details and "learned" in results.temperatures
        for detail, temperature in results.cells:
            for alignment in app.gap.ALIGNMENTS:
                assert results.draw(detail, temperature, alignment).count("<circle") >= 400

    def test_the_page_shows_the_scores_of_the_card(self):
        results = app.gap.GapResults(ROOT / "spaces" / "phrase_segmentation" / "gap.json")
        groups = {group.key: group for group in read_report(ROOT / "model_cards" / "clip_gap.json").groups()}
        assert set(results.cells) == set(groups)
        for setting, group in groups.items():
            cell, text = results.get(*setting), results.draw(*setting, "centering")
            assert cell.seeds == len(group.finished) and f"All {cell.seeds} models" in text
            for key, label in app.gap.RUN_SCORES.items():
                mean, deviation = (f(group.values(f"test_{key}")) for f in (statistics.fmean, statistics.stdev))
                percent, digits = (100, 0.06) if key in app.gap.SHARES else (1, 0.0006)
                shown = re.search(rf"<td>{label}</td><td>([\d.]+)%? ± ([\d.]+)%?</td>", text)
                assert float(shown[1]) == pytest.approx(percent * mean, abs=digits), (setting, key)
                assert float(shown[2]) == pytest.approx(percent * deviation, abs=digits), (setting, key)


class TestEndpoints:
    @pytest.fixture
    def page(self, explorer):
        return build_demo(app, explorer)

    @pytest.fixture
    def photo(self, tmp_path):
        make_image().save(tmp_path / "a.png")
        return tmp_path / "a.png"

    def test_segment(self, page, explorer, photo):
        segment = find_endpoint(page, "segment", tools=TOOLS, required=2)
        found = segment(image=photo, phrases=["red cube", "dinosaur"], threshold=0.5)
        pipeline = explorer.models.get().pipeline
        assert found["threshold"] == 0.5 and len(found["results"]) == 2
        with Image.open(photo) as image:
            expected = pipeline(image, ["red cube", "dinosaur"], threshold=0.5)
        for result, each in zip(found["results"], expected, strict=True):
            assert [result[key] for key in ("label", "score", "found")] == [
                each[key] for key in ("label", "score", "found")
            ]
            assert result["area"] == pytest.approx(each["area"])
            with Image.open(result["mask"]["path"]) as mask, Image.open(result["overlay"]["path"]) as overlay:
                assert np.array_equal(np.asarray(mask.convert("L")), np.asarray(each["mask"]))
                assert overlay.size == (60, 40)
        assert [each["unknown_words"] for each in found["results"]] == [[], ["dinosaur"]]
        assert segment(image=photo, phrases=["red cube"])["threshold"] == 0.3  # of the model

    def test_match(self, page, photo):
        match = find_endpoint(page, "match", tools=TOOLS, required=2)
        found = match(image=photo, phrases=["red cube", "dinosaur"])
        assert found["temperature"] == pytest.approx(0.05)
        first, second = found["results"]
        assert first["score"] + second["score"] == pytest.approx(1) and -1 <= first["cosine"] <= 1
        assert isinstance(first["accepted"], bool) and second["accepted"] is second["margin"] is None
        assert first["threshold"] == THRESHOLD and second["threshold"] is None
        json.dumps(found)

    @pytest.mark.parametrize(
        ("phrases", "sentence"),
        [
            ([], "The phrases are missing"),
            (["a", ""], "Phrase 2 is empty"),
            (["a"] * 1000, "There are 1,000 phrases. Write at most 20."),
            ("red cube", "phrases='red cube' is invalid. Input should be a valid list."),
            ([HTML * 100], "A phrase has 2800 characters"),
        ],
    )
    def test_hostile_phrases_get_a_sentence(self, page, photo, phrases, sentence):
        segment = find_endpoint(page, "segment", tools=TOOLS, required=2)
        with pytest.raises(gr.Error, match=sentence):
            segment(image=photo, phrases=phrases)

    def test_other_bad_arguments(self, page, photo):
        segment = find_endpoint(page, "segment", tools=TOOLS, required=2)
        with pytest.raises(gr.Error, match="threshold=1.5 is invalid. Input should be less than 1"):
            segment(image=photo, phrases=["a"], threshold=1.5)

    def test_modality_gap(self, page):
        modality_gap = find_endpoint(page, "modality_gap", tools=TOOLS, required=0)
        found = modality_gap(captions="poor", temperature="0.5", alignment="rotation")
        assert found["models"] == 3 and found["scores"]["plain_accuracy"] == [0.7, 0.02]
        assert found["fitted_on"] == "5 <scenes>"
        assert found["before"]["images"][0] == 0.8 and found["after"]["images"][0] == 0.2
        assert modality_gap() == modality_gap(captions="rich", temperature="learned", alignment="centering")
        with pytest.raises(gr.Error, match="captions='rich' with temperature='7' have no recorded results"):
            modality_gap(temperature="7")
        with pytest.raises(gr.Error, match="captions='many' is invalid. Input should be 'rich', 'partial' or 'poor'."):
            modality_gap(captions="many")


class TestTraining:
    @pytest.fixture
    def root(self, folder, tmp_path, monkeypatch):
        """A folder with two scripts, which wait for a file and then write results."""
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        for name in SCRIPTS:
            copy = f"shutil.copytree({str(folder)!r}, folder, dirs_exist_ok=True)" if name == SCRIPTS[1] else ""
            write_script(
                tmp_path,
                name,
                "import shutil, sys, time, pathlib\n"
                "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
                "print('step 25/100 loss 0.5', file=sys.stderr, flush=True)\n"
                "while not list(folder.glob('go_*')): time.sleep(0.05)\n"
                f"{copy}\n"
                "if not (folder / 'go_1').exists(): (folder / 'results.json').touch()\n"
                "sys.exit(int((folder / 'go_1').exists()))\n",
            )
        return tmp_path

    def test_trains_clip_and_then_the_decoder(self, root):
        models = app.Explorer(root).models
        training, clip = models.training, models.training.first
        assert not models.ready and models.can_train
        training.start()
        try:
            wait_for(lambda: training.progress()[0])
            assert training.progress() == (0.125, "Model 1 of 2. Step 25 of 100 · loss 0.5")
            assert training.process is None and training.running and not models.ready
            (clip.folder / "go_0").touch()
            wait_for(lambda: training.progress()[0] > 0.5)
            assert training.progress() == (0.625, "Model 2 of 2. Step 25 of 100 · loss 0.5") and training.running
            (training.folder / "go_0").touch()
            wait_for(lambda: not training.running)
        finally:
            training.stop()
        assert models.ready and models.get().threshold == 0.3 and not training.failure()

    def test_a_finished_clip_is_used(self, root):
        training = app.Explorer(root).models.training
        training.first.folder.mkdir(parents=True)
        (training.first.folder / "results.json").touch()
        training.start()
        try:
            assert training.process is not None and training.first.process is None
        finally:
            training.process.kill()
            training.process.wait()

    @pytest.mark.parametrize("end", ["fail", "stop"])
    def test_the_decoder_does_not_start_without_clip(self, root, end):
        training = app.Explorer(root).models.training
        training.start()
        wait_for(lambda: training.progress()[0])
        if end == "fail":
            (training.first.folder / "go_1").touch()
        else:
            training.stop()
        wait_for(lambda: not training.running)
        time.sleep(0.1)
        assert training.process is None
        expected = {"fail": "Training failed: step 25/100", "stop": "Training was stopped before its first step."}
        assert training.failure().startswith(expected[end])

    def test_the_real_scripts_take_the_flags(self, monkeypatch, tmp_path):
        from scripts import train_clip, train_phrase_segmentation

        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        training = app.make_training(ROOT)
        for each, script in ((training.first, train_clip), (training, train_phrase_segmentation)):
            assert Path(each.command[1]).is_file()
            (args,) = HfArgumentParser(script.Args).parse_args_into_dataclasses(each.command[2:])
            assert args.resume and Path(args.output_dir) == each.folder
        assert training.root / args.clip == training.first.folder
        assert training.shown.split("\n") == [f"scripts/run accelerate launch scripts/{name}" for name in SCRIPTS]

    def test_runs_of_the_script_are_found(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        shutil.copytree(folder, tmp_path / "runs" / "phrases" / "0123abcd")
        assert app.Explorer(tmp_path).models.get().name == str(tmp_path / "runs" / "phrases" / "0123abcd")


def test_publish_bundles_the_model(folder, capsys):
    words = [str(ROOT / "spaces" / "phrase_segmentation"), "user/phrases", "--type", "space", "--dry_run"]
    assert publish([*words, "--model", str(folder)]) == 0, capsys.readouterr().err
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert {f"model/{name}" for name in names} <= listed
    assert {"model/preprocessor_config.json", "model/processor_config.json"} & listed


def test_requirements_and_front_matter_fit_the_project():
    check_space("phrase_segmentation")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serve("phrase_segmentation", folder, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
class TestClients:
    def test_the_example_in_the_readme(self, address, tmp_path):
        found = run_example("phrase_segmentation", address, tmp_path)
        assert [result["label"] for result in found["results"]] == ["red cube", "cone"]
        with Image.open(found["results"][0]["mask"]) as mask:
            assert mask.size == (60, 40)

    def test_a_client_of_the_model_context_protocol(self, address, tmp_path):
        make_image().save(tmp_path / "a.png")
        image = as_url(tmp_path / "a.png")
        found = call_tool(address, "segment", tools=TOOLS, image=image, phrases=["red cube"])
        assert download(found["results"][0]["overlay"]).size == (60, 40)
        found = call_tool(address, "match", tools=TOOLS, image=image, phrases=["red cube", "cone"])
        assert sum(result["score"] for result in found["results"]) == pytest.approx(1)
        sentence = call_tool(address, "match", tools=TOOLS, image=image, phrases=["a"] * 1000)
        assert "There are 1,000 phrases. Write at most 20." in sentence


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: shown(browser, "masks") and "in the image" in text_of(browser, "sentence"))

    def write(self, browser, text):
        from selenium.webdriver.common.by import By

        box = browser.find_element(By.CSS_SELECTOR, "#phrases textarea")
        box.clear()
        box.send_keys(text)
        browser.find_element(By.ID, "find").click()

    def choose_tab(self, browser, label):
        from selenium.webdriver.common.by import By

        next(e for e in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if e.text.strip() == label).click()

    def test_on_a_phone(self, browser, address):
        with phone(browser):
            self.open(browser, address)
            self.write(browser, "word_without_spaces" * 6)
            wait_for(lambda: "word_without_spaces" in text_of(browser, "masks"))
        with phone(browser):
            self.choose_tab(browser, "Zero-shot")
            wait_for(lambda: "cosine" in text_of(browser, "table"))
        with phone(browser):
            self.choose_tab(browser, "Modality gap")
            wait_for(lambda: not browser.execute_script("return document.querySelector('#find')?.offsetWidth"))

    def test_phrases_go_in_and_masks_come_out(self, browser, address):
        self.open(browser, address)
        self.write(browser, f"red cube\n{HTML}")
        wait_for(lambda: HTML in text_of(browser, "masks"))
        assert not browser.execute_script("return document.querySelector('img[src=x]')")
        before = shown(browser, "masks")
        press(browser, "view", "probabilities")
        wait_for(lambda: shown(browser, "masks") not in (None, before))
        self.choose_tab(browser, "Zero-shot")
        wait_for(lambda: HTML in text_of(browser, "table") and "Cosine" in text_of(browser, "best"))

    def test_a_threshold_is_chosen(self, browser, address):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.open(browser, address)
        number = browser.find_element(By.CSS_SELECTOR, "#threshold input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys("0.99", Keys.ENTER)
        wait_for(lambda: "None of the" in text_of(browser, "sentence"))
        assert "not in the image" in text_of(browser, "masks")

    def test_an_image_and_an_example(self, browser, address, tmp_path):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        before = shown(browser, "masks")
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png")
        wait_for(lambda: shown(browser, "masks") not in (None, before))
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")) == 8)
        browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")[1].click()
        wait_for(lambda: draw_scenes(0)[1].phrases[0] in text_of(browser, "masks"))

    def test_the_last_of_two_examples_is_shown(self, browser, address):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")) == 8)
        browser.execute_script(CLICK_TWO)  # the second before the answer for the first
        wait_for(lambda: draw_scenes(0)[2].phrases[0] in text_of(browser, "masks"), seconds=20)

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_files_get_a_sentence(self, browser, address, kind, tmp_path):
        self.open(browser, address)
        check_hostile_files(browser, kind, tmp_path, "masks")

    def test_hostile_phrases_get_a_sentence(self, browser, address):
        self.open(browser, address)
        before = text_of(browser, "masks")
        self.write(browser, "a\n" * 25)
        wait_for(lambda: "There are 25 phrases. Write at most 20." in browser.page_source)
        assert text_of(browser, "masks") == before and "Traceback" not in browser.page_source

    def test_an_unknown_model_gets_a_sentence(self, browser, address):
        self.open(browser, address)
        check_unknown_model(browser)

    def test_without_a_model_the_gap_is_shown(self, browser, tmp_path):
        from selenium.webdriver.common.by import By

        with serve("phrase_segmentation", "", tmp_path) as (address, log):
            with phone(browser):
                browser.get(address)
                wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#recorded figure"))
                wait_for(lambda: browser.find_elements(By.ID, "train"))
                self.choose_tab(browser, "Modality gap")
                wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#plots svg, #no_points"))
            if browser.find_elements(By.ID, "plots"):
                before = text_of(browser, "plots")
                press(browser, "alignment", "rotation")
                wait_for(lambda: text_of(browser, "plots") not in ("", before))
            assert "Traceback" not in log.read_text()
