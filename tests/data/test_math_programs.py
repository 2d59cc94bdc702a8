import gzip
import json
import os
import zipfile
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerFast

from hf_dl import programs
from hf_dl.data import math_programs
from hf_dl.data.math_programs import (
    COLUMNS,
    add_number_tokens,
    filter_course,
    load,
    problem_tokenizer,
    program_tokenizer,
    template,
    word_vectors,
)

# In the schema of MathQA; written for these tests.
MATHQA = [
    {
        "Problem": "a cart moves 1,200 m in 4 min . how many m does it move in a min ?",
        "Rationale": "divide",
        "options": "a ) 300 , b ) 1,785 , c ) 16 2 / 3 , d ) none of these , e ) 4 : 5",
        "correct": "a",
        "annotated_formula": "divide(1200, 4)",
        "linear_formula": "divide(n0,n1)|",
        "category": "physics",
    },
    {
        "Problem": "what is the volume of a cube with an edge of 3 cm ?",
        "Rationale": "cube",
        "options": "['a ) 9', 'b ) 27 cm ³', 'c ) 54', 'd ) 81', 'e ) 6']",
        "correct": "b",
        "annotated_formula": "volume_cube(3)",
        "linear_formula": "volume_cube(n0)",
        "category": "geometry",
    },
    {
        "Problem": "what part of 6 pens are 100 pens ?",
        "Rationale": "no",
        "options": "a ) 16 2 / 3 , b ) 2 , c ) 3 , d ) none of these , e ) 4",
        "correct": "d",
        "annotated_formula": "",
        "linear_formula": "divide(n1, n0)",
        "category": "general",
    },
]
COURSE = [{"Problem": "add 2 and 3 .", "linear_formula": "add(n0,n1)|", "answer": 5}]


def write(path, rows):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        json.dump(rows, file)
    return path


@pytest.fixture
def folder(tmp_path):
    def numbered(first, count):
        return [
            MATHQA[0] | {"Problem": f"{word} has {i} pens and {i + 1} books"} for i in range(count) for word in first
        ]

    write(tmp_path / "train.json.gz", MATHQA + numbered(["ann", "bob", "cid", "dan", "eve"], 12))
    write(tmp_path / "dev.json", MATHQA[:1])
    write(tmp_path / "test.json", numbered(["ann", "zoe"], 3))
    return tmp_path


# --- loading ---------------------------------------------------------------------------------------------------------


def test_mathqa_in_its_own_schema(folder):
    dataset = load("train", folder)
    assert dataset.features == COLUMNS and len(dataset) == 63
    assert dataset[0] == {
        "problem": MATHQA[0]["Problem"],
        "text": "a cart moves <n0> m in <n1> min . how many m does it move in a min ?",
        "numbers": [1200, 4],
        "program": "divide(n0,n1)",
        "answer": 300,
        "options": [300, 1785, pytest.approx(50 / 3), None, 0.8],
        "correct": "a",
        "template": "a cart moves <n> m in <n> min . how many m does it move in a min ?",
    }
    assert dataset[2]["answer"] is None and dataset[2]["program"] == "divide(n1,n0)"
    assert load("validation", folder)[0]["text"] == dataset[0]["text"]
    assert load("train", folder, mask_numbers=False)[0]["text"] == MATHQA[0]["Problem"]
    assert load("train", folder / "dev.json")["problem"][:] == [MATHQA[0]["Problem"]]
    stream = load("train", folder, streaming=True, num_problems=2)
    assert isinstance(stream, datasets.IterableDataset) and [row["answer"] for row in stream] == [300, 27]


def test_the_schema_of_the_course(tmp_path):
    row = load("train", write(tmp_path / "train.json", COURSE))[0]
    assert (row["answer"], row["options"], row["correct"], row["program"]) == (5, [], None, "add(n0,n1)")


def test_numbers_of_annotated_problems_are_those_of_their_programs(tmp_path):
    problem = "a man walks 4 ½ km and 24 000 cm in 3 h ."
    row = MATHQA[0] | {"Problem": problem, "linear_formula": "divide(n0,n3)", "options": "a ) 1 ½ , b ) 1 hr 30 min"}
    (found,) = load("train", write(tmp_path / "train.json", [row]))
    assert found["numbers"] == [4, 24, 0, 3] and found["options"] == [1.5, 1.5]
    assert found["text"] == "a man walks <n0> ½ km and <n1> <n2> cm in <n3> h ."
    assert found["template"] == "a man walks <n> ½ km and <n> <n> cm in <n> h ."


