"""The golden numbers: weights out of names, and digests that notice a difference."""

import doctest

import pytest
import torch
from goldens import GOLDENS

from conformer_src.checks import golden


def test_uniform_numbers_are_those_of_the_authors_of_the_digests():
    assert doctest.testmod(golden).attempted > 0
    assert doctest.testmod(golden).failed == 0


def test_weights_depend_on_name_and_shape_only():
    first = golden.state_dict({"a.weight": [4, 3], "a.bias": [4], "bn.running_var": [4]})
    again = golden.state_dict({"bn.running_var": [4], "a.weight": [4, 3]})
    assert torch.equal(first["a.weight"], again["a.weight"])
    assert first["a.weight"].abs().max() <= 1  # sqrt(3 / fan-in), fan-in 3
    assert first["a.bias"].abs().max() <= 0.1
    assert (first["bn.running_var"] > 0.5).all()


def test_images_do_not_depend_on_the_batch():
    assert torch.equal(golden.image(3, 1, 20, 20)[:2], golden.image(2, 1, 20, 20))


def test_a_rename_leads_to_the_canonical_weights():
    layer = golden.fill_(torch.nn.Linear(3, 4), {"weight": "a.weight", "bias": "a.bias"})
    assert torch.equal(layer.weight, golden.values("a.weight", (4, 3)))
    assert torch.equal(layer.bias, golden.values("a.bias", (4,)))


@pytest.mark.parametrize("place", [0, 5_000, 9_999])
def test_a_change_of_one_element_anywhere_is_noticed(place):
    tensor = golden.values("some.weight", (100, 100)).double()
    expected = golden.digest(tensor)
    assert golden.check(tensor, expected) == 0
    tensor.view(-1)[place] += 1e-4
    with pytest.raises(AssertionError, match="off by"):
        golden.check(tensor, expected)


def test_another_shape_and_nan_are_infinitely_far():
    tensor = torch.ones(4, 4)
    expected = golden.digest(tensor)
    assert golden.deviation(tensor.view(2, 8), expected) == float("inf")
    tensor[0, 0] = float("nan")
    assert golden.deviation(tensor, expected) == float("inf")


def test_files_hold_the_digests_that_the_chapters_compare_with():
    assert {"stem", "conv_1", "patch_embed", "trans_1.patches"} <= set(
        GOLDENS["reduced"]["digests"]
    )
