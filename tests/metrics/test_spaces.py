"""Each metric as a folder that `evaluate.load` reads offline, in a process that cannot import hf_dl."""

import importlib.metadata
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hf_dl.metrics import (
    captions,
    classification,
    detection,
    editing,
    images,
    modality_gap,
    phrase_segmentation,
    programs,
    segmentation,
    spaces,
)
from tests.loopback_hub import Blob, LoopbackHub, Repo

ROOT = Path(__file__).resolve().parents[2]
# Runs in a fresh process: argv[1] is a JSON file {metric: [argument of evaluate.load, example inputs]}.
LOAD = """
import doctest, json, os, re, runpy, sys
sys.modules["hf_dl"] = None  # an import of hf_dl raises ImportError
import numpy as np
import evaluate
from pathlib import Path
from PIL import Image

def images(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]

options = {
    "images": {"predictions": images(0), "references": images(1), "features": "random_conv_v1"},
    "editing": {
        "predictions": images(0), "references": images(1), "images": images(2),
        "masks_before": [image.convert("L") for image in images(3)],
        "masks_after": [Image.new("L", (32, 32)) for _ in range(4)],
    },
}
result = {}
for name, (source, example) in json.loads(Path(sys.argv[1]).read_text()).items():
    metric = evaluate.load(source)
    options.setdefault(name, example)
    found = {}
    if os.path.isdir(source):
        app = runpy.run_path(os.path.join(source, "app.py"))
        found["title"] = app["page"].title
        if "EXAMPLE" in app:
            assert app["EXAMPLE"] == example
            found["page"] = app["compute"](*[json.dumps(value) for value in example.values()])
        else:
            for key in app["FILES"]:
                for number, image in enumerate(options[name][key]):
                    image.save(f"{key}{number}.png")
            found["page"] = app["compute"](*[[f"{key}{number}.png" for number in range(4)] for key in app["FILES"]])
        blocks = re.findall(r"```python\\n(.*?)```", Path(source, "README.md").read_text(), flags=re.DOTALL)
        examples = doctest.DocTestParser().get_doctest("\\n".join(blocks), {}, name, None, 0)
        found["doctest"] = doctest.DocTestRunner().run(examples)
    found["scores"] = metric.compute(**options[name])
    result[name] = found
print("RESULT" + json.dumps(result))
"""


def write(folder, files):
    folder.mkdir(parents=True)
    for path, content in files.items():
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def load_alone(start_fresh, tmp_path):
    """Compute each metric in a process that cannot import hf_dl; `sources` are arguments of `evaluate.load`."""

    def load(sources, **env):
        sources = {name: [source, spaces.METRICS[name].example] for name, source in sources.items()}
        (tmp_path / "sources.json").write_text(json.dumps(sources))
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "home")} | env
        done = start_fresh(LOAD, "sources.json", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.split("RESULT")[1])

    return load


def test_every_metric_loads_offline_without_the_package(tmp_path, load_alone):
    sources = {
        name: str(write(tmp_path / "spaces" / name, spaces.metric_files(name, f"{tmp_path}/spaces/{name}")))
        for name in spaces.METRICS
    }
    found = load_alone(sources, HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    arrays = [np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8) for seed in range(4)]
    pixels = [torch.from_numpy(array).permute(0, 3, 1, 2) for array in arrays]
    before = torch.from_numpy(np.stack([np.asarray(Image.fromarray(array).convert("L")) for array in arrays[3]])) > 0
    example = {name: space.example for name, space in spaces.METRICS.items()}
    tensors = {
        name: [torch.tensor(example[name][key]) for key in ("predictions", "references")]
        for name in ("classification", "phrase_segmentation", "segmentation")
    }
    expected = {
        "captions": captions.caption_scores(*example["captions"].values()),
        "classification": classification.classification_scores(
            classification.confusion_matrix(*tensors["classification"])
        ),
        "detection": detection.detection_scores(*example["detection"].values()),
        "editing": editing.editing_scores(*pixels[:3], before, torch.zeros_like(before)),
        "images": images.fid(pixels[1], pixels[0], features=images.RandomConvFeatures()),
        "modality_gap": modality_gap.modality_gap_scores(*map(torch.tensor, example["modality_gap"].values())),
        "phrase_segmentation": phrase_segmentation.phrase_segmentation_scores(
            *tensors["phrase_segmentation"], threshold=0.5
        ),
        "programs": programs.program_scores(*example["programs"].values()),
        "segmentation": segmentation.segmentation_scores(*tensors["segmentation"]),
    }
    assert found.keys() == expected.keys() == spaces.METRICS.keys()
    for name, scores in expected.items():
        assert found[name]["scores"] == pytest.approx(scores, nan_ok=True), name
        failures, examples = found[name]["doctest"]
        assert failures == 0 and examples >= 3, name
        assert found[name]["title"] == spaces.METRICS[name].title
        if name != "images":  # its page uses Inception where the weights are present
            assert found[name]["page"] == pytest.approx(scores, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["classification", "programs"])
