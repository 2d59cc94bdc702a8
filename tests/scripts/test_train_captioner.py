"""The scripts of the captioner: the files of a run, its scores, the evaluation script, and photographs."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast, ViTImageProcessor, pipeline

from hf_dl.data import scenes
from hf_dl.data.caption_tokenizer import build_caption_tokenizer, extend_caption_tokenizer
from hf_dl.data.scene_captions import caption_words
from hf_dl.models import ImageCaptionerForConditionalGeneration
from hf_dl.models.caption_decoder import CONDITIONINGS
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification
from hf_dl.recipes import captioner
from hf_dl.reporting.card import read_card
from hf_dl.reporting.experiment import read_experiment
from scripts import evaluate_captioner, run_experiment, train_captioner
from tests.scripts.runs import reset

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--num_train=24 --num_test=8 --batch_size=8 --max_steps=3 --image_size=32 --feature_size=8 --embedding_size=8 "
    "--decoder_hidden_size=12 --attention_size=6 --cpu_threads=1 --warmup_steps=0 --save_every=0 --log_every=1"
).split()


def train(folder, *flags):
    metrics = train_captioner.main([f"--output_dir={folder}", *SMALL, *flags])
    reset()
    return metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions") / "run"
    return folder, train(folder, "--coverage_weight=0.5", "--teacher_forcing_end=0.5")


def test_a_run_leaves_scores_model_processor_and_card(finished):
    folder, metrics = finished
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == metrics and results["model_class"] == "ImageCaptionerForConditionalGeneration"
    assert all(math.isfinite(value) for value in metrics.values())
    assert {"val_loss", "test_bleu_4", "test_cider_d", "test_hallucinated_chance"} <= metrics.keys()
    assert metrics["test_attribute_accuracy_truth"] == 1
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = next(line for line in logged if "coverage" in line)
    assert first["loss"] == pytest.approx(first["cross_entropy"] + 0.5 * first["coverage"], rel=1e-4)
    card = read_card(folder / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "image-text-to-text" in card.text and (folder / "captions.png").is_file()
    pipe = pipeline("image-text-to-text", str(folder), device="cpu")
    found = pipe(Image.new("RGB", (50, 40), "red"), text="a red cube", generate_kwargs={"max_length": 8})
    assert found[0]["generated_text"].startswith("a red cube")


def test_the_evaluation_script_finds_the_same(finished):
    folder, metrics = finished
    found = evaluate_captioner.main([f"--model={folder}", "--num_test=8", "--num_beams", "1", "2"])
    for name in ("test_loss", "test_bleu_4", "test_rouge_l", "test_count_accuracy"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-9), name
    assert "test_bleu_4_beam_2" in found
    assert json.loads((folder / "evaluation.json").read_text())["metrics"] == found
    with pytest.raises(ValueError, match=r"num_beams=\[0\] must be numbers of at least 1"):
        evaluate_captioner.main([f"--model={folder}", "--num_beams", "0"])
    with pytest.raises(ValueError, match="num_pictures=-1 must be at least 0. 0 draws none"):
        evaluate_captioner.main(["--num_pictures=-1"])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder in the format of COCO, with words that the captions of scenes do not have."""
    root = tmp_path_factory.mktemp("photographs")
    for part, count in (("train", 10), ("val", 2)):
        (root / f"{part}2017").mkdir()
        content = {"images": [], "annotations": []}
        for i in range(count):
            Image.new("RGB", (40, 34), (20 * i, 0, 90)).save(root / f"{part}2017" / f"{i}.jpg")
            content["images"].append({"id": i, "file_name": f"{i}.jpg"})
            content["annotations"] += [{"image_id": i, "caption": f"A furry {noun} ."} for noun in ("dog", "sofa")]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))
    return root


