"""The pages without a model, in a browser."""

import pytest

from tests.spaces.pages import ROOT, phone, serve, wait_for


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("spaces/*/app.py")))
def test_on_a_phone(name, browser, tmp_path):
    words = "return [...document.querySelectorAll('.welcome pre span')]"
    with serve(name, "", tmp_path) as (address, output), phone(browser):
        browser.get(address)
        wait_for(lambda: browser.execute_script(f"{words}.length"))
        lines = browser.execute_script(
            f"{words}.map(word => word.offsetHeight / parseFloat(getComputedStyle(word).lineHeight))"
        )
        assert max(lines) < 1.5  # no word is broken
        wait_for(lambda: browser.execute_script("return document.querySelectorAll('#recorded img').length") > 2)
        assert "Traceback" not in output.read_text()