def test_a_metric_loads_from_the_hub(metric, tmp_path, load_alone):
    with LoopbackHub() as hub:
        files = spaces.metric_files(metric, "me/my-scores")
        hub.repos["space", "me/my-scores"] = repo = Repo("space", "me/my-scores", sdk="gradio")
        repo.commit({path: Blob(content, lfs=False) for path, content in files.items()}, "Add the metric")
        found = load_alone({metric: "me/my-scores"}, **hub.env(tmp_path / "home"))
    scores = {"classification": {"accuracy": 0.75}, "programs": {"exact_match": 0, "execution_accuracy": 0.5}}
    for name, value in scores[metric].items():
        assert found[metric]["scores"][name] == value


@pytest.mark.parametrize("metric", spaces.METRICS)
def test_the_folder_is_a_metric_space(metric):
    files = spaces.metric_files(metric, "me/scores")
    assert {"README.md", "app.py", "requirements.txt", "scores.py"} <= files.keys()
    _, head, text = files["README.md"].decode().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["tags"] == ["evaluate", "metric"] and head["sdk"] == "gradio" and head["app_file"] == "app.py"
    assert len(head["short_description"]) <= 60
    assert 'evaluate.load("me/scores")' in text and "REPO_ID" not in text
    for heading in ("How to use", "Inputs", "Outputs", "Limitations", "Citation"):
        assert f"\n## {heading}\n" in text
    bounds = set(importlib.metadata.requires("hf_dl"))
    requirements = files["requirements.txt"].decode().splitlines()
    assert set(requirements) <= bounds and {"datasets", "evaluate"} <= {re.match(r"\w+", r)[0] for r in requirements}


def test_every_metric_of_the_package_has_a_space():
    wrappers = {p.stem for p in Path(spaces.__file__).parent.glob("*.py") if "(evaluate.Metric)" in p.read_text()}
    # not in the file of the functions, because the import of evaluate takes half a second
    assert wrappers == {f"{name}_metric" for name in spaces.METRICS}
    assert {p.stem for p in Path(spaces.__file__).with_name("cards").iterdir()} == spaces.METRICS.keys()


def test_the_page_runs_the_gradio_of_the_other_spaces():
    for path in ROOT.glob("spaces/*/README.md"):
        assert yaml.safe_load(path.read_text().split("---")[1])["sdk_version"] == spaces.GRADIO_VERSION


@pytest.mark.parametrize("repo_id", ["me/a.b", "me/app", "me/execution", "me/"])
def test_names_that_cannot_be_imported(repo_id):
    with pytest.raises(ValueError, match=f"repo_id='{repo_id}' cannot name a metric"):
        spaces.metric_files("programs", repo_id)


def test_an_unknown_metric():
    with pytest.raises(
        ValueError, match="metric='bleu' is unknown. Choose one of: captions, classification, detection"
    ):
        spaces.metric_files("bleu")
