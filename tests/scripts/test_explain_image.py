import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_dl.data import labeled_images, object_images
from hf_dl.explain import (
    attention_maps,
    fgsm,
    grad_cam,
    integrated_gradients,
    normalize,
    pointing_game,
    sanity_check,
    share_inside,
    upsample,
)
from hf_dl.models import SmallViTConfig, SmallViTForImageClassification, SmallViTImageProcessor
from hf_dl.recipes.explanation import Explainer
from hf_dl.recipes.inside import PAGES
from hf_dl.reporting.experiment import read_results
from scripts import explain_image, run_experiment

SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A vision transformer of the 25 classes of the scenes, saved as training saves one."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = dict(enumerate(object_images.CLASSES[25]))
    model = SmallViTForImageClassification(
        SmallViTConfig(
            **sizes,
            intermediate_size=16,
            id2label=names,
            label2id={n: i for i, n in names.items()},
            initializer_range=0.3,
        )
    )
    folder = tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    SmallViTImageProcessor(size=SIZE).save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    )
    folder = tmp_path_factory.mktemp("resnet")
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, size in (("one.png", (40, 50)), ("two.jpg", (33, 20)), ("more/one.png", (64, 64))):
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(folder, tmp_path, *flags):
    metrics = explain_image.main(["--model", str(folder), "--output_dir", str(tmp_path / "out"), *flags])
    found = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert found["metrics"] == metrics
    return metrics, found


def test_a_folder_of_images(resnet, pictures, tmp_path, capsys):
    folder, model = resnet
    metrics, found = run(folder, tmp_path, "--images", str(pictures), "--curves", "true")
    assert metrics == {"images": 3.0}
    assert sorted(e["figure"] for e in found["images"]) == ["one.png", "one_2.png", "two.png"]
    for entry in found["images"]:
        with Image.open(tmp_path / "out" / entry["figure"]) as figure:
            assert figure.size[0] > 800
        assert sum(entry["top"].values()) == pytest.approx(1, abs=1e-4) and 0 <= entry["deletion_area"] <= 1
    assert "figure" in found["images"][0] and str(tmp_path) not in json.dumps(found)
    with Image.open(pictures / "two.jpg") as image:
        pixels = ViTImageProcessor(size={"height": 64, "width": 64})(image.convert("RGB"), return_tensors="pt")
    expected = model(**pixels).logits.softmax(-1).max().item()
    two = next(e for e in found["images"] if e["file"] == "two.jpg")
    assert max(two["top"].values()) == pytest.approx(expected, abs=1e-4)
    assert "one.png" in capsys.readouterr().out


def test_files_that_cannot_be_read_are_skipped(resnet, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "cut.png").write_bytes((pictures / "one.png").read_bytes()[:200])
    (pictures / "link.jpg").symlink_to("nowhere.jpg")
    (pictures / "__MACOSX").mkdir()
    (pictures / "__MACOSX" / "._one.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    metrics = explain_image.main(["--model", str(resnet[0]), "--source", str(pictures)])  # a flat folder
    assert metrics == {"images": 3.0, "skipped": 2.0}
    folder = Path("runs", "explain_image", resnet[0].name)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "runs"}
    found = json.loads((folder / "explanations.json").read_text())
    errors = {entry["file"]: entry["error"] for entry in found["images"] if "error" in entry}
    assert errors["link.jpg"] == "The file is a link to a missing file."
    assert errors["cut.png"].startswith("The file is not an image that can be read: ")
    assert len(found["images"]) == 5 and len(list(folder.glob("*.png"))) == 3
    assert "link.jpg                       skipped: The file is a link" in capsys.readouterr().err


