"""Few shapes for many lengths: sequences sorted into length classes, so that a task compiles a handful of programs."""

import math

import numpy as np


def length_classes(lengths: list[int], most: int, multiple: int = 16) -> list[int]:
    """At most `most` lengths, ascending, such that padding every sequence up to the next of them costs least.

    The lengths are multiples of `multiple` (powers of two below it); the largest covers the longest sequence. Exact, by
    dynamic programming over the distinct rounded lengths.
    """
    rounded = [round_up(n, multiple) for n in lengths]
    sizes, counts = np.unique(rounded, return_counts=True)
    if len(sizes) <= most:
        return [int(n) for n in sizes]
    if len(sizes) > 256:  # a coarser grid costs at most 1/256 of the longest
        return length_classes(lengths, most, round_up(-(-int(sizes[-1]) // 256), multiple))
    before = np.concatenate([[0], np.cumsum(counts)])  # sequences among the first i sizes
    cost = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)  # of covering the first i sizes
    cuts = []
    for _ in range(most):
        # [i,j]: sizes i..j-1 padded to sizes[j-1]
        padded = cost[:, None] + np.concatenate([[0], sizes])[None] * (before[None] - before[:, None])
        padded[np.tril_indices(len(sizes) + 1)] = np.inf
        padded[np.arange(len(sizes) + 1), np.arange(len(sizes) + 1)] = cost  # a class left unused
        cuts.append(np.argmin(padded, axis=0))
        cost = np.min(padded, axis=0)
    ends, at = [], len(sizes)
    for cut in reversed(cuts):
        if at and cut[at] != at:
            ends.append(int(sizes[at - 1]))
            at = int(cut[at])
    return ends[::-1]


def round_up(n: int, multiple: int) -> int:
    """To a multiple, or below it to a power of two."""
    if n < multiple:
        return 1 << max(0, math.ceil(math.log2(max(n, 1))))
    return -(-n // multiple) * multiple


def class_of(n: int, classes: list[int]) -> int:
    """The smallest class that holds n tokens."""
    return classes[int(np.searchsorted(classes, n))]


def classes_of_pairs(contexts: list[int], ends: list[int], branches: int) -> tuple[list[int], list[int]]:
    """Length classes of contexts and of their continuations (the longest of each context), of which `branches` follow:
    at most 6 combinations, shared out between the two so that padding costs least."""

    def cost(classes):
        read = sum(class_of(n, classes[0]) for n in contexts)
        return read + branches * sum(class_of(n, classes[1]) for n in ends)

    shares = ((1, 6), (2, 3), (3, 2), (6, 1))
    return min(((length_classes(contexts, a), length_classes(ends, b, 8)) for a, b in shares), key=cost)


def branches_at_once(counts: list[int]) -> int:
    """Continuations that a context is read for at once, at most 8: the number that reads and pads least, a context
    costing about as much as two continuations. Contexts with more are read again, those with fewer padded."""
    return min(range(1, 9), key=lambda most: sum(-(-n // most) for n in counts) * (2 + most))


def batches(items: list, rows: int) -> list[list]:
    """Cuts into equal batches of at most `rows`; the last may be shorter."""
    if not items:
        return []
    size = -(-len(items) // -(-len(items) // max(1, rows)))
    return [items[i : i + size] for i in range(0, len(items), size)]


def pad(rows: list, width: int, count: int, left: bool = False, fill: int = 0) -> np.ndarray:
    """int32 [count,width]: the rows, padded with `fill`, then rows of padding."""
    out = np.full((count, width), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, width - len(row) if left else 0 : width if left else len(row)] = row
    return out
