import json
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from hf_dl.data import captions, phrasecut
from hf_dl.metrics.phrase_segmentation import phrase_segmentation_scores
from hf_dl.models.clip_segmenter import dice_loss
from hf_dl.pipelines.phrase_segmentation import PhraseSegmentationPipeline, highlight
from hf_dl.recipes import clip as clip_recipe
from hf_dl.recipes import clip_data, phrase_images
from hf_dl.recipes import phrase_segmentation as recipe
from hf_dl.reporting.card import read_card
from hf_dl.reporting.experiment import read_experiment
from hf_dl.training.args import parse_args
from scripts import evaluate_phrase_segmentation, train_phrase_segmentation
from tests.models.test_clip_segmenter import TOWER
from tests.scripts.runs import killed_after, reset
from tests.snippets import run_snippet

ROOT = Path(__file__).resolve().parents[2]
IMAGES = "--num_train=32 --num_test=8 --image_size=32 --negatives=0.2".split()
SMALL = "--reduce_dim=8 --num_attention_heads=2 --intermediate_size=8 --layers 0 1".split()
STEPS = "--max_steps=6 --batch_size=8 --phrases_per_image=2 --warmup_steps=0 --eval_every=3 --save_every=3".split()
STEPS += "--log_every=1 --cpu_threads=1".split()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A folder as scripts/train_clip.py writes it, with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    pairs = captions.load("train", num_pairs=16, size=32)
    tokenizer = clip_recipe.make_tokenizer(text for texts in pairs["captions"] for text in texts)
    image_processor = clip_recipe.make_processor(clip_data.ImageCaptions(pairs), tokenizer).image_processor
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 3}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    torch.manual_seed(7)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def train(folder, clip_folder, *flags):
    return train_phrase_segmentation.main(
        [f"--output_dir={folder}", f"--clip={clip_folder}", *IMAGES, *SMALL, *STEPS, *flags]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clip_folder):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "run"
    metrics = train(folder, clip_folder)
    reset()
    yield folder, metrics
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images():
    return phrase_images.PhraseImages(phrasecut.load("test", max_images=8, size=32, negatives=0.2))


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_folder_is_all_that_a_person_needs(finished):
    folder, metrics = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "clip_segmenter.py", "clip_decoders.py", "tokenizer.json", "results.json",
        "README.md", "examples.png", "curves.png",
    }  # fmt: skip
    with Image.open(folder / "examples.png") as picture:
        assert min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 5
    assert read_card(folder / "README.md").data.tags == [
        "hf_dl", "clip", "clipseg", "image-segmentation", "phrase-segmentation"
    ]  # fmt: skip
    assert run_snippet(folder)["masks"].shape[1:] == (32, 32)
    assert json.loads((folder / "results.json").read_text())["metrics"] == metrics


def test_the_scores_are_complete_and_the_threshold_comes_from_validation_images(finished):
    folder, metrics = finished
    for split in ("val", "test"):
        for name in ("miou", "cum_iou", "pr_50", "ap", "false_area", "absent_auroc", "clipseg_miou", "clipseg_ap"):
            assert 0 <= metrics[f"{split}_{name}"] <= 1
    assert metrics["test_threshold"] == metrics["val_threshold"]
    assert json.loads((folder / "config.json").read_text())["threshold"] == metrics["val_threshold"]
    assert metrics["test_seen_phrases"] + metrics["test_unseen_phrases"] == metrics["test_phrases"]
    assert metrics["test_unseen_phrases"] > 0 and "val_unseen_phrases" not in metrics
    lines = [line for line in read_log(folder) if "loss" in line]
    assert len(lines) == 6 and all(line["loss"] == pytest.approx(line["cross_entropy"]) for line in lines)
    assert [line["step"] for line in read_log(folder) if "val_miou" in line] == [3, 6]


def test_the_pipeline_takes_the_folder(finished, images):
    folder, metrics = finished
    pipe = PhraseSegmentationPipeline.from_pretrained(folder, device="cpu")
    assert pipe.model.config.threshold == metrics["val_threshold"]
    picture = Image.fromarray(images[0]["image"].permute(1, 2, 0).numpy())
    [result] = pipe(picture, images.phrases[images.phrase_index[0]])
    processor = CLIPProcessor(image_processor=pipe.image_processor, tokenizer=pipe.tokenizer)
    batch = next(iter(recipe.predict(pipe.model, processor, images)))
    np.testing.assert_allclose(result["probability"], batch["probabilities"][0].numpy(), rtol=1e-3, atol=1e-5)


def test_clip_is_not_changed(finished, clip_folder):
    folder, _ = finished
    before, after = load_file(clip_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(after[f"clip.{name}"], weight) for name, weight in before.items())


