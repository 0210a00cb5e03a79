from __future__ import annotations

import torch

from qsm_rl.comparison import first_difference, first_non_finite


def test_the_first_difference_is_named_by_its_path():
    expected = {"a": torch.zeros(2), "b": [1, {"c": "x"}]}
    assert first_difference({"a": torch.ones(2), "b": (1, {"c": "x"})}, expected) is None
    assert first_difference([float("nan")], [float("nan")]) is None
    for found, sentence in [
        ({"a": torch.zeros(3), "b": [2]}, "run.a is float32 (3,), expected float32 (2,)"),
        ({"a": torch.zeros(2).double(), "b": [1, {"c": "x"}]}, "run.a is float64 (2,), expected float32 (2,)"),
        ({"a": torch.zeros(2).to_sparse(), "b": [1, {"c": "x"}]}, "run.a is float32 (2,) sparse_coo, expected"),
        ({"a": 0, "b": [1, {"c": "x"}]}, "run.a is 0, expected float32 (2,)"),
        ({"b": [1, {"c": "x"}]}, "run.a is missing"),
        ({"a": torch.zeros(2), "b": [1, {"c": "x"}], "d": 0}, "run.d is unknown here"),
        ({"a": torch.zeros(2), "b": [1, {"c": "y"}]}, "run.b.1.c is 'y', expected 'x'"),
        ({"a": torch.zeros(2), "b": [1]}, "run.b is [1], expected [1, {'c': 'x'}]"),
        ([], "run is [], expected"),
    ]:
        assert (first_difference(found, expected, "run") or "").startswith(sentence), found


def test_the_first_value_that_is_not_finite_is_named():
    good = {"a": torch.ones(2), "b": [torch.tensor([1, 2]), torch.tensor(True), "nan", None]}
    assert first_non_finite(good) is None
    assert first_non_finite({**good, "c": [torch.tensor([[1.0, float("-inf")]])]}, "state") == "state.c.0 holds -inf"
