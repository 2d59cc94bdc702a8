import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModel, ViTImageProcessor
from transformers.pipelines import ImageClassificationPipeline

from hf_dl.models import NormResNetConfig, NormResNetForImageClassification, NormResNetModel
from hf_dl.models.layers_norm import NORMS, BatchInstanceNorm2d, BatchNorm2d, LayerNorm2d
from hf_dl.models.norm_resnet import image_processor
from tests.models.contract import PROBLEM_TYPES, SAME_CODE, ModelContract

TINY = {"n": 1, "widths": (8, 8, 16), "image_size": 16, "num_labels": 3, "num_groups": 4}


COMPILED = {"compiles_to_the_same_numbers": "test_layers_norm.py compiles each norm, and TestBatch the network"}


class TestBatch(ModelContract):
    model_class = NormResNetForImageClassification
    processor_class = ViTImageProcessor
    auto_classes = ("AutoModelForImageClassification",)
    overfit_steps = 100
    problem_types = PROBLEM_TYPES

    def config(self):
        return NormResNetConfig(**TINY)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        labels = torch.randint(0, 3, (batch,), generator=draw)
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw), "labels": labels}


class TestBatchInstanceWithProjections(TestBatch):
    skipped = SAME_CODE
    slow = COMPILED

    def config(self):
        return NormResNetConfig(**TINY, norm="batch_instance", shortcut="projection")


class TestPlain(TestBatch):
    skipped = SAME_CODE
    slow = COMPILED

    def config(self):
        return NormResNetConfig(**TINY, shortcut="none")


class TestGroup(TestBatch):
    skipped = SAME_CODE
    slow = COMPILED

    def config(self):
        return NormResNetConfig(**TINY, norm="group")


class TestLayerWithPixelAffine(TestBatch):
    skipped = SAME_CODE
    slow = COMPILED

    def config(self):
        return NormResNetConfig(**TINY, norm="layer", layer_norm_affine="pixel")


def count(**fields):
    with torch.device("meta"):
        return NormResNetForImageClassification(NormResNetConfig(**fields)).num_parameters()


@pytest.mark.parametrize(
    ("n", "classes", "expected"),
    [(2, 10, 172506), (3, 10, 269722), (5, 10, 464154), (9, 10, 853018), (18, 10, 1727962), (2, 25, 173481)],
)
def test_parameter_counts_of_the_paper(n, classes, expected):
    assert count(n=n, num_labels=classes) == expected


def test_parameter_counts_of_the_options():
    norm_channels = 5 * 16 + 4 * 32 + 4 * 64
    assert count(num_labels=10, norm="torch_batch") == count(num_labels=10, norm="group") == 172506
    assert count(num_labels=10, norm="none") == 172506 - norm_channels  # a bias replaces scale and shift
    assert count(num_labels=10, norm="batch_instance") == 172506 + norm_channels
    assert count(num_labels=10, shortcut="projection") == 172506 + 16 * 32 + 32 * 64 + 2 * (32 + 64)
    pixels = 2 * (5 * 16 * 256**2 + 4 * 32 * 128**2 + 4 * 64 * 64**2)
    assert 16.7e6 < pixels < 16.8e6
    of_pixels = count(num_labels=10, norm="layer", layer_norm_affine="pixel", image_size=256)
    assert of_pixels == 172506 - 2 * norm_channels + pixels


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 18])
def test_number_of_layers_as_in_the_paper(n):
    config = NormResNetConfig(n=n)
    with torch.device("meta"):
        model = NormResNetForImageClassification(config)
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == config.num_layers == 6 * n + 2
    convolutions = layers[:-1]
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) and c.bias is None for c in convolutions)
    assert [c.out_channels for c in convolutions] == [16] * (2 * n + 1) + [32] * 2 * n + [64] * 2 * n
    assert [i for i, c in enumerate(convolutions) if c.stride == (2, 2)] == [2 * n + 1, 4 * n + 1]
    for module in model.modules():  # normalization right after each convolution
        children = list(module.children())
        for first, second in zip(children, children[1:], strict=False):
            if isinstance(first, torch.nn.Conv2d):
                assert isinstance(second, BatchNorm2d)


@pytest.mark.parametrize(("n", "expected"), [(2, 53), (3, 81), (5, 137), (9, 249), (18, 501)])
def test_receptive_fields(n, expected):
    assert NormResNetConfig(n=n).receptive_field == expected


