"""Rows to rank: histories, and the targets to find in the list of each. R rows, G targets."""

from dataclasses import dataclass, replace

import numpy as np

from sasrec_lab.data.sequences import concatenate_ranges


@dataclass(frozen=True)
class EvaluationRows:
    """The rows of one stage, "val" or "test", in the order of their users; each has at least one target."""

    users: np.ndarray  # (R,) ascending; a user may have several rows
    starts: np.ndarray  # (R,) the model reads items[start:end] of the holdout, which the user has seen
    ends: np.ndarray  # (R,)
    target_offsets: np.ndarray  # (R + 1,) row r has the targets target_offsets[r] to target_offsets[r + 1] - 1
    targets: np.ndarray  # (G,) int32, distinct in a row; 0 for an item outside the catalogue
    places: np.ndarray  # (G,) the target's interaction among those of the sequences, ascending in a row
    query_times: np.ndarray | None = None  # (R,) when the model is asked, in seconds; None: at the newest item

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_users(self) -> int:
        """Return the number of users who have a row."""
        return int(np.count_nonzero(np.diff(self.users, append=-1)))

    def targets_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the targets of some rows, one row after the other, and the index in `rows` of each."""
        starts, ends = self.target_offsets[rows], self.target_offsets[rows + 1]
        return self.targets[concatenate_ranges(starts, ends)], np.repeat(np.arange(len(rows)), ends - starts)

    def select(self, rows: np.ndarray) -> "EvaluationRows":
        """Return some of the rows, given by their indices."""
        starts, ends = self.target_offsets[rows], self.target_offsets[rows + 1]
        kept = concatenate_ranges(starts, ends)
        offsets = np.append(0, np.cumsum(ends - starts))
        return EvaluationRows(
            self.users[rows],
            self.starts[rows],
            self.ends[rows],
            offsets,
            self.targets[kept],
            self.places[kept],
            None if self.query_times is None else self.query_times[rows],
        )

    def asked_at_targets(self, times: np.ndarray) -> "EvaluationRows":
        """Return the rows, asked when the earliest of their targets was taken; `times` (N,) are of the sequences."""
        return replace(self, query_times=times[self.places[self.target_offsets[:-1]]])