def test_evaluating_the_folder_gives_the_same_scores(finished, tmp_path):
    folder, metrics = finished
    found = evaluate_phrase_segmentation.main([f"--model={folder}", f"--output_dir={tmp_path}"])
    assert found["miou"] == pytest.approx(metrics["test_miou"], abs=1e-3)
    assert found["unseen_ap"] == pytest.approx(metrics["test_unseen_ap"], abs=1e-3)
    lines = (tmp_path / "subsets.csv").read_text().splitlines()
    assert lines[0] == "subset,phrases,miou,cum_iou,pr_50,pr_70,pr_90,ap" and lines[1].startswith("all,")
    assert {line.split(",")[0] for line in lines} >= {"seen", "unseen", "p_name", "s_mid"}
    assert (tmp_path / "examples.png").is_file()
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == found


def test_scores_at_the_original_size(finished, tmp_path):
    """Scenes are square, and rendered at 64 pixels by default; the model takes 32."""
    folder, _ = finished
    flags = [f"--model={folder}", f"--output_dir={tmp_path}", "--original_size", "--choose_threshold", "--num_test=4"]
    found = evaluate_phrase_segmentation.main(flags)
    pipe = PhraseSegmentationPipeline.from_pretrained(folder, device="cpu")
    rows = phrasecut.load("test", max_images=4, negatives=0.2)
    maps = [pipe(row["image"], row["phrase"])[0]["probability"] for row in rows]
    masks = [torch.from_numpy(np.array(row["mask"])) for row in rows]
    expected = phrase_segmentation_scores([*map(torch.from_numpy, maps)], masks, threshold=found["threshold"])
    assert masks[0].shape == (64, 64) and found["phrases"] == expected["phrases"]
    assert found["miou"] == pytest.approx(expected["miou"], abs=1e-4)
    assert found["ap"] == pytest.approx(expected["ap"], abs=1e-3)


def test_killed_and_resumed_it_ends_the_same(finished, clip_folder, tmp_path):
    folder, metrics = finished
    with killed_after(4):
        train(tmp_path, clip_folder)
    assert train(tmp_path, clip_folder, "--resume") == metrics
    left, right = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_without_a_cache_the_run_is_nearly_the_same(finished, clip_folder, tmp_path):
    _, metrics = finished
    found = train(tmp_path, clip_folder, "--cache_gb=0", "--save_every=0")
    assert found["test_ap"] == pytest.approx(metrics["test_ap"], abs=0.02)


def test_all_decoders_an_untrained_clip_and_dice(clip_folder, tmp_path):
    one = ["--max_steps=1", "--save_every=0", "--eval_every=0", "--num_train=8", "--num_test=4"]
    for flags in (["--decoder_type=clipseg", "--refined"], ["--decoder_type=deconv", "--untrained_clip"]):
        found = train(tmp_path, clip_folder, *one, *flags, "--dice_weight=0.5")
        reset()
        assert 0 <= found["test_miou"] <= 1
        (line,) = [line for line in read_log(tmp_path) if "loss" in line]
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.5 * line["dice"])
    before, after = load_file(clip_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    name = "visual_projection.weight"
    assert not torch.equal(before[name], after[f"clip.{name}"])


@pytest.mark.parametrize("max_gb", [8.0, 0.0])
def test_masks_and_phrases_of_images(max_gb):
    data = phrasecut.load("test", max_images=4, size=32, negatives=0.2)
    images = phrase_images.PhraseImages(data, max_gb=max_gb)
    batch = images.__getitems__([2, 0])
    rows = [*range(images.first[2], images.first[3]), *range(images.first[1])]
    assert images.rows(batch["index"]).tolist() == rows and len(images) == 4
    for row, mask in zip(rows, batch["masks"], strict=True):
        assert images.phrases[images.phrase_index[row]] == data[row]["phrase"]
        assert np.array_equal(mask.numpy(), np.asarray(data[row]["mask"]) > 0)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), np.asarray(data[rows[0]]["image"]))
    phrases, position, masks = images.pick(batch, torch.tensor([0.0, 0.999]), 2)
    last = images.first[1].item() - 1  # of image 0; the next one is its first phrase again
    chosen = [rows[0], rows[1], last, 0]
    assert phrases.tolist() == images.phrase_index[chosen].tolist() and position.tolist() == [0, 0, 1, 1]
    expected = [np.asarray(data[row]["mask"]) > 0 for row in chosen]
    assert masks.dtype == torch.float32 and np.array_equal(masks.numpy(), np.stack(expected))
    assert torch.equal(images[1]["masks"], images.__getitems__([1])["masks"])


