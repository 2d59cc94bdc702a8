"""The tables of the case studies and the errata."""

import functools
import runpy
from pathlib import Path

import pytest

from hf_dl.recipes import case_studies

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def errata():
    return case_studies.errata()


@pytest.mark.parametrize(
    ("network", "word", "numbers"),
    [
        ("LeNet-5", "60,000", ["61,706 - (2,416 - 1,516) - 850 + 44 = 60,000"]),  # the count of the paper
        ("AlexNet", "224x224", ["⌊(224 - 11 + 2*0)/4⌋ + 1 = 54", "(227 - 11 + 2*0)/4 + 1 = 55"]),
        ("AlexNet", "60 million", ["60,965,224 with two groups", "62,378,344 without", "1,413,120"]),
        ("ZFNet", "512", ["62,357,608 parameters", "variant with 107,627,624"]),
        ("VGG-16", "93MB", ["15,237,608 values, 58.1 MiB; 69.3 MiB are saved"]),
        ("VGG-16", "138M", ["138,357,544 with biases, 138,344,128 without"]),
        ("GoogLeNet", "5 million", ["5,599,904 without the classifier", "9.2 times"]),
        ("GoogLeNet", "358M", ["271,351,808 multiply-adds", "854,196,224", "358,055,936"]),
        ("ResNet", "weight decay", ["weight decay 1e-4", "sqrt(2/147) = 0.117"]),
        ("ResNet-152", "11.3 billion", ["11.28 G in the paper's version, and 11.51 G"]),
    ],
)
def test_errata_are_computed(network, word, numbers, errata):
    (found,) = [each for each in errata if each.network == network and word in each.claim]
    text = f"{found.found} | {found.computation}"
    assert all(number in text for number in numbers), text


def test_the_script_writes_all_tables(tmp_path, monkeypatch, capsys, errata):
    monkeypatch.setattr(case_studies, "errata", lambda: errata)
    monkeypatch.setattr(case_studies, "NETWORKS", ("lenet5", "vgg16", "alexnet"))
    monkeypatch.setattr(case_studies, "LAYER_BY_LAYER", ("lenet5", "vgg16"))
    main = runpy.run_path(str(ROOT / "scripts" / "make_case_study_tables.py"))["main"]
    # Both calls get the same text, which takes seconds.
    monkeypatch.setitem(main.__globals__, "write_tables", functools.cache(case_studies.write_tables))
    main(["--output", str(tmp_path / "tables.md")])
    text = (tmp_path / "tables.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        *("## From LeNet-5 to ResNet-152", "## Small networks", "## Errata", "## lenet5", "## vgg16", "## alexnet")
    ]
    small = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if " MiB |" in line}
    counts = {"LeNet-5": "552,673", "GoogLeNet": "516,289", "plain 32": "465,129", "residual 32": "465,129"}
    assert {name: small[name][1].strip() for name in counts} == counts  # as in the results of the experiment
    summary = next(line for line in text.splitlines() if line.startswith("| vgg16 "))
    assert summary.split(" | ")[2:7] == ["3x224x224", "    16", "138,357,544", " 89.4%", "     15.470 G"]
    assert "(3*3*512 + 1)*512 = 2,359,808" in text and text.endswith("\n")
    main([])
    assert capsys.readouterr().out == text
