import json

import datasets

from hf_dl.recipes import seq2seq_evaluation

ROWS = [
    {"problem": "3 pens for 4", "template": "a", "program": "multiply(n0,n1)|", "numbers": [3.0, 4.0], "answer": 12.0},
    {"problem": "3 and 4", "template": "b", "program": "add(n0,n1)|", "numbers": [3.0, 4.0], "answer": 7.0},
]


def test_templates_of_training_are_seen():
    data = datasets.Dataset.from_list(ROWS)
    seen = seq2seq_evaluation.find_seen(data.select([1]), data)
    assert seen == [False, True]
    assert seq2seq_evaluation.problem_counts("test_", [*seen, True]) == {
        "test_problems": 3, "test_problems_without_seen": 1, "test_problems_without_unseen": 2,
    }  # fmt: skip


def test_predictions_say_whether_the_value_is_right(tmp_path):
    written, data = ["multiply(n0,n1)|", "multiply(n0,|"], datasets.Dataset.from_list(ROWS)
    seq2seq_evaluation.write_predictions(tmp_path, "test", written, data, [False, True], "data")
    lines = [json.loads(line) for line in (tmp_path / "predictions_test.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [12.0, None]
    assert [line["right"] for line in lines] == [True, False] and [line["seen"] for line in lines] == [False, True]
    assert lines[1]["predicted"] == "multiply(n0,|" and lines[1]["program"] == "add(n0,n1)|"
