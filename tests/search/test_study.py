"""The study of a search: who takes which trial, what is proposed again, and journals that are damaged or foreign."""

import json
from types import SimpleNamespace

import pytest

optuna = pytest.importorskip("optuna", minversion="5", reason="needs pip install 'sasrec-lab[search]'")

from optuna.trial import TrialState  # noqa: E402

from sasrec_lab.config.search import check_search  # noqa: E402
from sasrec_lab.errors import InputError, Pruned  # noqa: E402
from sasrec_lab.run.folder import JOURNAL  # noqa: E402
from sasrec_lab.search import trial as trials_module  # noqa: E402
from sasrec_lab.search.pruning import CurvePruning  # noqa: E402
from sasrec_lab.search.study import Study  # noqa: E402

SPACE = ["model.dim=8,16,32,64", "optimizer.lr=tag(log,interval(0.001,0.1))", "model.heads=int(interval(1,4))"]


def open_study(folder, *words) -> Study:
    return Study(check_search([*(words or SPACE), f"hydra.sweep.dir={folder}"]))


def take(study: Study) -> tuple[int, dict]:
    """Take a trial and leave it cut off."""
    with study.taken_trial() as trial:
        return trial.number, study.params(trial)


def run(study: Study, value: float) -> dict:
    with study.taken_trial() as trial:
        params = study.params(trial)
        study.end(trial, TrialState.COMPLETE, value)
    return params


def test_a_trial_that_was_cut_off_is_taken_again(tmp_path):
    study = open_study(tmp_path)
    run(study, 0.1)
    number, params = take(study)
    assert take(open_study(tmp_path)) == (number, params) == (1, params)


def test_a_trial_that_another_process_runs_is_not_taken(tmp_path):
    with open_study(tmp_path).taken_trial() as first, open_study(tmp_path).taken_trial() as second:
        assert (first.number, second.number) == (0, 1)


def test_a_trial_cut_off_between_its_values_gets_the_others(tmp_path):
    study = open_study(tmp_path)
    with study.taken_trial() as trial:
        trial.suggest_categorical("model.dim", ["8", "16", "32", "64"])
        dim = trial.params["model.dim"]
    number, params = take(open_study(tmp_path))
    assert (number, params["model.dim"], set(params)) == (0, dim, {word.partition("=")[0] for word in SPACE})


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_proposals_do_not_depend_on_interruptions(tmp_path, sampler):
    whole, parts = (check_search([*SPACE, f"sampler={sampler}", f"hydra.sweep.dir={tmp_path / n}"]) for n in "wp")
    study = Study(whole)
    expected = [run(study, value / 10) for value in range(15)]
    assert [run(Study(parts), value / 10) for value in range(15)] == expected
    assert len({json.dumps(params) for params in expected}) == 15


def test_a_grid_takes_each_combination_once(tmp_path):
    study = open_study(tmp_path, "model.heads=1,2", "model.dim=range(8,25,8)", "sampler=grid")
    found = [run(study, 0.1) for _ in range(6)]
    assert found == list(study.plan.combinations())
    with study.taken_trial() as trial:
        assert trial is None


@pytest.mark.parametrize(("monitor", "best"), [("val/ndcg@10", 0.5), ("val/loss", 0.25)])
def test_the_best_trial_has_the_highest_metric_or_lowest_loss(tmp_path, monitor, best):
    study = open_study(tmp_path, "model.dim=8,16,32", "trials=10", f"evaluation.monitor={monitor}")
    for value in (0.25, 0.5, 0.375):
        run(study, value)
    assert study.best().value == study._study.best_value == best


def test_equal_values_are_found_among_the_trials_that_ended(tmp_path):
    study = open_study(tmp_path, "model.dim=8,16", "trials=10")
    params = run(study, 0.25)
    assert study.repeated(params).value == 0.25
    assert study.repeated({"model.dim": "4"}) is None


def test_the_record_has_all_trials_and_the_importance(tmp_path):
    study = open_study(tmp_path)
    for _ in range(12):
        with study.taken_trial() as trial:
            params = study.params(trial)
            study.end(trial, TrialState.COMPLETE, params["optimizer.lr"])
    with study.taken_trial() as trial:
        study.params(trial)
        study.end(trial, TrialState.FAIL, error="too large")
    record = json.loads((tmp_path / "search.json").read_text())
    assert [trial["status"] for trial in record["trials"]] == ["finished"] * 12 + ["failed"]
    assert record["trials"][-1]["error"] == "too large"
    assert next(iter(record["importance"])) == "optimizer.lr"
    assert sum(record["importance"].values()) == pytest.approx(1)
    best = study.best()
    assert best.value == max(trial["value"] for trial in record["trials"] if trial["value"])


def test_a_folder_of_another_search_is_refused(tmp_path):
    open_study(tmp_path)
    open_study(tmp_path, *SPACE, "trials=99", "sampler=random", "pruner=none", "data_dir=/elsewhere")
    for other, key in (
        (["model.blocks=1"], "model.blocks differs"),
        (["batch_size=8,16"], "space.batch_size"),
        (["seeds=2"], "seeds differs"),
    ):
        with pytest.raises(InputError, match=rf"holds another search \(.*{key}.*\); choose another hydra.sweep.dir$"):
            open_study(tmp_path, *SPACE, *other)


