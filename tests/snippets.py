"""Run the Python code of a model card as a person would paste it."""

import re

import pytest
from PIL import Image

from hf_dl.reporting.card import LOCAL_ID, with_repository


def run_snippet(folder):
    """Execute the code of a run's card in a fresh namespace, with the folder of the run as id; return the namespace.

    The working directory holds the image that the code opens: one of another size than the model's, with a palette.
    """
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = with_repository(code, folder, names=[folder.name])
    assert str(folder) in code and f'"{LOCAL_ID}"' not in code
    work = folder.parent / "snippet"
    work.mkdir(exist_ok=True)
    image = Image.radial_gradient("L").convert("RGB").resize((48, 40))
    image.quantize(16).save(work / "image.png")
    namespace = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        exec(compile(code, str(folder / "README.md"), "exec"), namespace)
    return namespace