def test_the_receptive_field_is_the_area_with_a_gradient():
    torch.manual_seed(0)
    config = NormResNetConfig(n=2, norm="none", widths=(4, 4, 4))
    model = NormResNetModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # so that no ReLU blocks a path
    image = torch.rand(1, 3, 96, 96, dtype=torch.float64).requires_grad_()
    model(image).last_hidden_state[0, :, 12, 12].sum().backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert len(rows) == rows[-1] - rows[0] + 1 == config.receptive_field == 53
    assert "sees 53 pixels" in repr(model)


def test_hidden_states_on_request():
    model = NormResNetForImageClassification(NormResNetConfig(num_labels=4)).eval()
    pixel_values = torch.rand(2, 3, 32, 32)
    assert model(pixel_values).hidden_states is None
    output = model(pixel_values, output_hidden_states=True)
    shapes = [tuple(states.shape) for states in output.hidden_states]
    assert shapes == [(2, 16, 32, 32), (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    features = model.norm_resnet(pixel_values)
    assert torch.equal(features.last_hidden_state, output.hidden_states[-1])
    torch.testing.assert_close(features.pooler_output, output.hidden_states[-1].mean((2, 3)))
    torch.testing.assert_close(output.logits, model.classifier(features.pooler_output))


@pytest.mark.parametrize("size", [(256, 256), (33, 47), (8, 8)])
@pytest.mark.parametrize("shortcut", ["identity", "projection", "none"])
def test_images_of_any_size(size, shortcut):
    model = NormResNetForImageClassification(NormResNetConfig(num_labels=4, shortcut=shortcut)).eval()
    with torch.no_grad():
        output = model(torch.rand(1, 3, *size), output_hidden_states=True)
    assert output.logits.shape == (1, 4) and output.loss is None
    assert tuple(output.hidden_states[-1].shape[2:]) == tuple(-(-length // 4) for length in size)


def test_identity_shortcuts_stride_and_pad_with_zeros():
    model = NormResNetModel(NormResNetConfig(n=1)).eval()
    block = model.stages[1][0]
    with torch.no_grad():
        block.second[1].weight.zero_()
        x = torch.rand(1, 16, 8, 8)
        y = block(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()


def test_a_plain_network_has_the_same_weights_and_no_shortcuts():
    config = NormResNetConfig(num_labels=10, shortcut="none", widths=(32, 16, 64))  # the channels may decrease
    plain = NormResNetModel(config).eval()
    assert count(num_labels=10, shortcut="none") == count(num_labels=10)
    for stage in plain.stages:
        x = torch.rand(1, stage[0].first[0].in_channels, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(stage[0](x), stage[0].second(stage[0].first(x).relu()).relu())


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_and_is_initialized(norm):
    torch.manual_seed(0)
    model = NormResNetForImageClassification(NormResNetConfig(**TINY, norm=norm)).train()
    first = model.norm_resnet.stem[0].weight
    assert first.std().item() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.2)  # He et al., with fan_out
    pixel_values, labels = torch.rand(12, 3, 16, 16) * 2 - 1, torch.arange(12) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    if norm != "none":
        assert losses[-1] < 0.6 * losses[0]
    model(pixel_values)
    for module in model.modules():
        if isinstance(module, BatchInstanceNorm2d):
            assert module.gate.min() >= 0 and module.gate.max() <= 1


def test_batch_norm_has_the_loss_curve_of_torch():
    curves = {}
    for norm in ("batch", "torch_batch"):
        torch.manual_seed(0)
        model = NormResNetForImageClassification(NormResNetConfig(**TINY, norm=norm)).double().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        draw, curves[norm] = torch.Generator().manual_seed(1), []
        for _ in range(20):
            pixel_values = torch.randn(8, 3, 16, 16, generator=draw, dtype=torch.float64)
            loss = model(pixel_values, labels=torch.randint(0, 3, (8,), generator=draw)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[norm].append(loss.item())
        curves[norm].append(model.eval()(pixel_values).logits)
    torch.testing.assert_close(curves["batch"][:-1], curves["torch_batch"][:-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(curves["batch"][-1], curves["torch_batch"][-1], rtol=1e-8, atol=1e-8)


def test_weights_load_from_torch_batch_to_batch_and_back(tmp_path):
    torch.manual_seed(0)
    theirs = NormResNetForImageClassification(NormResNetConfig(**TINY, norm="torch_batch"))
    theirs(torch.rand(4, 3, 16, 16))
    theirs.eval().save_pretrained(tmp_path)
    ours = NormResNetForImageClassification.from_pretrained(tmp_path, norm="batch")
    assert any(isinstance(module, BatchNorm2d) for module in ours.modules())
    pixel_values = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours(pixel_values).logits, theirs(pixel_values).logits, rtol=1e-5, atol=1e-6)
    theirs.load_state_dict(ours.state_dict())


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    names = {0: "cone", 1: "cube", 2: "ball"}
    fields = {name: value for name, value in TINY.items() if name != "num_labels"}
    config = NormResNetConfig(**fields, id2label=names, label2id={name: index for index, name in names.items()})
    model = NormResNetForImageClassification(config)
    model(torch.rand(4, 3, 16, 16))  # changes the running statistics
    model.eval().save_pretrained(tmp_path)
    image_processor(config).save_pretrained(tmp_path)
    return tmp_path, model


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_pipeline_works_on_the_saved_folder(saved):
    folder, model = saved
    classify = transformers.pipeline("image-classification", model=str(folder))
    assert isinstance(classify, ImageClassificationPipeline)
    assert type(classify.model) is NormResNetForImageClassification
    found = {entry["label"]: entry["score"] for entry in classify(picture())}
    pixels = torch.from_numpy(np.array(picture().resize((16, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    expected = model(pixels[None] / 127.5 - 1).logits.softmax(-1)[0]
    assert found.keys() == {"cone", "cube", "ball"}
    for index, name in model.config.id2label.items():
        assert found[name] == pytest.approx(expected[index].item(), abs=1e-3)


def test_pipeline_and_auto_model_work_without_the_package(saved, run_fresh):
    folder, model = saved
    picture().save(folder / "picture.png")
    program = """
import sys
sys.modules["hf_dl"] = None  # from here on `import hf_dl` raises ImportError
import json, torch, transformers
classify = transformers.pipeline("image-classification", model=".", trust_remote_code=True)
base = transformers.AutoModel.from_pretrained(".", trust_remote_code=True)
features = base(torch.ones(1, 3, 16, 16)).pooler_output
print(json.dumps([classify("picture.png"), type(base).__name__, features.tolist()]))
"""
    scores, name, features = json.loads(run_fresh(program, cwd=folder))
    here = transformers.pipeline("image-classification", model=str(folder))(picture())
    assert [entry["label"] for entry in scores] == [entry["label"] for entry in here]
    assert [entry["score"] for entry in scores] == pytest.approx([entry["score"] for entry in here], abs=1e-5)
    assert name == "NormResNetModel"
    expected = model.norm_resnet(torch.ones(1, 3, 16, 16)).pooler_output
    torch.testing.assert_close(torch.tensor(features), expected, rtol=1e-5, atol=1e-6)


def test_auto_model_loads_the_network_without_its_linear_layer(saved):
    folder, model = saved
    base = AutoModel.from_pretrained(folder)
    assert type(base) is NormResNetModel
    pixel_values = torch.rand(2, 3, 16, 16)
    assert torch.equal(base(pixel_values).pooler_output, model.norm_resnet(pixel_values).pooler_output)


def test_pixel_affine_accepts_one_size_only():
    model = NormResNetModel(NormResNetConfig(**TINY, norm="layer", layer_norm_affine="pixel")).eval()
    sizes = [module.image_size for module in model.modules() if isinstance(module, LayerNorm2d)]
    assert sizes == [(16, 16)] * 3 + [(8, 8)] * 2 + [(4, 4)] * 2
    with pytest.raises(ValueError, match="one scale per pixel of images of size 16x16"):
        model(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        (
            {"norm": "bath"},
            "norm='bath' is unknown. Choose one of: none, batch, instance, batch_instance, layer, group",
        ),
        ({"widths": (16, 32)}, "must be three numbers of channels"),
        ({"widths": (32, 16, 64)}, "must not decrease, because shortcut='identity' can only add channels"),
        ({"norm": "group", "num_groups": 12}, "do not fit norm='group': num_groups=12 must divide num_channels=16"),
        ({"shortcut": "zeros"}, "shortcut"),
    ],
)
def test_invalid_fields_raise_an_error(fields, sentence):
    with pytest.raises(Exception, match=sentence):
        NormResNetConfig(**fields)


def test_invalid_images_raise_an_error():
    model = NormResNetForImageClassification(NormResNetConfig(**TINY))
    with pytest.raises(
        ValueError, match=r"pixel_values has shape \(1, 1, 16, 16\), expected \(batch, 3, height, width\)"
    ):
        model(torch.rand(1, 1, 16, 16))