def test_keys_of_a_section_that_is_searched_must_not_change(tmp_path):
    open_study(tmp_path, "model=tiny,sasrec", "model.dim=8")
    open_study(tmp_path, "model=tiny,sasrec", "model.dim=8")
    with pytest.raises(InputError, match=r"holds another search \(fixed.model.dim differs\); choose another"):
        open_study(tmp_path, "model=tiny,sasrec", "model.dim=16")


def test_a_combination_that_waits_is_not_lost(tmp_path, monkeypatch):
    words = ["model.dim=8,16,32", "sampler=grid"]
    study = open_study(tmp_path, *words)
    with monkeypatch.context() as cut_off:
        cut_off.setattr(study._study, "ask", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(study)
    study = open_study(tmp_path, *words)
    assert [run(study, 0.1)["model.dim"] for _ in range(3)] == ["8", "16", "32"]


def test_a_trial_cut_off_before_its_values_gets_the_same(tmp_path):
    expected = take(open_study(tmp_path / "whole"))
    with open_study(tmp_path / "cut").taken_trial():
        pass
    assert take(open_study(tmp_path / "cut")) == expected


def test_a_search_over_keys_with_defaults_continues(tmp_path):
    """Their defaults are added to records of older versions, which lack such keys."""
    space = ["model.token_dropout=0.0,0.1", "loss.smoothing=interval(0.0,0.2)", "model=tiny,sasrec"]
    first = take(open_study(tmp_path, *space))
    assert take(open_study(tmp_path, *space)) == first


def test_a_torn_line_of_the_journal_is_dropped(tmp_path):
    study = open_study(tmp_path)
    params = run(study, 0.1)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 6, "trial')
    study = open_study(tmp_path)
    assert (study.best().params, run(study, 0.2) != params) == (params, True)
    assert len(open_study(tmp_path).trials()) == 2


@pytest.mark.parametrize("content", [b"hello\nworld\n", b'{"a": 1}\n', b"\x00" * 10 + b"\n", b"[" * 9999 + b"\n{}\n"])
def test_a_foreign_journal_is_refused(tmp_path, content):
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(InputError, match=r"study\.journal is not the journal of a search \(.*choose another hydra"):
        open_study(tmp_path)


def test_values_under_another_protocol_are_refused(tmp_path):
    study = open_study(tmp_path)
    study.check_protocol({"candidates": {"full": 9}, "leak": 0.5})
    open_study(tmp_path).check_protocol({"candidates": {"full": 9}, "leak": None})
    with pytest.raises(InputError, match=r"not that of the earlier trials \(candidates\.full differs\)"):
        study.check_protocol({"candidates": {"full": 8}, "leak": 0.5})


def epoch(callback: CurvePruning, number: int, value: float | None) -> None:
    trainer = SimpleNamespace(current_epoch=number, max_epochs=8, should_stop=False)
    module = SimpleNamespace(validation={} if value is None else {"val/ndcg@10": value})
    callback.on_train_epoch_end(trainer, module)
    assert trainer.should_stop == bool(callback.end)
    if trainer.should_stop:
        callback.on_train_end(trainer, module)


def test_a_curve_below_the_median_of_five_is_stopped(tmp_path):
    study = open_study(tmp_path, *SPACE, "pruner=median")
    for _ in range(5):
        with study.taken_trial() as trial:
            study.params(trial)
            callback = CurvePruning(trial, "val/ndcg@10", "median")
            for number in range(8):
                epoch(callback, number, 0.5)
            study.end(trial, TrialState.COMPLETE, 0.5)
    with study.taken_trial() as trial:
        callback = CurvePruning(trial, "val/ndcg@10", "median")
        for number in range(4):
            epoch(callback, number, 0.4)
        epoch(callback, 4, None)  # without a validation
    resumed = open_study(tmp_path, *SPACE, "pruner=median")  # after the process was killed, from the third epoch
    with resumed.taken_trial() as trial:
        callback = CurvePruning(trial, "val/ndcg@10", "median")
        for number in (2, 3):
            epoch(callback, number, 0.4)
        with pytest.raises(Pruned) as caught:
            epoch(callback, 4, 0.4)
    assert str(caught.value) == "stopped after epoch 5 with val/ndcg@10 0.4000, by pruner=median"


def test_a_trial_worse_on_the_same_seeds_is_stopped(tmp_path, monkeypatch):
    """Of eight seeds four are enough: all are worse than those of the best trial."""
    values = {0: 0.5, 1: 0.4, 2: 0.6}  # by trial
    asked = []

    def train(plan, trial, words, folder, has_curve):
        seed = int(words[-1].removeprefix("seed="))
        asked.append((trial.number, seed))
        assert not has_curve
        return {"protocol": {}, "metrics": {"val/ndcg@10": values[trial.number] + seed / 100}}

    monkeypatch.setattr(trials_module, "_run", train)
    study = open_study(tmp_path, "model.dim=range(8,80,8)", "seeds=8", "pruner=wilcoxon", "seed=2")
    for number in values:
        with study.taken_trial() as trial:
            params = study.params(trial)
            if number == 1:
                with pytest.raises(Pruned, match=r"^stopped after 4 of 8 seeds, by pruner=wilcoxon$"):
                    trials_module.run_trial(study, trial, params)
                study.end(trial, TrialState.PRUNED)
            else:
                value = trials_module.run_trial(study, trial, params)
                assert value == pytest.approx(values[number] + 0.055)
                study.end(trial, TrialState.COMPLETE, value)
    assert [seed for trial, seed in asked if trial == 1] == [2, 3, 4, 5]
    assert len(asked) == 8 + 4 + 8
