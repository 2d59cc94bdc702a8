"""The script for labels of sequences, its data, and its experiment file."""

import gzip
import json
import random
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline

from hf_dl.data import labeled_texts, motion, rewriting, word_vectors
from hf_dl.data.scenes import visible_scenes
from hf_dl.recipes import sequence_classifier
from hf_dl.reporting.experiment import read_experiment
from hf_dl.training.batches import Share, batches
from scripts import run_experiment, train_sequence_classifier
from tests.scripts.runs import reset

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
SMALL = "--num_train=64 --num_test=20 --batch_size=16 --hidden_size=12 --embedding_size=8 --save_every=0".split()


def train(folder, *flags):
    metrics = train_sequence_classifier.main([f"--output_dir={folder}", *SMALL, "--cpu_threads=1", *flags])
    reset()
    return metrics


def test_a_pipeline_reads_a_run_on_reviews(tmp_path):
    metrics = train(tmp_path, "--epochs=2")
    pipe = pipeline("text-classification", model=str(tmp_path), device="cpu")
    texts = labeled_texts.load("test", num_rows=20)
    names = texts.features["label"].names
    found = [each["label"] for each in pipe(list(texts["text"]))]
    right = [name == names[label] for name, label in zip(found, texts["label"], strict=True)]
    assert sum(right) / 20 == pytest.approx(metrics["test_accuracy"])
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == metrics
    assert "## Results" in (tmp_path / "README.md").read_text()


def test_word_vectors_are_copied_into_the_embedding(tmp_path, monkeypatch):
    monkeypatch.setattr(sequence_classifier, "write_report", lambda args, folder: None)
    texts = labeled_texts.load("train", num_rows=64)["text"]
    words = sorted({word for text in texts for word in text.split()} - {"but"})
    random.seed(0)
    rows = {word: [round(random.gauss(0, 1), 3) for _ in range(8)] for word in [*words, "zebra", ". . ."]}
    lines = [" ".join([word, *map(str, row)]) for word, row in rows.items()]
    with gzip.open(tmp_path / "vectors.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join([f"{len(rows)} 8", *lines, lines[0].replace("0", "9"), ""]))
    flags = [f"--embeddings={tmp_path / 'vectors.txt.gz'}", "--learning_rate=1e-9", "--max_steps=1"]
    metrics = train(tmp_path / "run", *flags)
    count = sum(text.split().count("but") for text in texts) / sum(len(text.split()) for text in texts)
    assert metrics["known_words"] == pytest.approx(1 - count, abs=0.02)  # a few rare words are <unk>
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()
    weight = model.get_input_embeddings().weight
    for word in set(vocabulary) & set(words):
        torch.testing.assert_close(weight[vocabulary[word]], torch.tensor(rows[word]))
    assert weight[vocabulary["but"]].abs().sum() > 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "good 1 2 3\n",
            "has 3 numbers per word, but 2 were expected. Use vectors of this width, or set embedding_size",
        ),
        (
            "good 1 2\nbad 1\n",
            "Line 2 of 'vectors.txt' is 'bad 1'. Expected a word and 2 numbers, separated by spaces",
        ),
        ("good 1 x\n", "Line 1 of 'vectors.txt' is 'good 1 x'. Expected a word and 2 numbers"),
        ("good 1 nan\n", "Line 1 of 'vectors.txt' is 'good 1 nan'"),
        ("\xff 1 2\n", "'vectors.txt' is not a text file in UTF-8"),
    ],
)
def test_invalid_word_vectors_are_refused_in_a_sentence(content, sentence, tmp_path):
    (tmp_path / "vectors.txt").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=sentence):
        word_vectors.load(tmp_path / "vectors.txt", ["good"], width=2)
    with pytest.raises(FileNotFoundError, match="no.txt' does not exist. Expected a text file with a word"):
        word_vectors.load(tmp_path / "no.txt", ["good"], width=2)


def test_batches_of_similar_length_have_less_padding(monkeypatch):
    found = []

    def count_padding(args, model, data, *, collate, lengths, **options):
        loader = batches(
            data, Share(16), seed=0, collate=collate, lengths=lengths, step=0, position=(0, 0), max_steps=4
        )
        masks = [batch["attention_mask"] for _, batch in loader]
        assert sum(len(mask) for mask in masks) == 64
        found.append(sum(int((mask == 0).sum()) for mask in masks))
        raise InterruptedError

    monkeypatch.setattr(train_sequence_classifier, "TrainingRun", count_padding)
    for flags in ([], ["--group_by_length=false"]):
        with pytest.raises(InterruptedError):
            train("unused", *flags)
    assert found[0] < 0.5 * found[1]


@pytest.mark.parametrize("task", ["frames", "dates", "reversal"])
def test_one_label_per_step(task, tmp_path):
    flags = ["--num_train=20", "--num_test=10"] if task == "frames" else []
    metrics = train(tmp_path, f"--task={task}", "--epochs=1", "--cell=gru", *flags)
    assert 0 <= metrics["test_sequence_accuracy"] <= metrics["test_accuracy"] <= 1
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    if task == "frames":
        assert [model.config.id2label[number] for number in range(4)] == list(motion.MOTIONS)
        return
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = rewriting.load(task, "test", num_rows=1)[0]
    written = sequence_classifier.rewrite(model, tokenizer, row["text"], length=len(row["answer"]))
    assert len(written) == len(row["answer"]) and set(written) <= set(model.config.label2id)
    with pytest.raises(ValueError, match=r"text='\?\?' is empty or has unknown letters: \['\?'\]"):
        sequence_classifier.rewrite(model, tokenizer, "??", length=2)