def test_the_subset_of_the_course(folder):
    # 27 is not what its checker computes for a cube, and "none of these" no number
    dataset = load("train", folder, subset="course")
    assert "cube" not in " ".join(dataset["problem"]) and None not in dataset["answer"]
    assert [row["Problem"] for row in filter_course(MATHQA)] == [MATHQA[0]["Problem"]]
    other = [MATHQA[0] | {"options": "a ) 1,785", "linear_formula": "divide(n1,n1)"}]  # 1 was read of 1,785
    assert [row["answer"] for row in filter_course(other)] == [1]
    write(folder / "course_train_approx.json", COURSE)  # its own files come first
    assert load("train", folder, subset="course")["answer"][:] == [5]
    assert len(load("train", folder)) == 63
    with pytest.raises(ValueError, match="Row 0 has no text in 'options'. Its columns: "):
        list(filter_course(COURSE))


def test_a_resplit_by_template_is_disjoint(folder):
    parts = {split: load(split, folder, resplit="template", seed=2) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 63 + 1 + 6
    found = [set(part["template"]) for part in parts.values()]
    assert sum(map(len, found)) == len(set().union(*found)) == 9
    other = load("train", folder, resplit="template", seed=1)
    assert set(other["template"]) != set(parts["train"]["template"])


def test_templates_are_texts_without_numbers():
    assert template("The 3 pens cost 1,200 .") == template("the <n0> pens cost <n1> .") == "the <n> pens cost <n> ."
    assert template("if so , then 2,3 is 1,25,000") == template("if so then 5 is 2")


def test_a_hub_id(monkeypatch):
    parts = datasets.DatasetDict(
        train=datasets.Dataset.from_list(MATHQA), validation=datasets.Dataset.from_list(MATHQA)
    )
    monkeypatch.setattr(math_programs.datasets, "load_dataset", lambda name: {"someone/math": parts}[name])
    assert load("validation", "someone/math")["answer"][:] == [300, 27, None]
    assert load("train", "someone/math", subset="course")["answer"][:] == [300]
    assert sum(len(load(s, "someone/math", resplit="template", seed=1)) for s in ("train", "validation")) <= 6
    with pytest.raises(ValueError, match="split='test' is not in 'someone/math'. Its splits: train, validation"):
        load("test", "someone/math")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_formula": "add(n0"}, r"Row 1 of .*x.json' is invalid: #0: 'add\(n0' is not a step"),
        ({"linear_formula": None}, "Row 1 of .* has no text in 'linear_formula'. Its columns: Problem, "),
        ({"options": "none"}, "Row 1 of .* is invalid: 'none' has no options"),
        ({"answer": "five"}, "Row 1 of .* has the answer 'five'. Expected a number"),
        ({"Problem": 5}, "Row 1 of .* has no text in 'Problem'"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    path = write(tmp_path / "x.json", [MATHQA[0], MATHQA[1] | change])
    with pytest.raises(ValueError, match=message.replace("of .*x.json'", "of .*x.json")):
        load("train", path)


def test_datasets_that_the_user_already_has():
    data = datasets.Dataset.from_list(MATHQA)
    for source in (data, datasets.DatasetDict(train=data), data.to_iterable_dataset()):
        assert load("train", source)["answer"][:] == [300, 27, None]
    with pytest.raises(ValueError, match="split='test' is not in 'Dataset'. Its splits: train"):
        load("test", data)


def test_wrong_sources_are_refused(tmp_path):
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "broken.json.gz").write_text("[{")
    write(tmp_path / "other.json", {"train": []})
    write(tmp_path / "empty.json", [])
    for name in ("broken.json", "broken.json.gz"):
        with pytest.raises(ValueError, match="cannot be read as JSON"):
            load("train", tmp_path / name)
    with pytest.raises(ValueError, match="is not a list of rows"):
        load("train", tmp_path / "other.json")
    with pytest.raises(ValueError, match="split='train' of .* has no problems"):
        load("train", tmp_path / "empty.json")
    with pytest.raises(FileNotFoundError, match=r"has no test split. Expected a file \(test\|testing\|eval\).json"):
        load("test", tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist. Expected a folder or a file of MathQA"):
        load("train", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": "dev"},
            "split='dev' is unknown; choose one of train, validation, test, test_seen, test_situations",
        ),
        ({"split": "test_seen", "source": "x"}, "split='test_seen' is unknown; choose one of train, validation, test"),
        ({"subset": "clean"}, "subset='clean' is unknown; choose one of all, course"),
        ({"resplit": "random"}, "resplit='random' is unknown; choose one of none, template"),
        ({"resplit": "template"}, "resplit='template' need a source"),
        ({"num_problems": 0}, "num_problems=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_synthetic_problems_have_the_same_columns():
    dataset = load("test", num_problems=40)
    assert dataset.features == COLUMNS and len(dataset) == 40
    for row in dataset:
        assert programs.execute(row["program"], row["numbers"]) == row["answer"]
        assert programs.mask_numbers(row["problem"]) == (row["text"], row["numbers"])
        assert row["options"]["abcde".index(row["correct"])] == pytest.approx(row["answer"], rel=1e-3)
    assert dataset["problem"][:] == load("test", num_problems=60)["problem"][:40]
    assert dataset["problem"][:] != load("test", num_problems=40, seed=1)["problem"][:]
    known = set(load("train", num_problems=1500)["template"])
    assert known.isdisjoint(load("test", num_problems=300)["template"])
    assert sum(template in known for template in load("test_seen", num_problems=300)["template"]) > 150
    assert load("test", num_problems=3, mask_numbers=False)["text"][:] == dataset["problem"][:3]


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_the_problem_tokenizer_knows_whole_words(tmp_path):
    texts = ["a train of <n0> m , a train of <n1> m .", "the train isn ' t late ?", "3.5 km and 1,200 km ½"]
    made = problem_tokenizer(texts, min_count=1)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer("A train, <n0> or <n25> <n26>: 3.5 km")["input_ids"]
        tokens = "a train , <n0> <unk> <n25> <unk> <unk> 3.5 km".split()
        assert tokenizer.convert_ids_to_tokens(ids) == tokens
        assert tokenizer.pad_token_id == 1 and tokenizer.unk_token_id == 3 and tokenizer.bos_token_id == 0
        assert tokenizer.convert_tokens_to_ids(["<n0>", "<n25>", "train", "a"]) == [4, 29, 30, 31]
        batch = tokenizer(["a", "a train of <n0>"], padding=True, return_tensors="pt")
        assert sorted(batch) == ["attention_mask", "input_ids"] and batch["input_ids"][0].tolist() == [31, 1, 1, 1]
    assert len(problem_tokenizer(texts, min_count=2)) == 30 + len("a train of m km".split())
    assert len(problem_tokenizer([], min_count=2)) == 30
    with pytest.raises(ValueError, match="min_count=0 must be at least 1"):
        problem_tokenizer(texts, min_count=0)


def test_the_program_tokenizer_writes_symbols(tmp_path):
    made = program_tokenizer()
    assert len(made) == 4 + 53 + 32 + 26 + 56
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        vocabulary = tokenizer.get_vocab()
        assert vocabulary.keys() >= {*programs.OPERATIONS, *programs.CONSTANTS, "n0", "n25", "#0", "#55"}
        assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        for text in ("add(n0,const_0_25)|divide(#0,const_3.0)|", "add(n0, const_0_25) | divide(#0, const_3.0)",
                     "add n0 const_0_25 divide #0 const_3.0"):  # fmt: skip
            ids = tokenizer(text)["input_ids"]
            assert ids[-1] == 2 and len(ids) == 7 and 3 not in ids
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert str(programs.from_tokens(decoded.split())) == "add(n0,const_0_25)|divide(#0,const_3.0)"
    for row in load("train", num_problems=100):
        ids = made(row["program"])["input_ids"]
        assert str(programs.from_tokens(made.decode(ids, skip_special_tokens=True).split())) == row["program"]


def test_bert_learns_the_number_tokens():
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a train of m < > n ##0 0".split()
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    before = len(tokenizer)
    assert tokenizer.tokenize("a train of <n0> m") == ["a", "train", "of", "<", "n", "##0", ">", "m"]
    assert add_number_tokens(tokenizer) == 26 and len(tokenizer) == before + 26
    assert tokenizer.tokenize("a train of <n0> m") == ["a", "train", "of", "<n0>", "m"]
    assert add_number_tokens(tokenizer) == 0


# --- word vectors ----------------------------------------------------------------------------------------------------

GLOVE = "the 1 2 3\ntrain 4 5 6\na b 7 8 9\ntrain 0 0 0\n"


def glove_files(tmp_path):
    (tmp_path / "plain.txt").write_text(GLOVE)
    (tmp_path / "header.txt").write_text("4 3\n" + GLOVE)
    with gzip.open(tmp_path / "packed.txt.gz", "wt") as file:
        file.write(GLOVE)
    for name, members in {"one.zip": ["g.txt"], "two.zip": ["g.3d.txt", "g.2d.txt"]}.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.writestr(member, GLOVE if "2d" not in member else "the 1 2\n")
    return [(tmp_path / name, None) for name in ("plain.txt", "header.txt", "packed.txt.gz", "one.zip")] + [
        (tmp_path / "two.zip", 3)
    ]


def test_word_vectors_come_from_a_file(tmp_path, caplog):
    tokenizer = problem_tokenizer(["the train of <n0> m"], min_count=1)
    place = tokenizer.get_vocab()
    for path, dim in glove_files(tmp_path):
        with caplog.at_level("INFO", logger="hf_dl.data.math_programs"):
            vectors, coverage = word_vectors(tokenizer, path, dim=dim)
        assert vectors.shape == (len(tokenizer), 3) and vectors.dtype == torch.float32
        assert coverage == 0.5 and "has 50.0 % of the 4 words" in caplog.text
        assert vectors[place["the"]].tolist() == [1, 2, 3] and vectors[place["train"]].tolist() == [4, 5, 6]
        assert not vectors[tokenizer.pad_token_id].any() and vectors[place["<n0>"]].any()
        known = torch.tensor([1.0, 2, 3, 4, 5, 6])
        unknown = vectors[[i for word, i in place.items() if word not in ("the", "train", "<pad>")]]
        assert unknown.std() == pytest.approx(known.std().item(), rel=0.3)
        assert torch.equal(vectors, word_vectors(tokenizer, path, dim=dim)[0])


def test_without_a_file_they_are_random_and_it_is_said(caplog):
    tokenizer = problem_tokenizer(["the train"], min_count=1)
    vectors, coverage = word_vectors(tokenizer, dim=50, seed=1)
    assert "All 32 word vectors (length 50) are random" in caplog.text
    assert vectors.shape == (32, 50) and coverage == 0 and vectors.std() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(vectors, word_vectors(tokenizer, dim=50, seed=2)[0])
    assert word_vectors(tokenizer)[0].shape == (32, 100)


def test_wrong_files_of_vectors_are_refused(tmp_path):
    tokenizer = problem_tokenizer(["the train"], min_count=1)
    paths = {path.name: path for path, _ in glove_files(tmp_path)}
    (tmp_path / "short.txt").write_text("the 1 2 3\ntrain 1 2\n")
    (tmp_path / "words.txt").write_text("the 1 2 3\ntrain 1 2 three\n")
    for name, dim, message in (
        ("short.txt", None, "Line 2 of .* is not a word with 3 numbers"),
        ("words.txt", None, "Line 2 of .* is not a word with 3 numbers"),
        ("plain.txt", 2, "Line 1 of .* is not a word with 2 numbers. Expected the format of GloVe, and dim as"),
        ("two.zip", None, "dim=None does not select one file of .*. Its files: g.3d.txt, g.2d.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            word_vectors(tokenizer, paths.get(name, tmp_path / name), dim=dim)
    with pytest.raises(FileNotFoundError, match="does not exist. Expected GloVe vectors"):
        word_vectors(tokenizer, tmp_path / "nowhere.txt")


# --- the real data ---------------------------------------------------------------------------------------------------

REAL = os.environ.get("HF_DL_MATHQA", "")
real = pytest.mark.skipif(not REAL, reason="HF_DL_MATHQA does not name a folder of MathQA")


@real
@pytest.mark.slow
@pytest.mark.parametrize(("split", "close", "course"), [("validation", 3024, 2961), ("test", 1985, 1925)])
def test_mathqa_itself(split, close, course):
    def hits(dataset, semantics):
        found = 0
        for row in dataset:
            try:
                value = programs.execute(row["program"], row["numbers"], semantics=semantics)
            except programs.ProgramError:
                continue
            found += programs.is_close(value, row["answer"])
        return found

    assert hits(load(split, REAL), "data") >= close
    official = load(split, REAL, subset="course")
    assert len(official) == course == hits(official, "course")
    name = {"validation": "dev", "test": "test"}[split]
    with gzip.open(Path(REAL) / f"{name}.json.gz", "rt") as file:
        kept = {(row["Problem"], row["answer"]) for row in filter_course(json.load(file))}
    assert kept >= set(zip(official["problem"], official["answer"], strict=True))
