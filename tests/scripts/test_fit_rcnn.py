import json

import torch
from PIL import Image
from transformers import pipeline

from hf_dl.reporting.experiment import read_results
from scripts import fit_rcnn, train_detector
from tests.scripts.runs import reset

DATA = "--num_train=6 --num_test=2 --num_objects 1 2".split()


def test_the_fitted_model_loads_and_detects(tmp_path):
    threads = torch.get_num_threads()
    network, folder = tmp_path / "network", tmp_path / "rcnn"
    flags = "--method=rcnn --image_size=64 --max_steps=1 --batch_size=2 --eval_epochs=0 --cpu_threads=1".split()
    train_detector.main([f"--output_dir={network}", *flags, *DATA])
    reset()
    torch.set_num_threads(threads)
    before = json.loads((network / "config.json").read_text())
    scores = fit_rcnn.main([f"--model={network}", f"--output_dir={folder}"])
    torch.set_num_threads(threads)
    after = json.loads((folder / "config.json").read_text())
    assert (before["fitted"], after["fitted"]) == (False, True) and after["model_type"] == "rcnn"
    assert scores["images"] == 2 and scores["ms_proposals"] > 0 and scores["ms_features"] > 0
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "preprocessor_config.json", "evaluation.json", "examples.png"} <= names
    results = read_results(folder)  # it can be a cell of an experiment
    assert results["metrics"] == {f"test_{name}": value for name, value in scores.items()}
    assert results["args"]["num_train"] == 6 and 0 < results["cpu_seconds"] and results["num_parameters"] > 1000
    assert not {name for name in names if name.endswith((".pkl", ".bin", ".pt"))}
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    found = pipeline("object-detection", str(folder))(image, threshold=0.0)
    assert found and all(row["label"] in after["label2id"] and row["box"]["xmax"] <= 90 for row in found)
