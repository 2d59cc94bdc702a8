import json

import pytest

from hf_dl.models.slot_autoencoder import SlotAutoencoderModel
from hf_dl.recipes import scene_images, slots
from scripts import evaluate_slots
from tests.recipes.test_slots import make_model


class TestMain:
    DATA = ["--num_train", "64", "--num_test", "16"]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("model")
        make_model(size=32).save_pretrained(folder)
        return folder

    def test_slots_and_iterations_to_try(self, folder, tmp_path, capsys):
        flags = ["--num_slots", "2", "6", "--num_iterations", "1", "3", "--output_dir", str(tmp_path / "out")]
        metrics = evaluate_slots.main(["--model", str(folder), *self.DATA, *flags])
        tried = {key.split("_test_")[0] for key in metrics if "_test_" in key}
        assert tried == {"k2_t1", "k2_t3", "k6_t1", "k6_t3"}
        args = scene_images.SceneFlags(image_size=32, num_test=16)
        data = scene_images.load_images(args, "test").__getitems__(range(16))
        model = SlotAutoencoderModel.from_pretrained(folder)
        expected, _ = slots.evaluate(model, [data], num_slots=6, num_iterations=1)
        found = {key.removeprefix("k6_t1_test_"): value for key, value in metrics.items() if key.startswith("k6_t1_")}
        assert found == pytest.approx(expected, rel=1e-5)
        written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert written["metrics"] == metrics
        assert written["args"]["num_slots"] == [2, 6]
        assert "k6_t1_test_decoder_fg_ari" in capsys.readouterr().out
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "evaluation.json", "slots.png", "compositions.png", "slot_library",
        }  # fmt: skip
        assert not (folder / "evaluation.json").exists()

    def test_the_models_own_slots_and_folder(self, folder):
        metrics = evaluate_slots.main(["--model", str(folder), *self.DATA])
        assert metrics["test_images"] == 16 and "test_decoder_fg_ari" in metrics
        assert json.loads((folder / "evaluation.json").read_text())["metrics"] == metrics

    @pytest.mark.parametrize("flag", ["--num_slot_count", "--num_iter"])
    def test_an_unknown_flag_is_refused(self, flag, capsys):
        with pytest.raises(SystemExit):
            evaluate_slots.main([flag, "3"])
        assert flag in capsys.readouterr().err
