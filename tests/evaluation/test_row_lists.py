"""Lists of rows: targets are where their ranks say."""

import numpy as np
import torch

from sasrec_lab.evaluation.row_lists import _insert
from sasrec_lab.ops.ranking import TopK


def test_targets_are_inserted_behind_their_equals():
    """By a sort of all items: scores fall, and among equal ones targets are last and share the last place."""
    random = np.random.default_rng(0)
    for k in (1, 3, 7):
        items, rows = 9, 200
        scores = random.integers(0, 4, (rows, items)).astype(float)
        is_target = random.random((rows, items)) < 0.3
        best, expected, given = [], [], []
        for row in range(rows):
            order = sorted(range(items), key=lambda i: (-scores[row, i], is_target[row, i], i))
            ranks = {i: int((scores[row] >= scores[row, i]).sum()) for i in np.flatnonzero(is_target[row])}
            given += [(row, i + 1, rank, scores[row, i]) for i, rank in ranks.items() if rank <= k]
            others = [i for i in order if not is_target[row, i]]
            best.append([i + 1 for i in others[:k]] + [0] * (k - len(others)))
            # targets whose shared rank is beyond k are not listed; what follows them moves up
            listed = [i for i in order if ranks.get(i, 0) <= k][:k]
            expected.append([(i + 1, ranks.get(i)) for i in listed] + [(0, None)] * (k - len(listed)))
        top = TopK(torch.tensor(best), torch.zeros(rows, k))
        order = random.permutation(len(given))
        found = _insert(top, *(np.array(column)[order] for column in zip(*given, strict=True)))
        for row in range(rows):
            for place, (item, rank) in enumerate(expected[row]):
                at = found.items[row, place]
                if rank is None:
                    assert at == item
                else:  # targets of equal scores come in any order
                    assert is_target[row, at - 1]
                    assert scores[row, at - 1] == scores[row, item - 1]
                assert found.ranks[row, place] == (rank or place + 1)