def test_only_the_order_of_the_words_tells_the_label():
    rng = random.Random(0)
    for _ in range(300):
        text, label = labeled_texts.sample_review(rng)
        last = text.split(" but ")[-1].split(" and ")[0]
        word = last.removesuffix(" .").split()[-1]
        assert ((word in labeled_texts._WORDS[1]) != (" not " in last)) == bool(label)
    data = labeled_texts.load("train", num_rows=200)
    assert 0.4 < sum(data["label"]) / 200 < 0.6


def test_files_with_labels(tmp_path):
    news = tmp_path / "news.csv.gz"
    with gzip.open(news, "wt", encoding="utf-8") as file:
        file.writelines(f'"{number % 4 + 1}","Title {number}","some, text"\n' for number in range(40))
    parts = [labeled_texts.load(split, news) for split in labeled_texts.SPLITS]
    assert [len(part) for part in parts] == [32, 4, 4] and parts[0].features["label"].names == ["1", "2", "3", "4"]
    assert len({text for part in parts for text in part["text"]}) == 40
    row = parts[0][0]
    assert row["text"] == f"Title {(number := int(row['text'].split()[1]))} some, text" and row["label"] == number % 4
    table = tmp_path / "table.csv"
    table.write_text("label,text\n" + "x,a b\ny,c\nx,\n" * 10)
    assert labeled_texts.load("test", table).features["label"].names == ["x", "y"]
    table.write_text("label,text\n" + f"x,{'a long text ' * 100_000}\ny,c\n" + "x,b\n" * 10)
    assert max(map(len, labeled_texts.load("train", table, holdout=0.1)["text"])) == 1_200_000
    given = datasets.Dataset.from_dict({"text": ["a", "b"] * 9, "label": [3, 5] * 9})
    assert labeled_texts.load("train", given, num_rows=4).num_rows == 4
    (tmp_path / "bad.csv").write_text("one\ntwo\n")
    for source, sentence in (
        (tmp_path / "bad.csv", "has 2 rows. Expected a header with text and label"),
        (datasets.Dataset.from_dict({"words": ["a"]}), "has the columns words. Expected text and label"),
    ):
        with pytest.raises(ValueError, match=sentence):
            labeled_texts.load("train", source)
    with pytest.raises(FileNotFoundError, match="Expected a CSV file"):
        labeled_texts.load("train", "/no/such.csv")


def test_tokens_of_texts():
    tokenizer = labeled_texts.build_tokenizer(["A film, a good film.", "good"], min_count=2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("A Good zoo")["input_ids"]) == ["<s>", "a", "good", "<unk>"]
    batch = tokenizer(["good film", ""], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]] and batch["input_ids"][1] == [2, 0, 0]
    with pytest.raises(ValueError, match="max_tokens=3 must be at least 4"):
        labeled_texts.build_tokenizer(["a"], max_tokens=3)


def test_the_label_of_a_frame_is_the_motion_to_the_next_one():
    [(scene, _)] = visible_scenes([0], "train", "plain", 32, (1, 1), 0)
    seen = set()
    for seed in range(20):
        scenes, labels = motion.move(scene, 12, random.Random(seed))
        assert len(scenes) == len(labels) == 12 and labels[-1] == labels[-2]
        for before, after, label in zip(scenes, scenes[1:], labels, strict=False):
            step = [b - a for a, b in zip(before.objects[0].position, after.objects[0].position, strict=True)]
            assert tuple(round(value, 9) for value in step[:2]) == motion.VELOCITIES[motion.MOTIONS[label]]
            seen.add(motion.MOTIONS[label])
    assert seen == set(motion.MOTIONS)
    data = motion.load("test", num_videos=2, num_frames=4).with_format("numpy")
    assert data[0]["frames"].shape == (4, 32, 32, 3) and data.features["frames"].dtype == "uint8"
    with pytest.raises(ValueError, match="num_frames=3 must be from 4 to 1000"):
        motion.load("test", num_frames=3)


def test_texts_to_rewrite():
    for row in rewriting.load("dates", "test", num_rows=50):
        year, month, day = row["answer"].split("-")
        assert year in row["text"] and str(int(day)) in row["text"]
        assert str(int(month)) in row["text"] or any(name[:3] in row["text"] for name in rewriting._MONTHS)
    assert all(row["text"][::-1] == row["answer"] for row in rewriting.load("reversal", num_rows=20))
    with pytest.raises(ValueError, match="task='sort' is unknown. Choose one of: dates, reversal"):
        rewriting.load("sort")


def test_sequences_of_different_lengths_are_filled():
    rows = [
        {"inputs": torch.tensor([3, 4]), "labels": torch.tensor([1, 0])},
        {"inputs": torch.tensor([5]), "labels": torch.tensor([1])},
    ]
    batch = sequence_classifier.collate(rows)
    assert batch["input_ids"].tolist() == [[3, 4], [5, 0]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[1, 0], [1, -100]]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task=sort"], "task='sort' is unknown. Choose one of: topics, frames, dates, reversal"),
        (["--task=frames", "--source=a.csv"], "source='a.csv' works only with task='topics'"),
        (["--task=dates", "--embeddings=a.txt"], "embeddings='a.txt' works only with task='topics'"),
        (["--cell=qrnn"], "cell='qrnn' is unknown. Choose one of: rnn"),
        (["--max_length=0"], "max_length=0 must be at least 1"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_sequence_classifier.main([f"--output_dir={tmp_path}", *flags])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "others"), [("sequence_shapes", {"train_classifier.py", "train_captioner.py"}), ("topics", set())]
)
def test_the_experiment_files_name_flags_that_there_are(name, others):
    path = EXPERIMENTS / f"{name}.toml"
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    assert {cell.script for cell in experiment.cells("runs")} == {"train_sequence_classifier.py", *others}
