import gradio as gr
import pytest

from hf_dl.demo import page


class TestPieces:
    def test_a_message_is_no_html(self):
        def refuse():
            raise ValueError("<b>bold</b>")

        with pytest.raises(gr.Error, match="&lt;b&gt;") as caught:
            page.event(refuse)()
        assert caught.value.print_exception is False

    def test_a_generator_is_shown_step_by_step(self):
        def count():
            yield from (1, 2)
            raise ValueError("3 is missing.")

        steps = page.event(count, lambda number: number * 10)()
        assert (next(steps), next(steps)) == (10, 20)
        with pytest.raises(gr.Error, match="3 is missing") as caught:
            next(steps)
        assert caught.value.print_exception is False

    def test_a_generator_without_a_step_leaves_the_page_as_it_is(self):
        assert list(page.event(lambda: (yield from ()))()) == [gr.skip()]

    def test_bars_are_no_html_of_the_model(self):
        text = page.show_bars("Top", [("<img src=x onerror='y'>", 0.5), ("cat", 0.25)], "cat")
        assert "<img" not in text and "onerror='" not in text
        assert "width: 50.00%" in text and text.count("marked") == 1

    def test_names_are_no_markdown(self):
        assert page.plain("a_b *c* <d>") == "a&#95;b &#42;c&#42; &#60;d&#62;"
