"""The output layers in NumPy and float64, with gradients by hand: a loop and a vectorized version of each.

Every function returns the losses (batch,) and the gradients of their sum, in the order of its arguments. Trees come as
paths: for each class a list of (inner node, sign), which is read from nested pairs here, not from the package.
"""

import numpy as np


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def log_softmax(z):
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# --------------------------------------------------------------------------------------------- softmax and Gumbel


def softmax_loop(hidden, weight, bias, labels, noise=None, temperature=1.0):
    """-log softmax((W h + b + noise) / temperature)[label]; dz_c = (p_c - [c = label]) / temperature."""
    losses = np.zeros(len(labels))
    dhidden, dweight, dbias = np.zeros_like(hidden), np.zeros_like(weight), np.zeros_like(bias)
    for n, label in enumerate(labels):
        z = []
        for c in range(len(weight)):
            score = bias[c]
            for i in range(hidden.shape[1]):
                score += weight[c, i] * hidden[n, i]
            z.append((score + (0 if noise is None else noise[n, c])) / temperature)
        largest = max(z)
        total = sum(np.exp(score - largest) for score in z)
        losses[n] = largest + np.log(total) - z[label]
        for c in range(len(weight)):
            dz = (np.exp(z[c] - largest) / total - (c == label)) / temperature
            dhidden[n] += dz * weight[c]
            dweight[c] += dz * hidden[n]
            dbias[c] += dz
    return losses, dhidden, dweight, dbias


def softmax_vectorized(hidden, weight, bias, labels, noise=0.0, temperature=1.0):
    log_prob = log_softmax((hidden @ weight.T + bias + noise) / temperature)
    rows = np.arange(len(labels))
    dz = np.exp(log_prob)
    dz[rows, labels] -= 1
    dz /= temperature
    return -log_prob[rows, labels], dz @ weight, dz.T @ hidden, dz.sum(0)


def straight_through_vectorized(hidden, weight, bias, labels, noise, temperature):
    """1 - [argmax = label] forward; the gradient of -softmax((z + noise) / temperature)[label]."""
    perturbed = (hidden @ weight.T + bias + noise) / temperature
    prob, rows = np.exp(log_softmax(perturbed)), np.arange(len(labels))
    of_label = prob[rows, labels][:, None]
    dz = of_label * prob  # -dp_label/dz_c = p_label p_c - [c = label] p_label
    dz[rows, labels] -= of_label[:, 0]
    dz /= temperature
    return (perturbed.argmax(1) != labels).astype(float), dz @ weight, dz.T @ hidden, dz.sum(0)


# --------------------------------------------------------------------------------------------- binary tree


def paths_of(tree, num_classes):
    """Paths of nested pairs such as ((0, 1), 2): {class: [(node, sign), ...]}; nodes numbered level by level."""
    paths, level, number = {}, [(tree, [])], 0
    if num_classes == 1:
        return {0: []}
    while level:
        below = []
        for node, path in level:
            for child, sign in zip(node, (1, -1), strict=True):
                longer = [*path, (number, sign)]
                if isinstance(child, int):
                    paths[child] = longer
                else:
                    below.append((child, longer))
            number += 1
        level = below
    return paths


def huffman_pairs(counts):
    """Build a Huffman tree as nested pairs: join the two lightest trees until one tree is left."""
    trees = [(count, place, place) for place, count in enumerate(counts)]
    place = len(trees)
    while len(trees) > 1:
        trees.sort(key=lambda tree: tree[:2])
        (w0, _, left), (w1, _, right) = trees[:2]
        trees = [*trees[2:], (w0 + w1, place, (left, right))]
        place += 1
    return trees[0][2]


def tree_loop(hidden, weight, bias, labels, paths):
    """sum_l softplus(-s_l z_l) over the path of the label; dz = -s sigmoid(-s z)."""
    losses = np.zeros(len(labels))
    dhidden, dweight, dbias = np.zeros_like(hidden), np.zeros_like(weight), np.zeros_like(bias)
    for n, label in enumerate(labels):
        for node, sign in paths[label]:
            z = bias[node]
            for i in range(hidden.shape[1]):
                z += weight[node, i] * hidden[n, i]
            losses[n] += np.logaddexp(0, -sign * z)
            dz = -sign * sigmoid(-sign * z)
            dhidden[n] += dz * weight[node]
            dweight[node] += dz * hidden[n]
            dbias[node] += dz
    return losses, dhidden, dweight, dbias


