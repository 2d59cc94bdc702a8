import json

from scripts.benchmarks import beam_search


def test_the_benchmark_runs_and_all_searches_find_the_same(tmp_path):
    path = tmp_path / "speed.json"
    results = beam_search.main(f"--problems=3 --num_beams=3 --steps=6 --repetitions=1 --output={path}".split())
    written = json.loads(path.read_text())
    assert written.pop("same") is True
    assert written == results
    assert set(results) == {"ours", "transformers", "one by one", "ours, by the grammar"}
    assert results["one by one"]["ratio"] > 1 == results["ours"]["ratio"]
