"""Datasets of scenes: shards, the card, and a push to a small Hub that is interrupted and continued."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from hf_dl.data import edited_scenes
from hf_dl.publishing import scene_card, scenes
from hf_dl.publishing.command import main
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[1]
TINY = {"num_scenes": 10, "image_size": 32, "num_objects": (2, 3)}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(scenes, "_SHARD_PIXELS", 4 * 32**2)
    return scenes.SceneRecipe(**TINY)


# ------------------------------------------------------------------------------------------------ shards


def test_shards_are_fixed_ranges_of_rows(recipe):
    assert recipe.split_sizes() == {"train": 10, "validation": 2, "test": 2}
    found = {shard.path: shard.rows for shard in recipe.shards()}
    assert found == {
        "data/train-00000.parquet": range(4),
        "data/train-00001.parquet": range(4, 8),
        "data/train-00002.parquet": range(8, 10),
        "data/validation-00000.parquet": range(2),
        "data/test-00000.parquet": range(2),
    }
    longer = scenes.SceneRecipe(**{**TINY, "num_scenes": 14})
    assert [recipe.describe(s) for s in recipe.shards()[:2]] == [longer.describe(s) for s in longer.shards()[:2]]
    large = scenes.SceneRecipe(num_scenes=20_000, image_size=128)
    assert large.split_sizes() == {"train": 20_000, "validation": 2000, "test": 2000}


def test_default_shards_have_a_moderate_size():
    for size in (32, 64, 128, 200, 256):
        shards = scenes.SceneRecipe(num_scenes=20_000, image_size=size).shards()
        assert all(len(shard.rows) % 2 == 0 and 0 < len(shard.rows) * size**2 <= 2000 * 64**2 for shard in shards)


def test_a_shard_has_the_generated_rows_and_the_same_bytes_each_time(recipe, tmp_path, monkeypatch):
    shard = recipe.shards()[1]
    content, entry = scenes.make_shard(recipe, shard)
    again, _ = scenes.make_shard(recipe, shard)
    assert again == content and entry["bytes"] == len(content) and entry["rows"] == 4
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "shard.parquet").write_bytes(content)
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "shard.parquet"), split="train")
    assert found.features == edited_scenes.FEATURES
    expected = datasets.Dataset.from_list(list(recipe.generate("train", shard.rows)), features=edited_scenes.FEATURES)
    for name in edited_scenes.FEATURES:
        if name.endswith(("image", "mask")):
            for one, other in zip(found[name], expected[name], strict=True):
                assert np.array_equal(np.asarray(one), np.asarray(other))
        else:
            assert found[name][:] == expected[name][:]


def test_statistics_count_every_object(recipe):
    rows = list(recipe.generate("train", range(8)))
    counts = scenes.count_objects(rows, 32)
    objects = sum(len(row["objects"]) for row in rows)
    assert sum(counts.pop("objects").values()) == 8
    assert set(counts) == {"shape", "color", "material", "size", "area"}
    assert all(sum(values.values()) == objects for values in counts.values())
    assert list(counts["area"]) == ["below 0.5 %", "0.5 % to 1 %", "1 % to 2 %", "2 % to 4 %", "4 % to 8 %",
                                    "8 % or more"]  # fmt: skip
    small = sum(r["visible_pixels"] / 32**2 < 0.005 for row in rows for r in row["objects"])
    assert counts["area"]["below 0.5 %"] == small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_scenes": 7}, "num_scenes=7 must be even, because each two neighboring rows exchange an object"),
        ({"num_scenes": 0}, "num_scenes=0 must be at least 1"),
        ({"image_size": 16}, "size=16 must be from 32 to 256"),
        ({"style": "shiny"}, "style='shiny' is unknown"),
        ({"num_objects": (3, 2)}, r"num_objects=\(3, 2\) is invalid"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scenes.SceneRecipe(**options)


# ------------------------------------------------------------------------------------------------ the card


def test_the_card_has_metadata_and_true_counts(recipe):
    manifest = {shard.path: scenes.make_shard(recipe, shard)[1] for shard in recipe.shards()}
    text = scene_card.write_card(recipe, "me/tiny", manifest).decode()
    data = yaml.safe_load(text.split("---")[1])
    assert data["license"] == "apache-2.0" and data["size_categories"] == ["n<1K"]
    assert data["configs"][0]["data_files"][0] == {"split": "train", "path": "data/train-*.parquet"}
    splits = {split["name"]: split["num_examples"] for split in data["dataset_info"]["splits"]}
    assert splits == recipe.split_sizes()
    assert data["dataset_info"]["download_size"] == sum(entry["bytes"] for entry in manifest.values())
    assert {feature["name"] for feature in data["dataset_info"]["features"]} == set(edited_scenes.FEATURES)
    for name in edited_scenes.FEATURES:
        assert f"`{name}`" in text.split("## Columns")[1]
    row = re.search(r"\| scenes by number of objects \| (.+) \|", text)[1]
    assert sum(int(part.split(": ")[1]) for part in row.split(", ")) == 14
    assert "--type dataset --style plain --num_scenes 10 --image_size 32 --num_objects 2 3 --seed 0" in text
    assert 'load_dataset("me/tiny", split="train", streaming=True)' in text and "{{" not in text


@pytest.mark.parametrize(("total", "category"), [(998, "n<1K"), (20_000, "10K<n<100K"), (10**8, "1M<n<10M")])
def test_size_categories(total, category, monkeypatch):
    monkeypatch.setattr(scenes.SceneRecipe, "split_sizes", lambda recipe: {"train": total})
    text = scene_card.write_card(scenes.SceneRecipe(), "me/x", {}).decode()
    assert yaml.safe_load(text.split("---")[1])["size_categories"] == [category]


@pytest.mark.parametrize(("style", "size"), [("plain", 32), ("textured", 160)])
def test_pictures_are_small(style, size):
    recipe = scenes.SceneRecipe(style=style, image_size=size, num_scenes=10)
    files = scene_card.draw_pictures(recipe.generate("train", range(10)))
    assert set(files) == {"scenes.png", "edits.png"}
    for content in files.values():
        assert len(content) < 500_000
        picture = Image.open(io.BytesIO(content))
        assert picture.width > 8 * 128 and np.asarray(picture).std() > 10


# ------------------------------------------------------------------------------------------------ the command


def test_a_dry_run_estimates_and_sends_nothing(capsys, monkeypatch):
    monkeypatch.setattr(scenes, "_SAMPLE", 2)
    monkeypatch.setattr(scenes, "open_repository", None)
    words = ["scenes", "me/scenes", "--type", "dataset", "--num_scenes", "20000", "--image_size", "128"]
    assert main([*words, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "/datasets/me/scenes, branch main" in out and "Nothing was sent" in out
    assert "data/train-00000.parquet to train-00039.parquet (20000 scenes)" in out
    assert "data/test-00000.parquet to test-00003.parquet (2000 scenes)" in out
    assert re.search(r"~[\d.]+ GB  in 48 shards with 24000 scenes; rendering takes about \d+ minutes", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clevr", "me/x", "--type", "dataset"], "publish: dataset='clevr' is unknown. Choose one of: scenes."),
        (["scenes", "me/x", "--type", "dataset", "--num_scenes", "3"], "publish: num_scenes=3 must be even"),
        (["scenes", "me/x", "--type", "dataset", "--style", "shiny"], "publish: style='shiny' is unknown; choose one"),
        (["scenes", "x", "--type", "dataset"], "repo_id='x' is invalid"),
    ],
)
def test_wrong_datasets_are_sentences(words, message, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error and "to continue" not in error


def test_options_of_a_dataset_need_the_type(capsys):
    with pytest.raises(SystemExit):
        main(["runs/x", "me/x", "--num_scenes", "10"])
    assert "--style, --num_scenes, --image_size, --num_objects, --seed need --type dataset" in capsys.readouterr().err


# One process for all calls: the imports take several seconds.
PUSH = """
import json, sys
from hf_dl.publishing import scenes
from hf_dl.publishing.command import main