def test_support_images_are_objects_of_the_same_phrase(clip_folder, images, tmp_path):
    args = train_phrase_segmentation.Args(clip=str(clip_folder), image_size=32, layers=[0, 1])
    model, processor = recipe.make_model(args)
    support = phrase_images.SupportImages(model, processor, images)
    pipe = PhraseSegmentationPipeline(model, processor.tokenizer, processor.image_processor)
    item = images[1]
    place = int(item["masks"].amax(dim=(1, 2)).nonzero()[0])
    picture = highlight(Image.fromarray(item["image"].permute(1, 2, 0).numpy()), item["masks"][place].numpy())
    expected = model.encode_prompts(conditional_pixel_values=pipe.prepare(picture, (32, 32)))[0]
    phrase = images.phrase_index[images.first[1] + place]
    first = support.counts[:phrase].sum()
    near = (support.embeds[first : first + support.counts[phrase]] - expected).abs().amax(1)
    assert near.min() < 1e-4 and support.counts.sum() == len(support.embeds) < len(images.phrase_index)

    texts = recipe.embed_phrases(model, processor.tokenizer, images.phrases)
    phrases, draws = phrase.repeat(3), torch.tensor([[0.9, 0, 0.25], [0.1, 0, 0.25], [0.1, 0.999, 0.0]])
    found = support.mix(texts[phrases], phrases, draws, 0.5)
    last = support.embeds[first + support.counts[phrase] - 1]
    torch.testing.assert_close(found[0], texts[phrase])
    torch.testing.assert_close(found[1], 0.25 * texts[phrase] + 0.75 * support.embeds[first])
    torch.testing.assert_close(found[2], last)
    support.counts[phrase] = 0  # a phrase that is false of all images
    torch.testing.assert_close(support.mix(texts[phrases], phrases, draws, 1.0), texts[phrases])

    one = ["--max_steps=1", "--save_every=0", "--eval_every=0", "--num_train=8", "--num_test=4", "--support=1"]
    assert 0 <= train(tmp_path, clip_folder, *one)["test_miou"] <= 1
    reset()


def test_data_with_several_sizes_is_refused():
    data = phrasecut.load("test", max_images=1, size=32)
    rows = [{**row, "mask": row["mask"].resize((16, 16))} for row in data]
    features = {name: data.features[name] for name in ("image_id", "phrase")}
    features = datasets.Features({**features, "image": datasets.Image(), "mask": datasets.Image()})
    rows = datasets.Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)
    with pytest.raises(ValueError, match=r"A mask has shape \(16, 16\). Expected the size of the images, \(32, 32\)"):
        phrase_images.PhraseImages(rows)
    with pytest.raises(ValueError, match="The data has no phrase"):
        phrase_images.PhraseImages(rows.select([]))


def test_the_loss_of_the_script_is_the_loss_of_the_model(clip_folder, images):
    args = train_phrase_segmentation.Args(clip=str(clip_folder), image_size=32, dice_weight=0.5, layers=[0, 1])
    model, processor = recipe.make_model(args)
    batch = images.__getitems__([0, 1])
    phrases, image_index, masks = images.pick(batch, torch.tensor([0.0, 0.5]), 3)
    embeds = recipe.embed_phrases(model, processor.tokenizer, images.phrases)[phrases]
    inputs = images.vision_inputs(batch, processor, "cpu")
    output = model(prompt_embeds=embeds, image_index=image_index, labels=masks, **inputs)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, masks)
    torch.testing.assert_close(output.loss, expected + 0.5 * dice_loss(output.logits, masks))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"clip": "runs/train_clip"}, "clip='runs/train_clip' does not exist. Train it with `scripts/run accelerate"),
        ({"clip": "missing"}, "model='missing' is not a folder"),
        ({"image_size": 30}, "height 30 and width 30. Expected multiples of patch_size=8."),
        ({"layers": [5]}, "must be different blocks of the image tower"),
    ],
)
def test_invalid_flags_of_the_model(flags, sentence, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a missing Hub is tried for a minute
    monkeypatch.chdir(tmp_path)
    args = train_phrase_segmentation.Args(**{"clip": str(clip_folder), "image_size": 32, **flags})
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")):
        recipe.make_model(args)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"phrases_per_image": 0}, "phrases_per_image=0 must be at least 1."),
        ({"accumulation": 2}, "accumulation=2 is not supported"),
        ({"negatives": 1.0}, "negatives=1.0 must be at least 0 and below 1."),
        ({"support": 1.5}, "support=1.5 must be from 0 to 1."),
        ({"cache_gb": -1.0}, "cache_gb=-1.0 must be at least 0."),
        ({"dice_weight": -1.0}, "dice_weight=-1.0 must be at least 0."),
    ],
)
def test_invalid_flags_of_the_training(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_phrase_segmentation.Args(**flags)


def test_the_command_for_phrasecut_is_the_setting_of_the_published_scores():
    """The simple head and the blocks 3, 7 and 9, with batches of 64 phrases."""
    experiment = read_experiment(ROOT / "scripts" / "experiments" / "phrase_segmentation.toml")
    commands = []
    for text in (train_phrase_segmentation.__doc__, experiment.expect):
        lines = text[: text.index("bf16") + 4].partition("VGPhraseCut_v0 --image_size")
        words = shlex.split(f"--source {''.join(lines[1:])}".replace("\\\n", " "))
        args = parse_args(train_phrase_segmentation.Args, words)
        assert (args.decoder_type, args.refined, args.layers) == ("clipseg", False, [3, 7, 9])
        assert (args.batch_size * args.phrases_per_image, args.max_steps, args.learning_rate) == (64, 20000, 1e-3)
        commands.append(sorted(" ".join(words).split(" --")))
    assert commands[0] == commands[1]
