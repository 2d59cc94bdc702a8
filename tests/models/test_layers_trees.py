import json
import time

import numpy as np
import pytest
import torch

from hf_dl.models.layers_hierarchical import TreeHead
from hf_dl.models.layers_trees import cluster_classes, group_members, huffman_tree, lay_out_tree


def test_a_million_classes_are_laid_out_in_seconds():
    counts = 1 / np.arange(1, 10**6 + 1)
    start = time.process_time()
    branches = huffman_tree(counts)
    layout = lay_out_tree(branches, 10**6)
    assert time.process_time() - start < 20
    depths = np.diff(layout.offset)
    assert depths.max() == 24 and (depths * counts).sum() / counts.sum() == pytest.approx(13.43, abs=0.01)


def test_cluster_classes_puts_similar_classes_together():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 16, generator=generator) * 5
    kind = torch.randperm(32, generator=generator) % 4
    weight = centers[kind] + 0.1 * torch.randn(32, 16, generator=generator)
    tree = cluster_classes(weight)
    assert json.loads(json.dumps(tree)) == tree
    quarters = [set(group_members(quarter)) for half in tree for quarter in half]
    assert [len({int(kind[c]) for c in quarter}) for quarter in quarters] == [1, 1, 1, 1]
    head = TreeHead(4, 32, tree="given", groups=tree)
    assert set(head.depths.tolist()) == {5}
    assert cluster_classes(torch.ones(1, 3)) == [0]
    assert TreeHead(4, 1, tree="given", groups=[0]).log_prob(torch.ones(2, 4)).tolist() == [[0.0], [0.0]]
    assert sorted(group_members(cluster_classes(torch.zeros(7, 3)))) == list(range(7))  # equal weights