def tree_vectorized(hidden, weight, bias, labels, paths):
    """Compute all nodes together. Signs (classes, nodes) are 0 for nodes outside the path, which do not contribute."""
    signs = np.zeros((len(paths), len(weight)))
    for label, path in paths.items():
        for node, sign in path:
            signs[label, node] = sign
    s, z = signs[labels], hidden @ weight.T + bias
    losses = (np.logaddexp(0, -s * z) * (s != 0)).sum(1)
    dz = -s * sigmoid(-s * z)
    return losses, dz @ weight, dz.T @ hidden, dz.sum(0)


# --------------------------------------------------------------------------------------------- two levels


def two_level_loop(hidden, group_weight, group_bias, weight, bias, labels, groups):
    """-log softmax over the groups - log softmax over the classes of the label's group."""
    losses, dhidden = np.zeros(len(labels)), np.zeros_like(hidden)
    gradients = [np.zeros_like(each) for each in (group_weight, group_bias, weight, bias)]
    for n, label in enumerate(labels):
        group = next(g for g, members in enumerate(groups) if label in members)
        members = list(groups[group])
        one, every = hidden[n : n + 1], np.array([members.index(label)])
        first = softmax_loop(one, group_weight, group_bias, [group])
        second = softmax_loop(one, weight[members], bias[members], every)
        losses[n] = first[0][0] + second[0][0]
        dhidden[n] = first[1][0] + second[1][0]
        gradients[0] += first[2]
        gradients[1] += first[3]
        for place, member in enumerate(members):
            gradients[2][member] += second[2][place]
            gradients[3][member] += second[3][place]
    return losses, dhidden, *gradients


def two_level_vectorized(hidden, group_weight, group_bias, weight, bias, labels, groups):
    group_of = np.empty(len(weight), dtype=int)
    for number, members in enumerate(groups):
        group_of[list(members)] = number
    rows, group = np.arange(len(labels)), group_of[labels]
    outer = log_softmax(hidden @ group_weight.T + group_bias)
    scores = np.where(group_of == group[:, None], hidden @ weight.T + bias, -np.inf)
    inner = log_softmax(scores)
    douter, dinner = np.exp(outer), np.exp(inner)
    douter[rows, group] -= 1
    dinner[rows, labels] -= 1
    dhidden = douter @ group_weight + dinner @ weight
    losses = -outer[rows, group] - inner[rows, labels]
    return losses, dhidden, douter.T @ hidden, douter.sum(0), dinner.T @ hidden, dinner.sum(0)


# --------------------------------------------------------------------------------------------- adaptive


def adaptive_loop(hidden, head, tails, labels, cutoffs, order):
    """Grave et al. 2017. `order` holds the classes by falling frequency; tails are (projection, output) weights."""
    edges = [*cutoffs, len(order)]
    losses, dhidden, dhead = np.zeros(len(labels)), np.zeros_like(hidden), np.zeros_like(head)
    dtails = [(np.zeros_like(p), np.zeros_like(o)) for p, o in tails]
    for n, label in enumerate(labels):
        rank = list(order).index(label)
        tail = sum(rank >= cutoff for cutoff in cutoffs) - 1  # -1: in the head
        target = rank if tail < 0 else cutoffs[0] + tail
        one = hidden[n : n + 1]
        loss, dh, dw, _ = softmax_loop(one, head, np.zeros(len(head)), [target])
        losses[n], dhead = loss[0], dhead + dw
        dhidden[n] = dh[0]
        if tail >= 0:
            projection, output = tails[tail]
            assert len(output) == edges[tail + 1] - edges[tail]
            inside = one @ projection.T
            loss, dinside, doutput, _ = softmax_loop(inside, output, np.zeros(len(output)), [rank - cutoffs[tail]])
            losses[n] += loss[0]
            dhidden[n] += dinside[0] @ projection
            dtails[tail][0][:] += dinside.T @ one
            dtails[tail][1][:] += doutput
    return losses, dhidden, dhead, *(each for pair in dtails for each in pair)


def adaptive_vectorized(hidden, head, tails, labels, cutoffs, order):
    edges, ranks = np.array([*cutoffs, len(order)]), np.argsort(order)[labels]
    tail = np.searchsorted(cutoffs, ranks, side="right")
    target = np.where(tail == 0, ranks, cutoffs[0] + tail - 1)
    losses, dhidden, dhead, _ = softmax_vectorized(hidden, head, np.zeros(len(head)), target)
    gradients = []
    for i, (projection, output) in enumerate(tails):
        rows = (tail == i + 1).nonzero()[0]
        inside = hidden[rows] @ projection.T
        loss, dinside, doutput, _ = softmax_vectorized(inside, output, np.zeros(len(output)), ranks[rows] - edges[i])
        losses[rows] += loss
        dhidden[rows] += dinside @ projection
        gradients += [dinside.T @ hidden[rows], doutput]
    return losses, dhidden, dhead, *gradients
