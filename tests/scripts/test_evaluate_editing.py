import json

import pytest
import torch
from PIL import Image

from hf_dl.models.slot_autoencoder import SlotAutoencoderModel
from hf_dl.recipes import editing, object_probe
from hf_dl.reporting.card import read_card
from hf_dl.reporting.experiment import read_results
from scripts import evaluate_editing, train_probe
from tests.recipes.test_editing import make_pipeline
from tests.recipes.test_slots import make_model
from tests.scripts.runs import reset
from tests.snippets import run_snippet

SMALL = "--image_size=32 --num_test=4 --cpu_threads=1 --num_inference_steps=2".split()

# DPMSolverMultistepScheduler makes arrays of tensors: pytorch/pytorch#136264
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "probe"
    flags = "--num_train=8 --num_test=4 --batch_size=8 --max_steps=3 --eval_every=3 --save_every=0 --cpu_threads=1"
    metrics = train_probe.main([f"--output_dir={folder}", *flags.split()])
    reset()
    yield folder, metrics
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder like the runs of an experiment: two scripts with the same flags."""
    root = tmp_path_factory.mktemp("runs")
    for name, script, model in (
        ("a", "train_slot_diffusion.py", make_pipeline(size=32)),
        ("b", "train_slots.py", make_model(size=32)),
    ):
        model.save_pretrained(root / name)
        results = {"script": script, "args": {"style": "plain", "seed": 4}, "metrics": {}}
        (root / name / "results.json").write_text(json.dumps(results))
    return root


def test_the_probe_is_a_classifier_with_its_accuracy(probe, capsys):
    folder, metrics = probe
    loaded = object_probe.load_probe(folder)
    crops = object_probe.load_crops(object_probe.ProbeFlags(num_train=8, num_test=4), "test")
    expected = object_probe.evaluate(loaded, crops, "test")
    assert metrics == pytest.approx(expected)
    assert metrics["test_plain_images"] > 0 and "test_textured_shape_accuracy" in metrics
    assert read_card(folder / "README.md").data.pipeline_tag == "image-classification"
    run_snippet(folder)
    assert "{'label': '" in capsys.readouterr().out
    assert (folder / "curves.png").is_file()


def test_methods_side_by_side(probe, models, tmp_path, capsys):
    flags = [f"--probe={probe[0]}", f"--broadcast={models}", f"--diffusion={models}", "--run=style=plain", "--seed=4"]
    metrics = evaluate_editing.main([*SMALL, *flags, f"--output_dir={tmp_path}"])
    for kind in ("remove", "swap", "insert"):
        assert metrics[f"truth_{kind}_success"] == 1 and metrics[f"copy_{kind}_success"] == 0
        assert metrics[f"truth_{kind}_edits"] == metrics[f"diffusion_{kind}_edits"] > 0
    assert metrics["truth_perceptual_random"] == 0 < metrics["copy_perceptual_random"]
    assert metrics["copy_change_error"] == 1 and metrics["broadcast_change_error"] > 0
    model = SlotAutoencoderModel.from_pretrained(models / "b")
    edits = editing.load_edits(editing.EditFlags(image_size=32, num_test=4), "swap")
    expected, _ = editing.evaluate(editing.broadcast_editor(model), edits)
    found = {name: metrics[f"broadcast_swap_{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)
    results = read_results(tmp_path)
    assert results["metrics"] == pytest.approx(metrics, nan_ok=True) and "num_parameters" not in results
    assert results["args"]["methods"] == ["truth", "copy", "broadcast", "diffusion"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["args"] == results["args"]
    with Image.open(tmp_path / "edits.png") as picture:
        assert picture.width / picture.height > 9 / 4.5  # nine edits; image, truth and two methods
    assert "broadcast_swap_success" in capsys.readouterr().out


def test_one_method_has_no_prefix(probe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = evaluate_editing.main([*SMALL, f"--probe={probe[0]}", "--methods=copy"])
    assert metrics["success"] == metrics["remove_success"] == 0 and 0 <= metrics["kept_color"] <= 1
    assert (tmp_path / "runs" / "evaluate_editing" / "edits.png").is_file()
    assert not (tmp_path / "runs" / "evaluate_editing" / "results.json").exists()


def test_a_run_of_another_script_is_not_used(probe, models, tmp_path, capsys):
    flags = [f"--probe={probe[0]}", f"--broadcast={models}", "--run=style=textured", "--methods=broadcast"]
    with pytest.raises((ValueError, SystemExit)) as caught:
        evaluate_editing.main([*SMALL, *flags])
    shown = f"{caught.value}{capsys.readouterr().err}"
    assert "contains no finished run of train_slots.py with --style textured --seed 0" in shown
