import re

import gradio as gr
import pytest
from transformers import HfArgumentParser

from hf_dl.demo.page import event
from hf_dl.pipelines.math_program import MathProgramPipeline
from hf_dl.publishing.command import main as publish
from tests.pipelines.tiny_solver import TRAIN, make_solver

from .pages import (
    ROOT,
    build_demo,
    call_tool,
    check_space,
    check_unknown_model,
    find_endpoint,
    load_app,
    phone,
    run_example,
    serve,
    text_of,
    wait_for,
    write_script,
)

app = load_app("math_program")
USUAL = ("", 10, 1.0, ["grammar", "rerank"])
HOSTILE = {
    "": "The problem is empty",
    "how far does a train run in two hours ?": "has no numbers",
    "how far " * 2500 + "3": "The problem has 5001 words",
    "поезд проходит 120 км за 2 часа": "not in Latin letters",
    "<img src=x onerror=alert(1)> 5": "The model knows 0 of the",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_solver().save_pretrained(folder)
    return folder


@pytest.fixture
def solver(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DL_MODEL", str(folder))
    return app.Solver(tmp_path)


class TestSolver:
    def test_solve(self, solver):
        solution = solver.solve(TRAIN, *USUAL)
        assert solution.answer == 300 and len(solution.candidates) == 10
        assert solver.solve(TRAIN, "a ) 60 , b ) 300", 2.0, 0.5, []).option == "b"

    @pytest.mark.parametrize("problem", HOSTILE)
    def test_refuses_in_a_sentence(self, solver, problem):
        with pytest.raises(gr.Error, match=HOSTILE[problem]) as caught:
            event(solver.solve)(problem, *USUAL)
        assert caught.value.print_exception is False and "<img" not in str(caught.value)

    @pytest.mark.parametrize(
        "settings, sentence",
        [
            (("none", 10, 1.0, []), "has no options"),
            (("", 10_000, 1.0, []), "num_beams=10000 must be from 1 to 100"),
            (("", 10, 1.0, ["magic"]), "are unknown. Choose from: grammar, rerank, vote"),
        ],
    )
    def test_settings_that_the_page_does_not_offer(self, solver, settings, sentence):
        with pytest.raises(gr.Error, match=sentence):
            event(solver.solve)(TRAIN, *settings)

    def test_another_model(self, solver, tmp_path):
        make_solver(steps=0, attention=False).save_pretrained(tmp_path / "other")
        name, line = solver.load(f" {tmp_path / 'other'} ")
        assert name == str(tmp_path / "other") and str(tmp_path) not in line and "without attention" in line
        assert "has no attention" in app.show_map(solver.solve(TRAIN, *USUAL, name))
        with pytest.raises(gr.Error, match="The model '/no/such/model'"):
            event(solver.load)("/no/such/model")

    def test_the_default_model(self, solver, folder):
        name, line = solver.load(None)
        assert name == str(folder) and line.startswith(f"Model `{folder.name}` · BiLSTM with attention")


class TestShow:
    def test_answer_steps_and_beam(self, solver):
        answer, steps, _, beam = app.show(solver.solve(TRAIN, "a ) 300", *USUAL[1:]))
        assert "300 (option a)" in answer and "divide(n0,n1)|multiply(#0,n2)" in answer
        assert steps.count("<li>") == 2 and "120 divided by 2 is 60." in steps
        assert beam.count("<tr") == 11 and beam.count("class='marked'") == 1

    def test_the_map_has_a_row_a_symbol_and_a_column_a_word(self, solver):
        solution = solver.solve(TRAIN, *USUAL)
        found = app.show_map(solution)
        assert found.count("<tr>") == 1 + len(solution.symbols)
        assert found.count("<td ") == len(solution.symbols) * len(solution.words)
        for number, value in enumerate(("120", "2", "5")):  # one color for the word and for the symbol
            assert f"<th class='word number' style='color: {app.color_of(number)}'>{value}</th>" in found
            assert f"<th class='symbol number' style='color: {app.color_of(number)}'>n{number} = {value}</th>" in found
        weights = [int(each) for each in re.findall(r"#[0-9a-f]{6} (\d+)%", found)]
        assert sum(weights) == pytest.approx(100 * len(solution.symbols), abs=len(weights) / 2)

    def test_words_are_escaped(self, solver):
        solution = solver.solve(TRAIN.replace("how", "<b>"), *USUAL)
        solution.words[0] = "<b>"
        assert "<b>" not in app.show_map(solution)

    def test_a_program_without_a_value(self, solver):
        solution = solver.solve(TRAIN.replace("2 hours", "0 hours"), "", 1, 1.0, [])
        assert "The program has no value" in app.show_answer(solution) and "divides by zero" in app.show_answer(
            solution
        )
        assert app.show_steps(solution) == "<ol></ol>" and "divides by zero" in app.show_beam(solution)


class TestPage:
    def test_with_a_model(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(folder))
        assert build_demo(app, app.Solver(tmp_path)).analytics_enabled is False

    def test_without_one(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        assert build_demo(app, app.Solver(tmp_path)).analytics_enabled is False

    def test_examples(self):
        problems = app.draw_examples(3)
        assert len(set(problems)) == 6 and problems != app.draw_examples(4)


class TestEndpoint:
    def test_solve(self, solver):
        solve = find_endpoint(build_demo(app, solver), "solve")
        found, expected = solve(problem=TRAIN), solver.solve(TRAIN, *USUAL)
        assert (found["answer"], found["program"]) == (300, expected.program)
        assert found["programs"] == [[each.program, each.value, each.score] for each in expected.candidates]
        assert solve(problem=TRAIN, options="a ) 60 , b ) 300", num_beams=2, switches=[])["option"] == "b"
        with pytest.raises(gr.Error, match="switches='magic' is invalid. Input should be 'grammar', "):
            solve(problem=TRAIN, switches=["magic"])

    def test_the_page_suggests_a_model_of_its_kind(self, solver):
        (box,) = (each for each in build_demo(app, solver).blocks.values() if getattr(each, "elem_id", "") == "name")
        assert box.placeholder == "runs/train_seq2seq" and "program_seq2seq" in box.info


class TestTraining:
    def test_trains_then_shows(self, folder, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        write_script(
            tmp_path,
            "train_seq2seq.py",
            "import shutil, sys, time, pathlib\n"
            "folder = sys.argv[sys.argv.index('--output_dir') + 1]\n"
            "print('step 25/100 loss 0.5 val_loss 0.7 val_execution_accuracy 0.9', file=sys.stderr, flush=True)\n"
            "while not pathlib.Path(folder, 'go').exists(): time.sleep(0.05)\n"
            f"shutil.copytree({str(folder)!r}, folder, dirs_exist_ok=True)\n",
        )
        models = app.Solver(tmp_path).models
        assert not models.ready and models.can_train
        models.training.start()
        try:
            wait_for(lambda: models.training.progress()[0])
            assert models.training.progress() == (0.25, "Step 25 of 100 · loss 0.5 · correct answers 0.9")
            (models.training.folder / "go").touch()
            wait_for(lambda: models.ready)
        finally:
            models.training.process.kill()
        assert isinstance(models.get(), MathProgramPipeline)

    def test_the_real_script_takes_the_flags(self):
        from scripts.train_seq2seq import Args

        command = app.make_training(ROOT).command
        (args,) = HfArgumentParser(Args).parse_args_into_dataclasses(command[2:])
        assert args.resume and args.source == "synthetic"


def test_publish_accepts_the_space(capsys):
    assert publish([str(ROOT / "spaces" / "math_program"), "user/math", "--type", "space", "--dry_run"]) == 0
    assert "app.py" in capsys.readouterr().out


def test_requirements_and_front_matter_fit_the_project():
    check_space("math_program")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serve("math_program", folder, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def address(server):
    """The app's address; in the end it must have written no traceback."""
    yield server[0]
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
class TestClient:
    def call(self, address, **inputs):
        from gradio_client import Client

        return Client(address, verbose=False).predict(**inputs, api_name="/solve")

    def test_solve(self, address):
        found = self.call(address, problem=TRAIN)
        assert found["answer"] == 300 and found["steps"][0] == "120 divided by 2 is 60."
        assert len(found["programs"]) == 10

    def test_the_example_in_the_readme(self, address, tmp_path):
        assert len(run_example("math_program", address, tmp_path)["programs"]) == 10

    def test_a_client_of_the_model_context_protocol(self, address):
        assert call_tool(address, "solve", problem=TRAIN)["answer"] == 300
        assert "The problem is empty" in call_tool(address, "solve", problem="")

    @pytest.mark.parametrize("problem", HOSTILE)
    def test_hostile_problems_get_a_sentence(self, address, problem):
        from gradio_client.exceptions import AppError

        with pytest.raises(AppError, match=HOSTILE[problem]):
            self.call(address, problem=problem)


@pytest.mark.slow
class TestBrowser:
    def open(self, browser, address):
        browser.get(address)
        wait_for(lambda: text_of(browser, "answer"))

    def type(self, browser, text, name="problem"):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        box = browser.find_element(By.CSS_SELECTOR, f"#{name} textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.DELETE, text)

    def paste(self, browser, text):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        browser.find_element(By.CSS_SELECTOR, "#problem textarea").send_keys(Keys.CONTROL, "a")
        browser.execute_cdp_cmd("Input.insertText", {"text": text})
        browser.find_element(By.ID, "solve").click()  # Gradio takes keys for input, and no text that is put in whole

    def test_on_a_phone(self, browser, address):
        with phone(browser):
            self.open(browser, address)
            self.type(browser, TRAIN)
            wait_for(lambda: text_of(browser, "answer").startswith("300"))

    def test_a_problem_goes_in_and_an_answer_comes_out(self, browser, address):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        self.type(browser, TRAIN)
        wait_for(lambda: text_of(browser, "answer").startswith("300"))
        wait_for(lambda: "120 divided by 2 is 60." in text_of(browser, "steps"))
        assert len(browser.find_elements(By.CSS_SELECTOR, "#map tr")) == 7
        assert len(browser.find_elements(By.CSS_SELECTOR, "#beam tr")) == 11

    def test_a_number_is_changed_and_the_answer_follows(self, browser, address):
        self.open(browser, address)
        self.type(browser, TRAIN)
        wait_for(lambda: text_of(browser, "answer").startswith("300"))
        self.type(browser, TRAIN.replace("120", "240"))
        wait_for(lambda: text_of(browser, "answer").startswith("600"))
        self.type(browser, "a ) 1 , b ) 600 km", "options")
        wait_for(lambda: "option b" in text_of(browser, "answer"))

    def test_the_search_is_changed(self, browser, address):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.open(browser, address)
        self.type(browser, TRAIN)
        wait_for(lambda: text_of(browser, "answer").startswith("300"))
        number = browser.find_element(By.CSS_SELECTOR, "#beams input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys("3", Keys.TAB)
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#beam tr")) == 4)

    def test_an_example_is_chosen(self, browser, address):
        from selenium.webdriver.common.by import By

        self.open(browser, address)
        wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#examples label")) == 6)
        box = browser.find_element(By.CSS_SELECTOR, "#problem textarea")
        second = browser.find_elements(By.CSS_SELECTOR, "#examples label")[1]
        text = second.text
        second.click()
        wait_for(lambda: " ".join(box.get_attribute("value").split()) == " ".join(text.split()))

    @pytest.mark.parametrize("problem", list(HOSTILE)[1:])
    def test_hostile_problems_get_a_sentence(self, browser, address, problem):
        self.open(browser, address)
        self.paste(browser, problem)
        wait_for(lambda: HOSTILE[problem] in text_of(browser, "answer"))
        assert text_of(browser, "steps") == "" and "Traceback" not in browser.page_source
        self.type(browser, TRAIN)
        wait_for(lambda: text_of(browser, "answer").startswith("300"))

    def test_an_unknown_model_gets_a_sentence(self, browser, address):
        self.open(browser, address)
        check_unknown_model(browser)
