import json

from scripts.benchmarks import beam_search


def test_the_benchmark_runs_and_all_searches_find_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(beam_search, "get_context", lambda method: NoContext())
    path = tmp_path / "speed.json"
    results = beam_search.main(f"--problems=3 --num_beams=3 --steps=6 --repetitions=1 --output={path}".split())
    assert json.loads(path.read_text()) == results
    assert set(results) == {"ours", "transformers", "one by one", "ours, by the grammar"}
    assert results["one by one"]["ratio"] > 1 == results["ours"]["ratio"]
    assert [results[name]["same"] for name in ("transformers", "one by one")] == [1, 1]


class NoContext:
    """Processes that are this one: starting one takes seconds, and memory is not looked at here."""

    def Pool(self, processes):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def apply(self, function, arguments):
        return function(*arguments)