def test_the_study_takes_the_data_of_the_run(resnet, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(resnet[0], folder)
    results = {"script": "train_classifier.py", "args": {"source": str(tmp_path / "photos")}, "metrics": {}}
    (folder / "results.json").write_text(json.dumps(results))
    for name in ("LABEL_0", "LABEL_1", "LABEL_2"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    metrics, _ = run(folder, tmp_path)
    assert metrics["images"] == 3 and metrics.keys() >= {"accuracy"}


def test_patches_are_taken_away(vit, pictures, tmp_path, capsys):
    flags = ["--method", "gradient_rollout", "--mask_counts", "2", "5", "--mask_seeds", "3"]
    metrics, _ = run(vit[0], tmp_path, "--images", str(pictures / "one.png"), *flags)
    report = json.loads((tmp_path / "out" / "masking.json").read_text())
    assert len(report["summary"]) == 3 * 4 * 2 and (tmp_path / "out" / "masking.png").is_file()
    assert 0 <= metrics["attention_random_5_probability"] <= 1
    assert "became" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["grad_cam", "rollout"])
def test_the_study_scores_maps_by_the_masks(vit, tmp_path, method):
    folder, model = vit
    flags = ["--method", method, "--num_images", "50", "--per_class", "2", "--study_classes", "striped cone", "3"]
    metrics, found = run(folder, tmp_path, *flags, "--batch_size", "20")
    data = labeled_images.load("validation", size=32, num_images=50)
    pixels = torch.stack([torch.tensor(np.array(i)).permute(2, 0, 1) for i in data["image"]]) / 127.5 - 1
    masks = torch.stack([torch.tensor(np.array(m)) > 0 for m in data["mask"]])
    if method == "grad_cam":
        maps = grad_cam(model, pixels).maps
    else:
        maps = normalize(upsample(attention_maps(model, pixels, method=method)[0], (32, 32)))
    inside = share_inside(maps, masks)
    assert metrics["share_inside"] == pytest.approx(inside[~inside.isnan()].mean().item(), abs=1e-3)
    assert metrics["pointing_game"] == pytest.approx(pointing_game(maps, masks).float().mean().item(), abs=0.021)
    assert metrics["object_share"] == pytest.approx(masks.float().mean().item(), abs=1e-3)
    assert metrics["accuracy"] == pytest.approx(
        (model(pixels).logits.argmax(-1) == torch.tensor(data["label"])).float().mean().item(), abs=0.021
    )
    assert {e["class"] for e in found["images"]} <= {"striped cone", object_images.CLASSES[25][3]}
    for entry in found["images"]:
        assert object_images.CLASSES[25][data[entry["image"]]["label"]] == entry["class"]
    assert {p.name for p in (tmp_path / "out").glob("class_*.png")} == {
        f"class_{i}_{object_images.CLASSES[25][i].replace(' ', '_')}.png"
        for i in (3, object_images.CLASSES[25].index("striped cone"))
    }


def test_masks_follow_the_processor(vit):
    """A processor that crops the images crops the masks too."""
    explainer = Explainer(explain_image.Args(), vit[0])
    explainer.processor = ViTImageProcessor(size=SIZE)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 40:56] = 1
    found = explainer.prepare_masks([Image.fromarray(mask)])
    expected = torch.zeros(1, 32, 32, dtype=torch.bool)
    expected[0, 8:16, 20:28] = True
    assert torch.equal(found.cpu(), expected)


