import os
import shutil
import time

import pytest

from hf_dl.demo.checkpoints import (
    PageModels,
    describe_model,
    find_model,
    find_pipeline,
    newest_pipeline,
    newest_run,
    one_line,
    shown_name,
)
from hf_dl.demo.classifiers import load_classifier
from hf_dl.demo.training import Training

from .tiny import save_resnet


class TestNewestRun:
    def test_newest_of_the_kinds(self, resnet, tmp_path):
        assert newest_run(tmp_path, ["norm_resnet"]) is None
        for age, name in enumerate(["new", "old", "new/best", "new/checkpoints/step_1"], start=-2):
            shutil.copytree(resnet, tmp_path / "runs" / name)
            then = time.time() + 1000 * age
            if "/" not in name:
                then = time.time() - 1000 * (age + 5)
            os.utime(tmp_path / "runs" / name / "model.safetensors", (then, then))
        assert newest_run(tmp_path, ["norm_resnet"]) == str(tmp_path / "runs" / "new")
        assert newest_run(tmp_path, ["small_vit"]) is None
        for broken in ("[]", "{", '"text"', "{}"):
            (tmp_path / "runs" / "new" / "config.json").write_text(broken)
            assert newest_run(tmp_path, ["norm_resnet"]) == str(tmp_path / "runs" / "old")

    def test_a_part_of_a_pipeline_is_no_run(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "runs" / "pipeline" / "encoder")
        (tmp_path / "runs" / "pipeline" / "model_index.json").write_text("{}")
        assert newest_run(tmp_path, ["norm_resnet"]) is None

    @pytest.mark.parametrize("written", ['"Drawer"', '["drawer", "Drawer"]'])
    def test_newest_pipeline(self, written, tmp_path):
        assert newest_pipeline(tmp_path, "Drawer") is None
        indices = dict.fromkeys(("new", "old", "new/best", "new/checkpoints/1"), f'{{"_class_name": {written}}}')
        indices |= {"other": '{"_class_name": "drawer"}', "broken": "{", "list": "[]", "empty": "{}"}
        for age, (name, text) in enumerate(indices.items()):
            path = tmp_path / "runs" / name / "model_index.json"
            path.parent.mkdir(parents=True)
            path.write_text(text)
            then = time.time() - 1000 * (age if age < 2 else -age)
            os.utime(path, (then, then))
        assert newest_pipeline(tmp_path, "Drawer") == str(tmp_path / "runs" / "new")


class TestFindModel:
    def test_environment_then_bundled_then_newest_run(self, resnet, tmp_path, monkeypatch):
        space, root = tmp_path / "space", tmp_path / "root"
        places = {"kinds": ["norm_resnet"], "space": space, "root": root}
        assert find_model(**places) is None
        save_resnet(root / "runs" / "mine")
        assert find_model(**places) == str(root / "runs" / "mine")
        shutil.copytree(resnet, space / "model")
        assert find_model(**places) == str(space / "model")
        monkeypatch.setenv("HF_DL_MODEL", "someone/model")
        assert find_model(**places) == "someone/model"

    def test_of_a_pipeline(self, tmp_path, monkeypatch):
        space, root = tmp_path / "space", tmp_path / "root"
        places = {"kind": "Drawer", "variable": "THE_VARIABLE", "space": space, "root": root}
        assert find_pipeline(**places) is None
        for folder in (root / "runs" / "mine", space / "model"):
            folder.mkdir(parents=True)
            (folder / "model_index.json").write_text('{"_class_name": "Drawer"}')
            assert find_pipeline(**places) == str(folder)
            assert find_model(["x"], space=space, root=root) is None
        monkeypatch.setenv("THE_VARIABLE", "someone/pipeline")
        assert find_pipeline(**places) == "someone/pipeline"


def test_a_model_is_shown_without_the_path_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine`").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {"runs/mine`": "mine`", str(tmp_path / "runs"): "runs", ".": tmp_path.name, "/no/such/model": "model"}
    for name, shown in {**names, "someone/model": "someone/model"}.items():
        assert shown_name(name) == shown
    assert describe_model("runs/mine`", "3 classes") == "Model `mine` · 3 classes"


def test_one_line_is_a_sentence():
    error = OSError("The file\n is missing. You can inspect\nit at: x")
    assert (
        one_line(error) == "The file is missing"
        and one_line(OSError("model.bin is damaged.")) == "model.bin is damaged"
    )


class TestPageModels:
    def make(self, root, check=lambda classifier: None):
        training = Training("train_classifier.py", "x", scores={}, minutes="a minute", root=root)
        needs = "a large model"
        return PageModels(["norm_resnet"], training, check, load_classifier, needs=needs, space=root / "space")

    def test_environment_comes_first(self, resnet, tmp_path, monkeypatch):
        save_resnet(tmp_path / "runs" / "mine")
        monkeypatch.setenv("HF_DL_MODEL", str(resnet))
        models = self.make(tmp_path)
        assert models.ready and models.get().name == models.get("").name == str(resnet)
        monkeypatch.delenv("HF_DL_MODEL")
        assert self.make(tmp_path).get().name == str(tmp_path / "runs" / "mine")

    def test_none(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        models = self.make(tmp_path)
        assert not models.ready and not models.problem and not models.can_train
        with pytest.raises(ValueError, match="This page has no model yet"):
            models.get()

    def test_a_default_that_does_not_fit(self, resnet, tmp_path, monkeypatch):
        def refuse(classifier):
            raise ValueError("It is too small.")

        monkeypatch.setenv("HF_DL_MODEL", str(resnet))
        models = self.make(tmp_path, refuse)
        text = f"The model '{resnet.name}' does not fit this page, which needs a large model."
        assert not models.ready and models.problem == text  # without the path of its folder
        with pytest.raises(ValueError, match=f"The model '{resnet}' does not fit this page"):
            models.get(str(resnet))  # a visitor typed this path

    def test_keeps_the_default_and_the_latest_two(self, resnet, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(resnet))
        models = self.make(tmp_path)
        first = models.get()
        folders = [str(shutil.copytree(resnet, tmp_path / name)) for name in "abc"]
        found = [models.get(folder) for folder in folders]
        assert models.get() is first and models.get(folders[2]) is found[2] and models.get(folders[1]) is found[1]
        assert models.get(folders[0]) is not found[0]
