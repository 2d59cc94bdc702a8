import importlib
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import datasets
import pytest
from transformers import AutoModelForImageClassification

from hf_dl.demo import checkpoints, slots
from hf_dl.models.image_vae import ImageVaeConfig, ImageVaeModel
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from hf_dl.pipelines.model_loading import check_not_runs, load_config
from hf_dl.recipes import arithmetic, evaluation, latent_autoencoder, library_classifiers
from hf_dl.training.args import parse_flags


@dataclass
class Args:
    model: str = field(default="runs/train_slots", metadata={"help": "Folder of the model."})
    num_slots: list[int] = field(default_factory=list, metadata={"help": "Slots."})
    output_dir: str = field(default="", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        if any(count < 1 for count in self.num_slots):
            raise ValueError(f"num_slots={self.num_slots} must be positive.")


class TestFlags:
    def test_values_and_defaults(self):
        args = parse_flags(Args, ["--num_slots", "2", "3"])
        assert args == Args(num_slots=[2, 3])
        assert type(args) is Args

    @pytest.mark.parametrize(
        ("argv", "sentence"),
        [
            (["--num_slot", "3"], "--num_slot is an unknown flag. Did you mean --num_slots?"),
            (["--num_slots", "x"], "invalid int value: 'x'"),
            (["--num_slots", "0"], "num_slots=[0] must be positive."),
            (["stray"], "'stray' is not a flag"),
        ],
    )
    def test_wrong_flags_end_the_program_with_one_sentence(self, argv, sentence, capsys):
        with pytest.raises(SystemExit) as stop:
            parse_flags(Args, argv)
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "sentence"), [({"num_slots": 0}, "num_slots=0 must be"), ({"encoder": "vit"}, "encoder")]
)
def test_an_invalid_config_is_reported_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluation.checked_config(SlotAutoencoderConfig, **fields)


def test_a_valid_config_is_returned():
    config = evaluation.checked_config(SlotAutoencoderConfig, num_slots=3)
    assert isinstance(config, SlotAutoencoderConfig) and config.num_slots == 3


@pytest.mark.parametrize(
    ("split", "num_train", "num_test", "default", "expected"),
    [
        ("train", 500, None, 2000, 500),
        ("train", 0, None, 2000, None),
        ("test", 500, None, 2000, 250),
        ("test", 500, None, None, 250),
        ("test", 5000, None, 2000, 2000),
        ("test", 500, 400, 2000, 400),
        ("test", 500, 0, 2000, None),  # all
        ("test", 0, None, 2000, 2000),
        ("test", 1, None, 2000, 2),
    ],
)
def test_few_training_examples_make_the_other_splits_small(split, num_train, num_test, default, expected):
    flags = SimpleNamespace(num_train=num_train, num_test=num_test)
    assert evaluation.split_size(flags, split, default) == expected


@pytest.mark.parametrize(
    ("recipe", "flags", "loader"),
    [
        ("classifier", "ImageFlags", "labeled_images"),
        ("vae", "ImageFlags", "labeled_images"),
        ("scene_images", "SceneFlags", "scenes"),
    ],
)
def test_a_quick_look_renders_few_images_for_evaluation(recipe, flags, loader, monkeypatch):
    module = importlib.import_module(f"hf_dl.recipes.{recipe}")
    asked = []

    def load(*args, num_images=None, num_scenes=None, **options):
        asked.append(num_images or num_scenes)
        raise FileNotFoundError

    monkeypatch.setattr(getattr(module, loader), "load", load)
    for split in ("train", "validation", "test"):
        with pytest.raises(FileNotFoundError):
            module.load_images(getattr(module, flags)(num_train=500), split)
    assert asked == [500, 250, 250]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_for_terminals(terminal, monkeypatch):
    was_enabled = datasets.is_progress_bar_enabled()
    try:
        datasets.enable_progress_bars()
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
        evaluation.hide_progress_bars()
        assert datasets.is_progress_bar_enabled() is terminal
    finally:
        (datasets.enable_progress_bars if was_enabled else datasets.disable_progress_bars)()