def test_the_package_as_engine(resnet, pictures, tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    _, found = run(resnet[0], tmp_path, "--images", str(pictures / "one.png"), "--engine", "grad-cam", "--layers", "2")
    assert len(found["layers"]) == 2


@pytest.mark.parametrize("methods", [[], ["pgd"], ["filters", "pgd", "occlusion"]], ids=len)
def test_unreadable_files_end_the_program_with_one_sentence(resnet, pictures, tmp_path, methods, capfd):
    files = [str(pictures / name) for name in ("notes.txt", "more.txt")]
    Path(files[1]).write_text("")
    with pytest.raises(ValueError, match="None of 2 files can be read. 'notes.txt': The file is not an image"):
        run(resnet[0], tmp_path, "--images", *files, *(["--methods", *methods] if methods else []))
    printed = capfd.readouterr()
    assert "notes.txt" not in printed.out + printed.err and "skipped" not in printed.out + printed.err


def test_an_unreadable_file_is_reported_once(resnet, pictures, tmp_path, capfd):
    files = [str(pictures / name) for name in ("notes.txt", "one.png")]
    metrics, found = run(resnet[0], tmp_path, "--images", *files, "--methods", "guided_backprop", "patches")
    assert capfd.readouterr().err.count("skipped: The file is not an image") == 1
    assert found["images"][-1]["file"] == "notes.txt"


def test_what_cannot_be_is_said(vit, resnet, pictures, tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected an image or a folder of images"):
        run(vit[0], tmp_path, "--images", str(tmp_path / "nothing.png"))
    with pytest.raises(ValueError, match="None of 1 files can be read. 'notes.txt': The file is not an image"):
        run(vit[0], tmp_path, "--images", str(pictures / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' contains no image"):
        run(vit[0], tmp_path, "--images", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="label='zebra' is not a class of the model, which has checkered sphere"):
        run(vit[0], tmp_path, "--images", str(pictures), "--label", "zebra")
    with pytest.raises(ValueError, match="has no list of transformer blocks"):
        run(resnet[0], tmp_path, "--images", str(pictures), "--method", "rollout")
    with pytest.raises(ValueError, match="num_classes=3 is unknown"):
        run(resnet[0], tmp_path)


def test_an_experiment_can_study_a_run_of_another(vit, tmp_path):
    runs = tmp_path / "runs"
    for seed, norm in ((0, "batch"), (3, "batch"), (3, "none")):
        folder = runs / f"{norm}{seed}"
        shutil.copytree(vit[0], folder)
        results = {"script": "train_classifier.py", "args": {"norm": norm, "seed": seed}, "metrics": {}}
        (folder / "results.json").write_text(json.dumps(results))
    flags = ["--model", str(runs), "--num_images", "25", "--run", "norm=batch"]
    metrics, _ = run(runs, tmp_path, *flags[2:], "--seed", "3", "--cpu_threads", "1")
    results = read_results(tmp_path / "out")
    assert results["metrics"] == metrics and results["seed"] == 3 and results["script"] == "explain_image.py"
    assert {"commit", "versions", "device", "seconds", "num_parameters"} <= results.keys()
    with pytest.raises(ValueError, match="contains no finished run with --norm batch --seed 4. Run its experiment"):
        explain_image.main([*flags, "--seed", "4"])
    with pytest.raises(ValueError, match="run='batch' is not a flag with a value. Write it like norm=batch"):
        explain_image.main([*flags[:-1], "batch"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--method=cam"], "method='cam' is unknown. Choose one of: grad_cam, cls, rollout"),
        (["--methods", "filters", "cam"], "methods='cam' is unknown. Choose from: grad_cam, cls"),
        (["--page_images", "0"], "page_images=0 must be at least 1"),
        (["--mask_ways", "blue"], "mask_ways='blue' is unknown. Choose from: black"),
        (["--modle=x"], "--modle is an unknown flag. Did you mean --model?"),
    ],
)
def test_wrong_flags_end_the_program_with_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        explain_image.main(flags)
    assert sentence in capsys.readouterr().err


def test_a_page_for_each_method(vit, tmp_path, capsys):
    flags = ["--num_images", "8", "--page_images", "2", "--channels", "1", "3", "--study_classes", "1", "2"]
    methods = ["grad_cam", "rollout", "occlusion", "guided_backprop", *PAGES, "smooth_grad"]
    metrics, found = run(vit[0], tmp_path, *flags, "--layers", "small_vit.blocks.1", "--methods", *methods)
    drawn = {entry["method"]: entry for entry in found["images"]}
    assert list(drawn) == methods and metrics["pages"] == len(methods) - 1
    assert drawn["guided_backprop"]["error"].startswith("model=SmallViTForImageClassification has no ReLU")
    assert "guided_backprop        skipped: model=" in capsys.readouterr().out
    for name in [*(e["figure"] for e in drawn.values() if "figure" in e), "codes_neighbors.png"]:
        with Image.open(tmp_path / "out" / name) as figure:
            assert np.asarray(figure.convert("RGB")).std() > 5
    data = labeled_images.load("validation", size=32, num_images=8)
    pixels = torch.stack([torch.tensor(np.array(i)).permute(2, 0, 1) for i in data["image"]]) / 127.5 - 1
    output = fgsm(vit[1], pixels, labels=data["label"], epsilon=8 / 255)
    if output.success_rate == output.success_rate:  # at least one image is classified correctly
        assert metrics["fgsm_success_8"] == pytest.approx(output.success_rate, abs=0.01)
    assert metrics["patch_pixels"] == 8 and 0 < metrics["inversion_error_1"] < 1 and metrics["filters"] == 16


def test_pages_of_files(resnet, pictures, tmp_path):
    (pictures / "cut.png").write_bytes((pictures / "one.png").read_bytes()[:200])
    flags = ["--images", str(pictures), "--methods", "guided_backprop", "filters"]
    metrics, found = run(resnet[0], tmp_path, *flags)
    assert metrics == {"pages": 2.0, "filters": 8.0}
    assert [entry.get("figure", entry.get("file")) for entry in found["images"]] == [
        "guided_backprop.png",
        "filters.png",
        "cut.png",
    ]
    with pytest.raises(ValueError, match="ResNetForImageClassification has attention over no tokens"):
        run(resnet[0], tmp_path, "--images", str(pictures), "--methods", "cls")
    with pytest.raises(ValueError, match="None of 1 files can be read. 'cut.png': The file is not an image"):
        run(resnet[0], tmp_path, "--images", str(pictures / "cut.png"), "--methods", "filters")


def test_the_study_checks_the_sanity_of_maps(vit, tmp_path):
    flags = ["--method", "integrated_gradients", "--num_images", "10", "--sanity", "true", "--mask_images", "4"]
    metrics, _ = run(vit[0], tmp_path, *flags)
    data = labeled_images.load("validation", size=32, num_images=10)
    pixels = torch.stack([torch.tensor(np.array(i)).permute(2, 0, 1) for i in data["image"]]) / 127.5 - 1
    output = sanity_check(vit[1], pixels[:4], method="integrated_gradients", stages=1)
    assert metrics["sanity_correlation"] == pytest.approx(output.final, abs=1e-3)
    masks = torch.stack([torch.tensor(np.array(m)) > 0 for m in data["mask"]])
    maps = integrated_gradients(vit[1], pixels).maps
    assert metrics["share_inside"] == pytest.approx(share_inside(maps, masks).mean().item(), abs=1e-3)
    assert metrics["milliseconds"] > 0


@pytest.mark.parametrize(
    "name", ["explain_resnet", "explain_vit", "mask_vit", "inside_networks", "inside", "inside_guided"]
)
def test_the_flags_of_the_experiments(name, capsys):
    path = Path(__file__).parents[2] / "scripts" / "experiments" / f"{name}.toml"
    assert run_experiment.main([str(path), "--dry_run"]) == 0, capsys.readouterr().err
    assert " to run now." in capsys.readouterr().out