def test_a_saved_captioner_is_trained_further_with_new_words(finished, photographs, tmp_path):
    folder, _ = finished
    flags = [f"--model={folder}", f"--source={photographs}", "--max_steps=1", "--batch_size=4", "--num_test=2"]
    metrics = train_captioner.main([f"--output_dir={tmp_path / 'run'}", *flags, "--cpu_threads=1", "--save_every=0"])
    reset()
    assert "test_rouge_l" in metrics
    old, new = (AutoProcessor.from_pretrained(path).tokenizer.get_vocab() for path in (folder, tmp_path / "run"))
    assert {word: new[word] for word in old} == old and set(new) - set(old) == {"furry", "dog", "sofa"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["args"]["feature_size"] == 8 and results["args"]["image_size"] == 32  # of the saved captioner
    model = ImageCaptionerForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == len(new) == metrics["vocab_size"]


def test_old_words_keep_their_weights_and_the_image_processor_is_kept(finished, photographs):
    folder, _ = finished
    args = train_captioner.Args(model=str(folder), source=str(photographs), dropout=0.3, freeze_encoder=True)
    args.given = {"dropout": 0.3, "freeze_encoder": True}
    saved = captioner.load_saved(args)
    saved.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor = captioner.make_processor(args, captioner.load_data(args, "train"), saved)
    assert processor.image_processor.image_mean == [0.1, 0.2, 0.3]
    torch.manual_seed(5)
    model, old = captioner.make_model(args, processor, saved), saved.model.state_dict()
    for name, values in model.state_dict().items():
        assert torch.equal(values[: len(old[name])] if values.ndim else values, old[name]), name
    embedding = model.decoder.embedding.weight[len(saved.processor.tokenizer) :]
    assert embedding.shape == (3, 8) and 0.02 < embedding.std() < 0.3 and embedding.unique().numel() == 24
    assert model.decoder.dropout.p == 0.3 and not any(p.requires_grad for p in model.encoder.backbone.parameters())
    args.given = {"conditioning": "first_step"}
    args.conditioning = "first_step"
    with pytest.raises(ValueError, match="conditioning='first_step' does not fit model=.*, which has conditioning="):
        captioner.load_saved(args)


def test_a_model_that_is_not_a_captioner_is_refused(finished, tmp_path, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'none' is not a folder, and cannot be loaded"):
        captioner.load_saved(SimpleNamespace(model="none"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="cannot be loaded. Its model_type is vit; expected image_captioner"):
        captioner.load_saved(SimpleNamespace(model=str(tmp_path)))
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    build_caption_tokenizer(["a dog"]).save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="has .* words, but its tokenizer has 6. Expected the tokenizer that was"):
        captioner.load_saved(SimpleNamespace(model=str(tmp_path / "copy")))
    words = tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    with pytest.raises(
        ValueError, match="WordLevel vocabulary that begins with a, <unk>. Expected .* with <start>, <pa"
    ):
        extend_caption_tokenizer(other, ["a dog"])


def test_a_trained_classifier_becomes_the_encoder(tmp_path):
    config = NormResNetConfig(n=1, widths=(4, 4, 8), num_labels=2)
    classifier = NormResNetForImageClassification(config)
    classifier.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    args = train_captioner.Args(backbone=str(tmp_path), freeze_encoder=True, num_train=4, num_test=4, image_size=32)
    processor = captioner.make_processor(args, captioner.load_data(args, "train", num_references=1))
    assert [*processor.image_processor.image_mean] == [0.1, 0.2, 0.3]
    model = captioner.make_model(args, processor)
    assert model.config.backbone == "norm_resnet" and model.config.backbone_options["widths"] == [4, 4, 8]
    trunk = model.encoder.backbone.trunk
    assert torch.equal(trunk.network.stem[0].weight, classifier.norm_resnet.stem[0].weight)
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert all(parameter.requires_grad for parameter in model.encoder.backbone.lateral.parameters())


def test_photographs_with_several_captions(tmp_path):
    """A folder in the format of Flickr8k."""
    (tmp_path / "Images").mkdir()
    lines = ["image,caption", f"0.jpg,{'A dog runs . ' * 80_000}"]  # a million characters
    for number in range(12):
        Image.new("RGB", (40, 50), (20 * number, 0, 90)).save(tmp_path / "Images" / f"{number}.jpg")
        lines += [f"{number}.jpg,A dog runs . {number}", f"{number}.jpg,Ein brauner Hund läuft 红 🙂 ."]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    metrics = train(
        tmp_path / "run", f"--source={tmp_path}", "--num_train=0", "--conditioning=first_step", "--num_beams=2"
    )
    assert "test_rouge_l" in metrics and "test_attribute_accuracy" not in metrics
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.tokenizer.convert_tokens_to_ids("红") != processor.tokenizer.unk_token_id


def test_captions_to_train_on_are_new_in_each_step():
    args = train_captioner.Args(num_train=6, num_test=4, image_size=32)
    data = captioner.load_data(args, "train")
    indices = torch.tensor([3, 1])
    first, again, other = (data.draw_captions(indices, 3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 6
    words = {word for text in first for word in caption_words(text)}
    tokenizer = captioner.make_processor(args, data).tokenizer
    assert not {tokenizer.unk_token_id} & set(tokenizer.convert_tokens_to_ids(sorted(words)))


def test_images_without_objects_are_trained_on_and_images_without_captions_refused():
    rows = scenes.load("train", size=32, num_scenes=4).to_list()
    rows[1] |= {"objects": [], "caption": "An empty gray floor."}
    features = scenes.load("train", size=32, num_scenes=1).features
    data = captioner.CaptionedImages(datasets.Dataset.from_list(rows, features=features), num_references=2)
    assert all(text.startswith("An empty") for text in data.references[1])
    args = train_captioner.Args(image_size=32, feature_size=8, decoder_hidden_size=12)
    processor = captioner.make_processor(args, data)
    model = captioner.make_model(args, processor)
    texts = [*data.draw_captions(torch.arange(3), 1, seed=0), ""]  # the last reference is empty
    labels = processor.make_labels(texts)
    assert (labels[3] != -100).sum() == 1  # the end token
    images = captioner.to_pixel_values(data.images.__getitems__(range(4))["image"], processor)
    loss = model(images, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    scores = captioner.evaluate(model.eval(), processor, data)
    assert all(math.isfinite(value) for value in scores.values())
    photographs = datasets.Dataset.from_dict(
        {"image": [row["image"] for row in rows], "captions": [["a"], [], [], []]}
    )
    with pytest.raises(ValueError, match="The image in row 1 has no caption. Expected at least one caption per image"):
        captioner.CaptionedImages(photographs.cast_column("image", features["image"]))


def test_unknown_and_hyphenated_words_keep_their_place():
    tokenizer = build_caption_tokenizer(["a red t-shirt, new", "a red cube"], min_count=1)
    assert tokenizer.tokenize("A red T-shirt, rare") == ["a", "red", "t-shirt", ",", "<unk>"]
    ids = [*tokenizer("a red")["input_ids"], tokenizer.unk_token_id, *tokenizer("t-shirt")["input_ids"]]
    sequence = torch.tensor([[*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]])

    class Model:
        device, config = torch.device("cpu"), None

        def beam_search(self, pixel_values, num_beams):
            return SimpleNamespace(sequences=sequence[:, None])

    images = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=images)
    texts, found = captioner.write_captions(Model(), processor, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert texts == ["a red <unk> t-shirt"] and found.equal(sequence)


def test_photos_are_cropped_as_in_training():
    data = captioner.load_data(train_captioner.Args(num_train=4, num_test=4, image_size=32), "train", num_references=1)
    for backbone, pretrained, mean in (("small", False, 0.5), ("timm/resnet18", False, 0.485)):
        args = SimpleNamespace(image_size=32, backbone=backbone, pretrained=pretrained, min_count=1)
        processor = captioner.make_processor(args, data)
        photo = Image.new("RGB", (96, 32))
        photo.paste((255, 255, 255), (32, 0, 64, 32))
        values = processor(images=photo, return_tensors="pt")["pixel_values"]
        assert values.shape == (1, 3, 32, 32) and values.min() > 0  # the white middle only
        assert processor.image_processor.image_mean[0] == mean
    args = SimpleNamespace(image_size=32, backbone="timm/tf_efficientnet_es", pretrained=True, min_count=1)
    assert [*captioner.make_processor(args, data).image_processor.image_mean] == [0.5] * 3


def test_pointing_game_needs_the_object_of_the_word():
    objects = [
        {"size": "small", "color": "red", "material": "metal", "shape": "cube"},
        {"size": "large", "color": "blue", "material": "rubber", "shape": "cone"},
    ]
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[4:12, 4:12], mask[40:60, 40:60] = 1, 2
    maps = torch.zeros(8, 64, 64)
    maps[:, 6, 6] = 1  # always on the cube
    game = captioner.Pointing()
    game.add("a red cube and a blue cone", maps, mask, objects)
    assert game.scores()["pointing"] == 0.5 and game.scores()["pointing_chance"] < 0.2
    assert game.scores()["pointing_exact"] == 0.5  # the pixel is on the cube itself
    assert game.scores()["pointing_exact_chance"] == pytest.approx((8 * 8 + 20 * 20) / 2 / 64**2)
    maps[:, 6, 6], maps[:, 6, 14] = 0, 1  # three pixels to the right of the cube
    beside = captioner.Pointing()
    beside.add("a red cube", maps, mask, objects)
    assert beside.scores()["pointing"] == 1 and beside.scores()["pointing_exact"] == 0
    wrong = captioner.Pointing()
    wrong.add("a green cube", maps, mask, objects)  # no such object
    assert math.isnan(wrong.scores()["pointing"])


def test_forced_relations_are_scored(monkeypatch):
    args = train_captioner.Args(num_train=12, num_test=6, image_size=32)
    data = captioner.load_data(args, "test")
    processor = captioner.make_processor(args, data)
    model = captioner.make_model(args, processor).eval()
    found = captioner.forced_relations(model, processor, data)
    assert 0 <= found <= 1

    def true_relations(self, images, decoder_input_ids, **kwargs):
        """Continue each start with a true relation."""
        rows = iter(row for row in data.scenes if len(row["objects"]) > 1)
        texts = []
        for start in processor.batch_decode(decoder_input_ids, skip_special_tokens=True):
            objects = next(rows)["objects"]
            first = next(o for o in objects if f"{o['size']} {o['color']} {o['material']} {o['shape']}" in start)
            place = objects.index(first)
            other = next(o for o in objects if place in o["relations"]["left"] + o["relations"]["right"])
            side = "left" if place in other["relations"]["left"] else "right"
            texts.append(f"{start} to the {side} of a {other['color']} {other['shape']}.")
        return processor.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]

    monkeypatch.setattr(ImageCaptionerForConditionalGeneration, "generate", true_relations)
    assert captioner.forced_relations(model, processor, data) == 1


@pytest.mark.slow
def test_eight_scenes_are_described_word_for_word():
    """Greedy search, beam search and `generate` write the captions that the model has learned by heart."""
    torch.manual_seed(0)
    args = train_captioner.Args(num_train=16, num_test=8, image_size=32, feature_size=32, decoder_hidden_size=64)
    data = captioner.load_data(args, "test")
    processor = captioner.make_processor(args, data)
    model = captioner.make_model(args, processor).train()
    images, captions = data.images.__getitems__(range(8))["image"], [texts[0] for texts in data.references]
    pixel_values, labels = captioner.to_pixel_values(images, processor), processor.make_labels(captions)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    for beams in (1, 3):
        written, _ = captioner.write_captions(model, processor, images, num_beams=beams)
        assert [text.lower() for text in captions] == written
        found = processor.batch_decode(model.generate(pixel_values, num_beams=beams), skip_special_tokens=True)
        assert found == written
    scores = captioner.evaluate(model, processor, data)
    assert scores["all_right"] == scores["ended"] == 1 and scores["hallucinated"] == 0
    data.images.kept["image"] = images.roll(1, dims=0)  # the captions of other images are wrong
    assert captioner.evaluate(model, processor, data)["covered"] < 0.4


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"captions_per_image": 0}, "captions_per_image=0 must be at least 1"),
        ({"conditioning": "first_step", "coverage_weight": 1.0}, "coverage_weight=1.0 needs attention"),
        (
            {"freeze_encoder": True},
            "would leave the random weights of backbone='small_captioner' untrained",
        ),
        ({"model": "me/captions", "pretrained": True}, "pretrained replaces the backbone of model='me/captions'"),
        ({"model": "runs/a", "output_dir": "./runs/a"}, "model='runs/a' is also output_dir, so the run would replace"),
        ({"teacher_forcing_ratio": 2.0}, "teacher_forcing_ratio=2.0 and teacher_forcing_end=-1.0 must be from 0 to 1"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        train_captioner.Args(**flags)


def test_the_experiment_compares_all_conditionings():
    path = ROOT / "scripts/experiments/captions.toml"
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    assert {cell.flags["conditioning"] for cell in experiment.cells("runs")} == set(CONDITIONINGS)
