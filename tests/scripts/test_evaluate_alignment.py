import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from hf_dl.data import captions
from hf_dl.metrics.alignment import METHODS
from hf_dl.recipes import clip, modality, zero_shot_classifier
from hf_dl.reporting.experiment import read_results
from scripts import evaluate_alignment

SMALL = "--num_test=32 --num_fit 4 12 --cpu_threads=1".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two runs of train_clip.py, whose models are not trained."""
    root = tmp_path_factory.mktemp("runs")
    flags = clip.ModelFlags(hidden_size=16, num_hidden_layers=1, text_layers=1, num_heads=2, projection_dim=8)
    options = {**vars(flags), "image_size": 32, "temperature": None}
    for detail in ("rich", "poor"):
        torch.manual_seed(0)
        tokenizer = clip.make_tokenizer(["a red cube and a blue cone", "an image with a gray sphere"])
        folder = root / detail
        clip.make_model(SimpleNamespace(**options), tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = {"height": 32, "width": 32}
        CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
        args = {"detail": detail, "temperature": None, "style": "plain", "image_size": 32, "seed": 3}
        (folder / "results.json").write_text(json.dumps({"script": "train_clip.py", "args": args, "metrics": {}}))
    return root


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(modality, "GAP_PAIRS", 12)
    monkeypatch.setattr(modality, "DRAWS", 2)
    yield
    torch.set_num_threads(threads)


def test_a_leak_beside_an_honest_fit(runs, tmp_path, capsys):
    flags = [*SMALL, f"--model={runs}", "--run=detail=poor,temperature=None", "--seed=3"]
    honest = evaluate_alignment.main([*flags, "--fit_on=classes", f"--output_dir={tmp_path / 'honest'}"])
    leaked = evaluate_alignment.main([*flags, "--fit_on=test", f"--output_dir={tmp_path / 'leaked'}"])
    assert "detail='poor', image_size=32" in capsys.readouterr().err
    assert "auroc_wrong_color" in leaked and "auroc_unrelated" in leaked and "accepted_both" in leaked
    assert honest.keys() == leaked.keys() and "permuted_gain_4" in leaked
    assert [honest[f"new_images_{size}"] for size in (4, 12)] == [32, 32]
    assert [leaked[f"new_images_{size}"] for size in (4, 12)] == [28, 20]
    assert [leaked[f"draws_{size}"] for size in (4, 12)] == [2, 2]
    results = read_results(tmp_path / "leaked")
    assert results["metrics"] == leaked and results["args"]["detail"] == "poor"
    assert json.loads((tmp_path / "leaked" / "evaluation.json").read_text())["metrics"] == leaked
    assert (tmp_path / "leaked" / "alignment.png").stat().st_size > 1000


def test_captions_are_pairs_to_fit_on(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = evaluate_alignment.main([*SMALL, f"--model={runs / 'rich'}", "--method=none"])
    assert found["gain_12"] == found["fit_gain_4"] == 0 and found["p_value_4"] == 1
    assert "permuted_gain_4" not in found and 0 <= found["rmg_12"] <= 1
    assert (tmp_path / "runs" / "evaluate_alignment" / "alignment.png").is_file()
    # every method runs
    model = zero_shot_classifier.load_clip(runs / "rich")
    test, classes, names = modality.embed_labeled(*model, modality_flags(), "test", 32)
    pairs = modality.embed_captioned(*model, modality_flags(), "train", 12)
    assert names[5] == "red cube" and pairs.seen.all() and len(set(pairs.ids)) == 12 and not test.seen.all()
    # no pair is one that CLIP was trained on
    trained = captions.load("train", num_pairs=12, size=32)
    drawn = captions.load("train", num_pairs=12, size=32, num_objects=(1, 1), seed=modality.NEW_SCENES)
    assert not {image.tobytes() for image in trained["image"]} & {image.tobytes() for image in drawn["image"]}
    for fit in METHODS.values():
        scores, _ = modality.score_alignment(fit, pairs, test, classes, test, labeled=False)
        assert scores["new_images"] == 32


def test_a_folder_of_classes(runs, tmp_path):
    """Own images have no captions: the gap is measured between new images and the texts of their classes."""
    for split in ("train", "test"):
        for label, name in enumerate(("airplane", "sea_lion")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                shade = 100 * label + 8 * number + (split == "train")
                Image.new("RGB", (40, 36), (shade, 60, 90)).save(folder / f"{number}.png")
    flags = [f"--model={runs / 'rich'}", f"--source={tmp_path / 'images'}", "--num_test=0", "--num_fit", "3", "6"]
    for fit_on, new_images in (("classes", 16), ("test", 10)):
        found = evaluate_alignment.main([*flags, f"--fit_on={fit_on}", f"--output_dir={tmp_path / fit_on}"])
        assert found["new_images_6"] == new_images and 0 <= found["fit_accuracy_3"] <= 1
        assert "unseen_accuracy_6" not in found and "auroc_all" not in found and "rmg_6" in found
    with pytest.raises((ValueError, SystemExit), match="has no captions. Use fit_on=classes, or source=synthetic"):
        evaluate_alignment.main([*flags, "--fit_on=captions"])


def modality_flags():
    return SimpleNamespace(source="synthetic", detail="rich", style="plain", image_size=32, prompts="plain")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--fit_on=test --num_fit 32", "num_fit=32 needs more than the 32 images of fit_on=test"),
        ("--num_fit 0 4", r"num_fit=\[0, 4\] must be at least one number of pairs above 0"),
    ],
)
def test_wrong_numbers(runs, flags, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        evaluate_alignment.main(["--num_test=32", f"--model={runs / 'rich'}", *flags.split()])
