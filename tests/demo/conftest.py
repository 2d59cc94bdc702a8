import functools

import pytest

from hf_dl.demo import training
from hf_dl.demo.classifiers import load_classifier
from hf_dl.demo.decoders import Broadcast, Diffusion

from .tiny import make_slot_pipe, make_slots, save_resnet, save_vit


@pytest.fixture(autouse=True)
def nothing_to_find(monkeypatch, tmp_path_factory):
    """No models in the environment, and no scripts except those that a test writes."""
    monkeypatch.delenv("HF_DL_MODEL", raising=False)
    monkeypatch.delenv("HF_DL_DIFFUSION_MODEL", raising=False)
    monkeypatch.setattr(training, "SCRIPTS", tmp_path_factory.getbasetemp() / "no_scripts")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return save_resnet(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return load_classifier(str(save_vit(tmp_path_factory.mktemp("vit"))))


@pytest.fixture(scope="module")
def model():
    """A model that keeps all slots. Untrained slots repeat each other, so it would remove most of them."""
    model = make_slots()
    model.forward = functools.partial(model.forward, prune=False)
    return model


@pytest.fixture(scope="module")
def pipe():
    return make_slot_pipe()


@pytest.fixture
def broadcast(model):
    return Broadcast(model)


@pytest.fixture
def diffusion(pipe):
    return Diffusion(pipe)
