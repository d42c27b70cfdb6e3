"""Models without epochs: what is measured, what is refused, and what their file must be."""

from dataclasses import replace
from math import log2

import numpy as np
import pytest
from small_data import holdout_of, random_users, sequences_of

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Target
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.baselines import baseline_metrics
from sasrec_lab.ops import memory
from sasrec_lab.training.closed_form import check_fits, fit, load_weights, measure, write_weights

DATA = ["dataset=csv", "dataset.path=x.csv"]
MODELS = ["model=ease", "model=itemknn"]
HOLDOUT = holdout_of(random_users(0, users=60, items=30))


def rank_by_definition(dense: np.ndarray, history: set[int], target: int, filter_seen: bool = True) -> int:
    """Return the rank of a target, 0 for an excluded one, by the sum of weights (V, V) from the items of the history.

    Sums in float32 and float64 round apart: what differs by less than 1e-9 counts as equal.
    """
    scores = dense[[item - 1 for item in sorted(history)]].astype(np.float64).sum(0)
    candidates = set(range(1, len(dense) + 1)) - (history if filter_seen else set())
    return sum(scores[item - 1] >= scores[target - 1] - 1e-9 for item in candidates) if target in candidates else 0


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_metrics_equal_those_of_ranks_by_definition(model, filter_seen):
    cfg = load([*DATA, model, f"evaluation.filter_seen={str(filter_seen).lower()}", "evaluation.batch_size=16"])
    weights = fit(cfg.model, HOLDOUT)
    values, columns = measure(weights, SequenceData(HOLDOUT, cfg))
    dense = weights.matrix if isinstance(weights.matrix, np.ndarray) else weights.matrix.toarray()
    for stage in ("val", "test"):
        rows, ranks = HOLDOUT.rows(stage), []
        for start, end, target in zip(rows.starts, rows.ends, rows.targets, strict=True):
            ranks.append(rank_by_definition(dense, set(HOLDOUT.items[start:end].tolist()), target, filter_seen))
        ndcg = np.mean([1 / log2(rank + 1) if 1 <= rank <= 10 else 0 for rank in ranks])
        assert values[f"{stage}/ndcg@10"] == pytest.approx(ndcg, abs=1e-9)
    assert columns["rank"].tolist() == ranks
    assert columns["row"].tolist() == list(range(len(rows)))


@pytest.mark.parametrize("target", [Target.all, Target.successive])
def test_each_of_several_targets_after_a_cut_in_time_is_ranked(target):
    random = np.random.default_rng(0)
    users = random_users(3, users=40, items=25, longest=20)
    times = np.concatenate([np.sort(random.integers(0, 1000, len(user))) for user in users])
    sequences = replace(sequences_of(users), times=889_000_000 + times)
    words = ["dataset.time=t", "dataset.holdout=time", f"dataset.time_split.target={target.name}"]
    cfg = load([*DATA, *words, "model=itemknn", "model.neighbors=5", "evaluation.batch_size=7"])
    dataset = cfg.dataset
    holdout = hold_out(sequences, dataset.windows, dataset.catalogue, 9, dataset.holdout, dataset.time_split)
    weights = fit(cfg.model, holdout)
    values, columns = measure(weights, SequenceData(holdout, cfg))
    rows, dense, ranks = holdout.rows("test"), weights.matrix.toarray(), []
    for row in range(len(rows)):
        history = set(holdout.items[rows.starts[row] : rows.ends[row]].tolist())
        targets, _ = rows.targets_of(np.array([row]))
        ranks += [rank_by_definition(dense, history, target) for target in targets.tolist()]
    assert columns["rank"].tolist() == ranks
    assert len(ranks) > len(set(columns["user"].tolist()))
    baselines = baseline_metrics(SequenceData(holdout, cfg), sequences)
    assert list(baselines) == ["popularity", "recent_popularity", "markov"]
    assert all(metrics.keys() == values.keys() for metrics in baselines.values())


def test_without_validation_only_the_test_is_measured():
    cfg = load([*DATA, "model=ease", "trainer.limit_val_batches=0"])
    values, _ = measure(fit(cfg.model, HOLDOUT), SequenceData(HOLDOUT, cfg))
    assert {name.partition("/")[0] for name in values} == {"test"}


def test_weights_that_no_command_would_read_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**60)
    check_fits(load([*DATA, "model=ease"]), replace(HOLDOUT, item_ids=np.arange(46_340)))
    with pytest.raises(InputError) as caught:
        check_fits(load([*DATA, "model=ease"]), replace(HOLDOUT, item_ids=np.arange(50_000)))
    assert str(caught.value) == (
        "model=ease: the weights between 50,000 items would take 9.3 GiB in the run folder, and no command reads more"
        " than 8.0 GiB; use model=itemknn, or fewer items with a higher dataset.min_item"
    )


def test_a_model_that_does_not_fit_in_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000)
    with pytest.raises(InputError) as caught:
        check_fits(load([*DATA, "model=ease"]), HOLDOUT)
    assert str(caught.value) == (
        "model=ease: the run needs at least 10.5 KiB of memory (10.5 KiB for the weights between 30 items), but 9.8 KiB"
        " are available on cpu; use model=itemknn, or fewer items with a higher dataset.min_item"
    )
    check_fits(load([*DATA, "model=itemknn"]), HOLDOUT)
    with pytest.raises(InputError, match=r"model.neighbors=100: the run needs at least .*; lower it"):
        check_fits(load([*DATA, "model=itemknn"]), replace(HOLDOUT, item_ids=np.arange(1000)))


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_read_back(model, tmp_path):
    weights = fit(load([*DATA, model]).model, HOLDOUT)
    write_weights(tmp_path, weights)
    again = load_weights(tmp_path, HOLDOUT.num_items).matrix
    assert (again != weights.matrix).sum() == 0
    with pytest.raises(InputError, match=r"has weights of 30 items, but .*items.npz lists 31"):
        load_weights(tmp_path, 31)


BROKEN = {
    "not finite": {"weights": np.full((3, 3), np.nan, np.float32)},
    "of another type": {"weights": np.zeros((3, 3))},
    "an item outside": {"values": np.ones(1, np.float32), "items": np.array([3]), "offsets": np.array([0, 1, 1, 1])},
    "a negative item": {"values": np.ones(1, np.float32), "items": np.array([-1]), "offsets": np.array([0, 1, 1, 1])},
    "offsets that fall": {"values": np.ones(1, np.float32), "items": np.array([1]), "offsets": np.array([0, 1, 0, 1])},
    "offsets beyond the entries": {
        "values": np.ones(1, np.float32),
        "items": np.array([1]),
        "offsets": np.array([0, 1, 9, 9]),
    },
    "no offsets": {"values": np.ones(1, np.float32), "items": np.array([1]), "offsets": np.zeros(0, np.int64)},
    "infinite": {"values": np.full(1, np.inf, np.float32), "items": np.array([1]), "offsets": np.array([0, 1, 1, 1])},
    "without items": {"values": np.ones(1, np.float32)},
    "pickled": {"weights": np.array([None])},
}


@pytest.mark.parametrize("arrays", BROKEN.values(), ids=BROKEN)
def test_broken_weights_are_one_line(arrays, tmp_path):
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(InputError, match=r"weights.npz is not a file that a run writes \(.*\); retrain the run"):
        load_weights(tmp_path, 3)


def test_missing_weights_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"weights.npz is missing; retrain the run"):
        load_weights(tmp_path, 3)
