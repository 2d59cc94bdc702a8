"""The tables, the chart and the command of the arithmetic."""

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, ResNetConfig

from hf_dl import cli
from hf_dl.explain import arithmetic
from hf_dl.models import NormResNetConfig, SmallViTConfig
from hf_dl.recipes.arithmetic import compute, draw, group_stages, shorten, show_bytes, write
from tests.explain.tiny import MLP, SIZES


@pytest.fixture(scope="module")
def lenet5():
    return compute("lenet5")


def test_the_table_has_each_layer_with_its_formulas(lenet5):
    lines = write(lenet5).splitlines()
    assert lines[0].split()[:4] == ["layer", "operation", "window", "output"]
    assert lines[1].split() == [
        "stages.conv1.0.0", "Conv2d", "5x5", "/1", "+0", "6x28x28", "156", "117,600", "18.4", "KiB", "5", "1", "2",
    ]  # fmt: skip
    assert lines[2] == "    size          (32 - 5 + 2*0)/1 + 1 = 28"
    assert lines[3] == "    parameters    (5*5*1 + 1)*6 = 156"
    assert "Parameters: 61,706, of which 95.8% are in linear layers." in lines
    assert "Half of the parameters: hidden.0.0 (78%)." in lines
    assert any(line.startswith("Predicted peak memory of a training step with adam: ") for line in lines)
    short = write(lenet5, formulas=False).splitlines()
    assert short == [line for line in lines if not line.startswith("    ")]


def test_markdown_has_a_table_of_numbers_and_a_table_of_formulas(lenet5):
    text = write(lenet5, style="markdown")
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and all(len(table.splitlines()) == 2 + len(lenet5.rows) for table in tables)
    assert "(400 + 1)*120 = 48,120" in tables[1] and "- Multiply-adds: 416,520." in text
    assert len(write(lenet5, style="markdown", formulas=False).split("\n\n")) == 2


def test_json_has_all_rows_and_totals(lenet5):
    found = json.loads(write(lenet5, style="json"))
    assert found["parameters"] == 61706 and found["layer_bytes"] == 4 * 9118
    assert len(found["rows"]) == len(lenet5.rows) and found["rows"][0]["formulas"]["jump"] == "1*1 = 1"
    assert found["peaks"]["sgd"]["parts"]["parameters"] == 4 * 61706


def test_stages_sum_their_layers(lenet5):
    stages = group_stages(lenet5.rows)
    assert list(stages) == ["stages.conv1", "stages.conv2", "hidden.0", "hidden.1", "classifier"]
    assert sum(map(len, stages.values())) == len(lenet5.rows)
    lines = write(lenet5, stages=True).splitlines()
    assert lines[2].split()[:5] == ["stages.conv2", "3", "16x5x5", "2,416", "240,000"]


def test_names_lose_the_part_that_most_share():
    assert shorten(["a.b.c", "a.b.d", "a.b.e", "x"]) == ["c", "d", "e", "x"]
    assert shorten(["", "a.b"]) == ["", "a.b"] and shorten(["one"]) == ["one"]
    assert [show_bytes(n) for n in (0, 512, 2**20, 3 * 2**30)] == ["", "512 B", "1.0 MiB", "3.0 GiB"]


def test_the_chart_is_a_figure(lenet5, tmp_path):
    text = draw(tmp_path / "new" / "chart.svg", lenet5).read_text()
    assert text.startswith("<?xml") and draw(tmp_path / "again.svg", lenet5).read_text() == text
    deep = arithmetic(nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(40))), 8)
    assert draw(tmp_path / "deep.svg", deep).stat().st_size < 4 * len(text)  # stages


@pytest.mark.parametrize(
    "config",
    [
        SmallViTConfig(**SIZES, **MLP),
        NormResNetConfig(n=1, image_size=16),
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
    ],
    ids=lambda config: config.model_type,
)
def test_folders_need_no_weights(config, tmp_path):
    config.save_pretrained(tmp_path)
    result = compute(str(tmp_path), 16, batch_size=2)
    assert result.image == (2, 3, 16, 16) and result.parameters > 1000 and result.in_training
    larger = compute(str(tmp_path), 32)
    assert larger.image == (1, 3, 32, 32) and larger.multiply_adds > result.multiply_adds


def test_a_large_network_needs_no_memory(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", None)  # weights are not made
    assert compute("vgg16").parameters == 138_357_544


@pytest.mark.parametrize(
    ("model", "size", "sentence"),
    [
        ("vgg16", 16, r"image_size=16 is too small for vgg16: in stage conv5, .* The smallest size is 32"),
        (
            "vgg15",
            None,
            r"model='vgg15' is unknown. Expected the folder or Hub id of .* one of: lenet5, .*, resnet152\.",
        ),
    ],
)
def test_wrong_names_and_sizes_raise_one_sentence(model, size, sentence, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a missing Hub is tried for a minute
    with pytest.raises(ValueError, match=sentence) as found:
        compute(model, size)
    assert "\n" not in str(found.value)


def test_a_model_without_images_raises_an_error(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'bert', which has no image classifier"):
        compute(str(tmp_path))
    with pytest.raises(ValueError, match="format='html' is unknown. Choose one of: table, markdown, json"):
        write(compute("lenet5"), style="html")


def test_the_command_prints_the_table_and_draws_the_chart(capsys, tmp_path):
    chart = tmp_path / "chart.svg"
    assert cli.main(["arithmetic", "lenet5", "--no_formulas", "--chart", str(chart)]) == 0
    assert "Multiply-adds: 416,520." in capsys.readouterr().out and chart.is_file()
    for words, sentence in (
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--chart", "x.pdf"], "chart='x.pdf' must end with .svg or .png"),
        (["--format", "html"], "invalid choice: 'html'"),
    ):
        assert cli.main(["arithmetic", "lenet5", *words]) == 2
        assert sentence in capsys.readouterr().err
    assert cli.main(["arithmetic"]) == 2 and "hf-dl arithmetic vgg16" in capsys.readouterr().out
