import re

import pytest

from hf_dl import programs
from hf_dl.data import word_problems
from hf_dl.data.word_problems import SPLITS, sample, situations, templates

ROWS = {split: [sample(i, split) for i in range(600)] for split in SPLITS}
ALL = [(split, row) for split, rows in ROWS.items() for row in rows]


def operations(row):
    return {step.op for step in programs.parse(row["program"]).steps}


def test_there_is_variety():
    assert len(situations()) >= 40 and len({each.name for each in situations()}) == len(situations())
    assert len(set().union(*(operations(row) for row in ROWS["train"]))) >= 20
    lengths = {len(programs.parse(row["program"])) for _, row in ALL}
    assert lengths == set(range(2, 8)) or lengths == set(range(2, 7))
    assert len({row["template"] for row in ROWS["train"]}) > 300
    assert len({row["problem"] for _, row in ALL}) == len(ALL)


@pytest.mark.parametrize("situation", situations(), ids=lambda each: each.name)
def test_the_sentences_fit_the_program(situation):
    letters = set(re.findall(r"(?<=[(,])[a-z](?=[,)])", situation.program))
    assert letters == set(situation.ranges) and all(low < high for low, high, _ in situation.ranges.values())
    for wording in {w for split in SPLITS for s, ws in templates(split) if s is situation for w in ws}:
        text = " . ".join(wording)
        assert sorted(re.findall(r"\{(\w)\}", text)) == sorted(letters), text
        assert set(re.findall(r"\{(\w\w+)\}", text)) <= {"name", "other", "item", "vehicle"}
        assert not re.search(r"\d", text) and "  " not in text and text == text.lower() and text.isascii()
    assert len(situation.sentences) >= 2 and all(len(set(each)) == len(each) >= 2 for each in situation.sentences)


@pytest.mark.parametrize(("split", "row"), ALL[::10])
def test_a_problem_has_what_it_says(split, row):
    assert programs.extract_numbers(row["problem"]) == row["numbers"]
    assert str(programs.canonical_order(row["program"])) == row["program"]
    assert programs.execute(row["program"], row["numbers"]) == row["answer"] > 0
    assert not re.search(r"[{}\[\]]|  | [.?] .*[.?] [.?]", row["problem"])
    assert len(row["options"]) == 5
    close = [letter for letter, value in zip("abcde", row["options"], strict=True) if
             programs.is_close(value, row["answer"])]  # fmt: skip
    assert close == [row["correct"]]


def test_some_numbers_do_not_matter():
    unused = [len(row["numbers"]) > len(set(re.findall(r"n\d+", row["program"]))) for row in ROWS["train"]]
    assert 0.2 < sum(unused) / len(unused) < 0.4


def test_the_splits_are_disjoint_by_template():
    names = {split: {(s.name, w) for s, ws in templates(split) for w in ws} for split in SPLITS}
    assert names["test_seen"] == names["train"]
    others = [names[split] for split in ("train", "validation", "test", "test_situations")]
    assert sum(map(len, others)) == len(set().union(*others)) and min(map(len, others)) > 15
    # and so they are as texts
    masked = {split: {re.sub(r"\d+(\.\d+)?", "<n>", row["problem"]) for row in rows} for split, rows in ROWS.items()}
    assert not masked["test"] & masked["train"] and not masked["test"] & masked["validation"]
    assert masked["test_seen"] & masked["train"]


def test_new_templates_are_made_of_known_sentences():
    for (situation, train), (_, test) in zip(templates("train"), templates("test"), strict=True):
        for place, wordings in enumerate(situation.sentences):
            assert {wording[place] for wording in train} == set(wordings), situation.name
        assert test
    known = {operation for row in ROWS["train"] for operation in operations(row)}
    assert all(operations(row) <= known for row in ROWS["test_situations"])
    written = {row["program"] for row in ROWS["train"]}
    new = [row["program"] not in written for row in ROWS["test_situations"]]
    assert sum(new) > 0.5 * len(new)


def test_seen_templates_come_with_other_numbers():
    def drawn(row):
        args = [arg for step in programs.parse(row["program"]).steps for arg in step.args]
        return row["template"], tuple(row["numbers"][int(arg[1:])] for arg in args if arg[0] == "n")

    train, test = {drawn(sample(i)) for i in range(4000)}, {drawn(row) for row in ROWS["test_seen"]}
    assert not train & test and len(test) > 500
    assert {template for template, _ in test} & {template for template, _ in train}


def test_a_problem_is_a_function_of_its_arguments():
    assert sample(7, "test", seed=3) == sample(7, "test", seed=3)
    assert sample(7, "test", seed=3) != sample(7, "test", seed=4)
    assert templates("test") is templates("test")
    assert sample(0)["problem"] == sample(0, seed=0)["problem"]
    assert word_problems.SPLITS["train"] == 20_000
