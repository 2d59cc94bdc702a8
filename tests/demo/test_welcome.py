import re

import pytest

from hf_dl.demo import welcome


class Source:
    """The models of a page without a model."""

    problem, can_train, ready = "", True, False

    class training:
        running, minutes, shown = False, "about a minute", "scripts/run train <flags>"

        @staticmethod
        def progress():
            return 0.25, "Step 1 of 4"

        @staticmethod
        def failure():
            return ""


@pytest.fixture
def source():
    class Training(Source.training):
        pass

    source = Source()
    source.training = Training
    return source


def text(source):
    return re.sub("</?span>", "", welcome.welcome_text(source, kind="a model", space="some_page"))


def test_training_is_offered_with_its_command(source):
    assert "about a minute on two CPU cores" in text(source) and "scripts/run train &lt;flags&gt;" in text(source)
    source.training.failure = staticmethod(lambda: "Training failed: <disk>")
    assert "Training failed: &lt;disk&gt;" in text(source)


def test_two_commands_are_two_lines(source):
    source.training.shown = "scripts/run one\nscripts/run two"
    assert "<code>scripts/run one<br>scripts/run two</code>" in text(source)


def test_without_scripts_it_says_how_to_add_a_model(source):
    source.can_train = False
    assert "HF_DL_MODEL" in text(source) and "publish spaces/some_page you/some_page --type space" in text(source)
    assert "two CPU cores" not in text(source)


def test_a_problem_comes_first(source):
    source.problem = "The model <x> is damaged."
    assert "The model &lt;x&gt; is damaged." in text(source) and "two CPU cores" not in text(source)


def test_progress_is_a_bar(source):
    source.training.running = True
    assert "width: 25.0%" in text(source) and "Step 1 of 4" in text(source)
