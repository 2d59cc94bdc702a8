import json
import tracemalloc

import pytest

from hf_dl.data.json_records import stream_records

RECORDS = [{"a": 1}, {"b": [1.5, {"c": "}]{,"}], "ü": "é\n\"'"}, {}, {"d": None}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_of_any_layout(tmp_path, chunk, indent):
    path = tmp_path / "x.json"
    for text in (json.dumps(RECORDS, indent=indent), "\ufeff \n" + json.dumps(RECORDS, ensure_ascii=False) + "\n "):
        path.write_text(text, encoding="utf-8")
        assert list(stream_records(path, chunk=chunk)) == RECORDS
    path.write_text(" [ ] ")
    assert list(stream_records(path, chunk=chunk)) == []


def test_the_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "x.json"
    record = {"phrase": "red cube", "Polygons": [[[[x + 0.5, x + 0.25] for x in range(60)]]]}
    path.write_text(json.dumps([record] * 1500))
    assert path.stat().st_size > 1.3e6
    tracemalloc.start()
    try:
        count = sum(1 for _ in stream_records(path, chunk=2**14))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 1500
    assert peak < 2.6e5  # bytes, a fifth of the file


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "ends too early"),
        ("[", "ends too early"),
        ('[{"a": 1}', "ends too early"),
        ('[{"a": 1}, ', "ends too early"),
        ('[{"a": 1', "is damaged or ends too early"),
        ('{"a": 1}', "has '{' in a wrong place"),
        ("[1, 2]", "has '1' in a wrong place"),
        ('[{"a": 1} {"b": 2}]', "has '{' in a wrong place"),
        ('[{"a": 1},]', "has ']' in a wrong place"),
        ('[{"a": 1}] x', "has 'x' in a wrong place"),
        ('[{"a" 1}]', "is damaged"),
        ("<html>", "has '<' in a wrong place"),
    ],
)
def test_damaged_files(tmp_path, text, match):
    path = tmp_path / "refer_test.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"refer_test.json {match}.* Expected a JSON list of objects. Copy"):
        list(stream_records(path, chunk=4))


def test_a_file_in_another_encoding(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match="x.json is not UTF-8 text"):
        list(stream_records(path))
