import pytest

from hf_dl.recipes.output_heads import accepted_options, split_head


def test_a_head_is_split_from_its_variant():
    assert split_head("softmax") == ("softmax", "")
    assert split_head("hierarchical:runs/a:b") == ("hierarchical", "runs/a:b")
    with pytest.raises(ValueError, match="head='tree' is unknown. Choose one of: softmax, gumbel"):
        split_head("tree:huffman")


def test_options_that_a_head_lacks_or_that_are_none_are_left_out():
    offered = {"straight_through": True, "cutoffs": None, "div_value": 2.0, "class_counts": [1, 2]}
    assert accepted_options("softmax", offered) == {}
    assert accepted_options("gumbel", offered) == {"straight_through": True}
    assert accepted_options("adaptive", offered) == {"div_value": 2.0, "class_counts": [1, 2]}