def test_the_output_folder_defaults_to_the_models(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    assert evaluation.make_output_folder(Args(model=str(model))) == model
    other = tmp_path / "some" / "where"
    assert evaluation.make_output_folder(Args(model=str(model), output_dir=str(other))) == other
    assert other.is_dir()
    monkeypatch.chdir(tmp_path)
    assert evaluation.make_output_folder(Args(model="openai/clip")).as_posix() == "runs/clip"
    assert not (tmp_path / "openai").exists()  # the next run would load this folder instead of the Hub id


def test_write_evaluation(tmp_path, capsys):
    args = Args(model=str(tmp_path / "model"), num_slots=[2])
    evaluation.write_evaluation(tmp_path, args, {"test_loss": 0.25, "test_images": 16.0}, pairs=[1])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "args": {"model": "model", "num_slots": [2], "output_dir": ""},  # without the folders of this machine
        "metrics": {"test_loss": 0.25, "test_images": 16.0},
        "pairs": [1],
    }
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["test_loss", "0.2500"], ["test_images", "16.0000"]]


def test_a_model_that_cannot_be_loaded_is_reported_in_one_sentence(tmp_path):
    folder = tmp_path / "small_vae"
    config = ImageVaeConfig(image_size=8, hidden_sizes=[4], latent_size=2)
    ImageVaeModel(config).save_pretrained(folder)
    assert evaluation.load_model(ImageVaeModel, folder).config.latent_size == 2
    with pytest.raises(ValueError, match="Its model_type is image_vae; expected slot_autoencoder"):
        evaluation.load_model(SlotAutoencoderModel, folder)
    with pytest.raises(ValueError, match="cannot be loaded.*AutoModelForImageClassification"):
        evaluation.load_model(AutoModelForImageClassification, folder)
    with pytest.raises(ValueError, match="contains runs and is not a model itself. Choose a model in it: .*small_vae"):
        evaluation.load_model(ImageVaeModel, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="It has no config.json"):
        evaluation.load_model(ImageVaeModel, tmp_path / "empty")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"small_vae' cannot be loaded\. .*not fully covered"):
        evaluation.load_model(ImageVaeModel, folder)


def test_the_data_of_the_training_run_is_used(tmp_path, capsys):
    @dataclass
    class DataFlags:
        source: str = "synthetic"
        size: int = 1

    @dataclass
    class EvaluationFlags(DataFlags):
        seed: int = 0

    def use(*argv):
        args = parse_flags(EvaluationFlags, list(argv))
        evaluation.use_training_data(args, tmp_path, DataFlags, list(argv))
        return args

    assert use() == EvaluationFlags()  # a model without results.json
    results = {"script": "train.py", "args": {"source": "photos", "size": 5, "seed": 3}, "metrics": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert use() == EvaluationFlags(source="photos", size=5)
    assert "Using the data of the training run: source='photos', size=5." in capsys.readouterr().err
    assert use("--size=1") == EvaluationFlags(source="photos", size=1)
    assert use("--source", "synthetic") == EvaluationFlags()
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is cut short or damaged"):
        use()


class TestFoldersOfRuns:
    @pytest.fixture
    def runs(self, tmp_path):
        for name in ("4f", "0a", "9c", "7b"):
            (tmp_path / "runs" / "norms" / name).mkdir(parents=True)
            (tmp_path / "runs" / "norms" / name / "config.json").write_text("{}")
        (tmp_path / "runs" / "norms" / "7b" / "config.json").unlink()
        (tmp_path / "runs" / "norms" / "7b" / "model_index.json").write_text("{}")
        return tmp_path / "runs"

    @pytest.mark.parametrize(
        "load",
        [
            lambda name: load_config(name, ["image_vae"]),
            lambda name: evaluation.load_model(ImageVaeModel, name),
            lambda name: library_classifiers.make_library_model(name, pretrained=True, image_size=8, names=["a"]),
            latent_autoencoder.load_autoencoder,
            arithmetic.read_config,
            lambda name: checkpoints.load_vision_model(name, None, (), kind="image classifier"),
            slots.load_model,
            slots.load_pipeline,
        ],
    )
    def test_the_models_in_it_are_named(self, runs, load):
        folder = str(runs / "norms")
        names = ", ".join(f"{folder}/{name}" for name in ("0a", "4f", "7b"))
        sentence = (
            f"The folder '{folder}' contains runs and is not a model itself. Choose one of its 4 models, such as "
        )
        with pytest.raises(ValueError, match=f"^{sentence}{names}.$"):
            load(folder)

    def test_few_models_are_all_named(self, runs):
        (runs / "norms" / "9c" / "config.json").unlink()
        with pytest.raises(ValueError, match=r"Choose a model in it: \S+/0a, \S+/4f, \S+/7b\.$"):
            check_not_runs(runs)  # two folders deeper

    def test_other_folders_pass(self, runs, tmp_path):
        (tmp_path / "empty").mkdir()
        for name in (runs / "norms" / "0a", runs / "norms" / "7b", tmp_path / "empty", "user/model", ""):
            check_not_runs(name)
