"""The benchmark of the normalizations."""

from hf_dl.models.layers_norm import NORMS
from scripts.benchmarks import norms
from tests.models.toys import ToyNorm


def test_it_measures_every_normalization(monkeypatch):
    monkeypatch.setitem(NORMS, "toy", ToyNorm)
    monkeypatch.setattr(norms, "SHAPES", ((2, 8, 4, 4), (2, 8, 2, 2)))
    monkeypatch.setattr(norms, "peak_of", lambda step: 1.0)  # such small tensors reuse memory
    results = norms.main(["--repetitions=1"])
    assert set(results) == {f"{norm} {shape}" for norm in NORMS for shape in ("2x8x4x4", "2x8x2x2")}
    assert results["toy 2x8x4x4"]["ms"] >= 0 and "ratio" not in results["toy 2x8x4x4"]
    assert results["batch 2x8x4x4"]["largest_difference"] < 1e-5
