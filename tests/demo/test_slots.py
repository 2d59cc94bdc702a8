import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dl.data import scenes
from hf_dl.demo.decoders import Broadcast, Diffusion
from hf_dl.demo.slots import (
    draw_scene,
    get_frame,
    is_at,
    load_model,
    load_pipeline,
    load_scene,
    make_explanation,
    move_slot,
)

from ..spaces.pages import make_image
from .tiny import explain_perfectly, make_slots


@pytest.mark.parametrize("style", ["plain", "textured"])
def test_scenes_are_functions_of_the_seed(style):
    first, again, other = (draw_scene(style, seed) for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first.mode == "RGB"
    row = load_scene(style, 5)
    assert row["image"].tobytes() == first.tobytes() == scenes.counterfactual(row)["image"].tobytes()


def test_order_and_shares_use_the_same_mask():
    """A slot with much weight everywhere that wins no pixel is not the largest."""
    masks = torch.tensor([0.4, 0.3, 0.3]).view(3, 1, 1).repeat(1, 4, 4)
    posterior = torch.zeros(3, 4, 4)
    posterior[2], posterior[1, 0] = 0.5, 1
    found = make_explanation(
        make_image((40, 40)), slots=torch.arange(3.0).view(1, 3, 1), masks=masks,
        contents=masks[:, None].repeat(1, 3, 1, 1),
        posterior=posterior, reconstruction=None, made=("broadcast", None, None),
    )  # fmt: skip
    assert found.slots.flatten().tolist() == [2, 1, 0] and found.used == [0, 1, 2]
    assert found.shares == sorted(found.shares, reverse=True) and found.shares[2] == 0
    assert found.shares == [(found.labels == slot).mean() for slot in range(3)]


class TestFrames:
    @pytest.fixture
    def found(self):
        return explain_perfectly(load_scene("plain", 0))

    def test_move(self, found):
        size, before = get_frame(found, 1)[2], found.slots.clone()
        moved = move_slot(found, 1, 0.25, 0.75, 1.5)
        assert get_frame(moved, 1) == pytest.approx((0.25, 0.75, 1.5 * size))
        moved.slots[0, 1, -3:] = before[0, 1, -3:]
        assert torch.equal(moved.slots, before) and torch.equal(found.slots, before)
        assert moved.seed == found.seed and moved.scene is found.scene

    def test_rounded_positions_change_nothing(self, found):
        x, y, _ = get_frame(found, 1)
        assert move_slot(found, 1, round(x, 3), round(y, 3)) is found
        assert move_slot(found, 1, round(x, 3), round(y, 3), 2) is not found
        assert is_at(found, 1, x, y) and not is_at(found, 1, x + 0.002, y) and not is_at(found, 1, x, y - 0.002)


class TestLoadModel:
    def test_load(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = load_model(str(tmp_path))
        assert not loaded.training
        image = make_image()
        assert torch.equal(Broadcast(loaded).explain(image).slots, Broadcast(make_slots()).explain(image).slots)

    def test_missing(self, tmp_path):
        with pytest.raises(ValueError, match="was not found.*Set HF_DL_MODEL"):
            load_model(str(tmp_path / "nowhere"))

    def test_another_kind(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(ValueError, match="has model_type='vit'. This page needs a 'slot_autoencoder'"):
            load_model(str(tmp_path))

    def test_of_another_version(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "slot_mlp_dim": 12}))
        with pytest.raises(ValueError, match="does not fit this version of hf_dl: 3 of its tensors"):
            load_model(str(tmp_path))

    def test_damaged(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_model(str(tmp_path))


class TestLoadPipeline:
    @pytest.fixture
    def saved(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "runs" / "drawn")
        return tmp_path / "runs" / "drawn"

    def test_load(self, pipe, saved):
        loaded, image = load_pipeline(str(saved)), make_image()
        found = [Diffusion(each).explain(image) for each in (loaded, pipe)]
        assert torch.equal(found[0].slots, found[1].slots)
        assert "16 × 16 pixels" in Diffusion(loaded).describe() and "drawn" in Diffusion(loaded).describe()

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for name in (str(tmp_path / "nowhere"), "/not/a/repo/id"):
            with pytest.raises(ValueError, match="was not found.*Set HF_DL_DIFFUSION_MODEL"):
                load_pipeline(name)

    def test_another_kind(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot be loaded .*has no model_index.json of a SlotDiffusionPipeline"):
            load_pipeline(str(tmp_path))

    @pytest.mark.parametrize("part", ["slot_encoder", "unet", "autoencoder"])
    @pytest.mark.parametrize("damage", ["cut", "gone", "fewer", "other"])
    def test_damaged(self, saved, part, damage):
        (weights,) = (saved / part).glob("*.safetensors")
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:100])
        elif damage == "gone":
            weights.unlink()
        else:
            tensors = load_file(weights)
            name = next(iter(tensors))
            tensors[name] = torch.zeros(1, 2, 3)
            if damage == "fewer":
                del tensors[name]
            save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="The diffusion pipeline .* cannot be loaded") as caught:
            load_pipeline(str(saved))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