scenes._SHARD_PIXELS = 4 * 32**2
make_shard, made, told = scenes.make_shard, [], []
def record(recipe, shard):
    made.append(shard.path)
    return make_shard(recipe, shard)
scenes.make_shard = record
head = "scenes me/scenes --type dataset --image_size 32 --num_objects 2 3".split()
for words in json.loads(sys.argv[1]):
    del made[:]
    status = main([*head, *words])
    told.append([status, [path[5:-8] for path in made]])
print(json.dumps(told), file=sys.stderr)
"""

LOAD = """
import sys
import datasets
import numpy as np
from hf_dl.data import edited_scenes, masked_images, scenes

def check(rows, split):
    rows = list(rows)
    options = {"style": "plain", "size": 32, "num_objects": (2, 3), "seed": 0}
    expected = list(edited_scenes.generate(range(len(rows)), split, **options))
    table = datasets.Dataset.from_list(expected, features=edited_scenes.FEATURES)
    for row, other in zip(rows, table, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if name.endswith(("image", "mask")):
                assert row[name].mode == other[name].mode, name
                assert np.array_equal(np.asarray(row[name]), np.asarray(other[name])), name
            else:
                assert row[name] == other[name], name
    return len(rows)

stream = datasets.load_dataset("me/scenes", streaming=True)
assert stream["train"].features == edited_scenes.FEATURES
print({split: check(stream[split], split) for split in stream})
whole = datasets.load_dataset("me/scenes", split="validation", revision="v1")
print(check(whole, "validation"))
row = whole[0]
result = scenes.counterfactual(row, remove=row["removed_index"])
assert np.array_equal(np.asarray(result["image"]), np.asarray(row["removed_image"]))
assert len(masked_images.load("test", "me/scenes", size=32, crop=None)) == 2
"""


def test_an_interrupted_push_is_continued_and_the_rows_come_back(tmp_path, start_fresh):
    def run(code, *args, env):
        return start_fresh(code, *args, cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)})

    train = [f"train-0000{i}" for i in range(3)]
    others = ["validation-00000", "test-00000"]
    calls = [
        ["--num_scenes", "10"],  # the third commit fails
        ["--num_scenes", "10"],  # the rest
        ["--num_scenes", "10", "--tag", "v1"],  # nothing is missing
        ["--num_scenes", "12"],  # only the last shard of the training split is new
        ["--num_scenes", "4", "--seed", "1"],  # everything is new, and two shards are too many
        ["--num_scenes", "12"],
    ]
    with LoopbackHub() as hub:
        hub.failing_commits = {3}
        done = run(PUSH, json.dumps(calls), env=hub.env(tmp_path / "push"))
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(done.stderr.splitlines()[-1])
        assert told == [
            [1, train],
            [0, [train[2], *others]],
            [0, []],
            [0, [train[2]]],
            [0, [train[0], *others]],
            [0, [*train, *others]],
        ]
        assert "Run the same command again to continue. It skips the shards" in done.stderr
        assert "[1/5] data/train-00000.parquet is on the Hub." in done.stdout
        repo = hub.repos["dataset", "me/scenes"]
        tagged = set(hub.files("me/scenes", "v1", type="dataset"))
        pictures = {"README.md", "scenes.png", "edits.png", "manifest.json", ".gitattributes"}
        assert tagged == pictures | {f"data/{name}.parquet" for name in [*train, *others]}
        small = repo.commits[next(sha for sha, message in zip(repo.commits, repo.messages, strict=True)
                                  if len(repo.commits[sha]) == len(pictures) + 3)]  # fmt: skip
        assert {path for path in small if path.startswith("data/")} == {
            f"data/{name}.parquet" for name in [train[0], *others]
        }
        assert repo.messages[1:4] == [f"Add data/{train[0]}.parquet", f"Add data/{train[1]}.parquet",
                                      f"Add data/{train[2]}.parquet"]  # fmt: skip
        assert all(blob.lfs for path, blob in small.items() if path.endswith(".parquet"))

        done = run(LOAD, env=hub.env(tmp_path / "load", token=None))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines() == [str({"train": 12, "validation": 2, "test": 2}), "2"]


def test_a_damaged_manifest_counts_as_empty(tmp_path):
    class Api:
        def hf_hub_download(self, **target):
            return tmp_path / "manifest.json"

    entry = dict.fromkeys(("recipe", "sha256", "bytes", "memory_bytes", "split", "rows", "statistics"), 1)
    for text in ("", "[]", '{"shards": 3}', '{"shards": {"a": null}}', "{}", '{"shards": {"a": {"bytes": 3}}}'):
        (tmp_path / "manifest.json").write_text(text)
        assert scenes.read_manifest(Api(), {}) == {}
    (tmp_path / "manifest.json").write_bytes(scenes.encode_manifest({"a": entry}))
    assert scenes.read_manifest(Api(), {}) == {"a": entry}
