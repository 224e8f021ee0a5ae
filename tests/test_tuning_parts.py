"""The decisions of tuning, without any training: spaces, selection, where to try next, whom to
prune."""

import contextlib
import dataclasses
import socket
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from torch.utils.data import DataLoader

from dact.calibration.answers import layer_answers
from dact.factories import DataFactory
from dact.tuning import TuningEngine, retries, studies
from dact.tuning.digests import digest
from dact.tuning.fitting import Deadline, History, make_trainer
from dact.tuning.outcome import outcome_of
from dact.tuning.retries import CAUSE, DEATHS, INTERRUPTED, OWNER, RETRY_OF
from dact.tuning.run import Run, Winners
from dact.tuning.search import LagPruner
from dact.tuning.stages import LAMBDA_REG, SUBMODELS, TRAINING
from dact.tuning.storage import open_storage, stopped_by
from dact.tuning.trial import _recorded_cause
from dact.tuning.trial_loop import TrialFailed, run_trials
from dact.tuning.workers import StudyJob, check_workers
from tests.conftest import random_batch, tiny_model

optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_trainers_of_a_run_share_no_strategy():
    """A Trainer gives its strategy what only one may give it."""
    given = {"strategy": SingleDeviceStrategy("cpu"), "accelerator": "cpu"}
    made = [make_trainer(given, enable_checkpointing=False) for _ in range(2)]
    assert made[0].strategy is not made[1].strategy


def test_numbers_of_numpys_have_the_digest_of_their_value():
    assert digest({"halting_tolerance": np.float32(0.5)}) == digest({"halting_tolerance": 0.5})


def test_a_trainer_of_a_run_has_its_own_progress_and_checkpoints():
    given = [ModelCheckpoint(), RichProgressBar(), LearningRateMonitor(), EarlyStopping("val_loss")]
    kinds = {
        type(one)
        for one in make_trainer({"callbacks": given}, enable_checkpointing=False).callbacks
    }
    assert EarlyStopping in kinds
    assert not kinds & {ModelCheckpoint, RichProgressBar, LearningRateMonitor}


@pytest.mark.parametrize(
    ("devices", "kept"), [("auto", 1), (1, 1), ("1", "1"), ([3], [3]), ("2,", "2,")]
)
def test_a_trial_runs_on_one_device(devices, kept):
    assert TuningEngine(trainer={"devices": devices}).recipe.trainer["devices"] == kept


@pytest.mark.parametrize(
    "trainer", [{"devices": 2}, {"devices": -1}, {"devices": [0, 1]}, {"num_nodes": 2}]
)
def test_more_devices_for_a_trial_are_refused(trainer):
    with pytest.raises(ValueError, match="a trial runs on one device of one node"):
        TuningEngine(trainer=trainer)


def test_a_new_winner_ends_those_that_were_found_under_the_old_one(tmp_path):
    run = Run("run", tmp_path)
    run.save({"classifier_config": {"num_layers": 1}, "confidence_config": {"num_layers": 1}})
    run.save({"external_config": {"num_epochs": 2}})
    run.save({"lambda_reg": 0.1})
    whole = run.winners()
    assert not run.save({"external_config": {"num_epochs": 2}})
    assert run.winners() == whole
    run.save({"external_config": {"num_epochs": 3}})
    assert run.winners() == dataclasses.replace(
        whole, external_config={"num_epochs": 3}, lambda_reg=None
    )
    run.save({"lambda_reg": 0.2})
    run.save({"classifier_config": {"num_layers": 1}, "confidence_config": {"num_layers": 2}})
    assert [name.split()[0] for name in run.winners().missing()] == [
        "external_config",
        "lambda_reg",
    ]


def test_winners_that_are_written_in_part_are_no_winners(tmp_path, monkeypatch):
    run = Run("run", tmp_path)
    run.save({"classifier_config": {"num_layers": 1}, "confidence_config": {"num_layers": 1}})
    written = []

    def killed_after_one(path, text):
        if written:
            raise KeyboardInterrupt
        written.append(path.write_text(text))

    monkeypatch.setattr("dact.tuning.run.write_text", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        run.save({"classifier_config": {"num_layers": 2}, "confidence_config": {"num_layers": 2}})
    assert "confidence_config" in run.winners().missing()[0]


@pytest.mark.parametrize(
    ("trainer", "gpus", "given"),
    [
        ({"devices": 1}, 3, [[0], [1], [2], [0]]),
        ({"devices": 1, "accelerator": "cuda"}, 2, [[0], [1], [0], [1]]),
        ({"devices": [1]}, 3, [[1]] * 4),
        ({"devices": 1, "accelerator": "cpu"}, 3, [1] * 4),
        ({"devices": 1}, 1, [1] * 4),
    ],
)
def test_workers_take_gpus_of_their_own(trainer, gpus, given):
    recipe = TuningEngine(trainer=trainer).recipe
    assert [recipe.for_worker(worker, gpus).trainer["devices"] for worker in range(4)] == given


# ------------------------------------------------------------------ names and storages


@pytest.mark.parametrize("tag", ["a", "2026-11-23_10-00-00", "run.1", "_x"])
def test_run_tags_are_names(tag):
    assert Run(tag, Path("logs")).folder == Path("logs") / tag


@pytest.mark.parametrize(
    "tag", ["../x", "a/b", "/abs", "..", "a..b", ".hidden", "a b", "x\n", "-x", "a\\b"]
)
def test_run_tags_that_lead_elsewhere_are_refused(tag):
    with pytest.raises(ValueError, match="run_tag must be a name"):
        Run(tag, Path("logs"))


def test_a_storage_that_cannot_be_opened_is_one_clear_error(tmp_path):
    for address in ("nonsense", "sqlite:////no/such/folder/x.db"):
        with pytest.raises(ConnectionError, match="cannot be opened"):
            open_storage(address, tmp_path)


def test_a_question_mark_in_a_path_is_part_of_it(tmp_path):
    folder = tmp_path / "logs?x=1"
    optuna.create_study(study_name="run/x", storage=open_storage(None, folder))
    assert (folder / "studies.db").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["logs?x=1"]


# ------------------------------------------------------------------ winners as values


def test_winners_are_those_of_the_stages_before():
    found = Winners({"dropout": 0.1}, {"dropout": 0.2}, {"num_epochs": 3}, 0.05)
    assert found.before(SUBMODELS).settings() == {}
    submodels = {"classifier": {"dropout": 0.1}, "confidence": {"dropout": 0.2}}
    assert found.before(TRAINING).settings() == submodels
    assert found.before(LAMBDA_REG).settings() == {**submodels, "num_epochs": 3}
    assert found.settings() == {**submodels, "num_epochs": 3, "lambda_reg": 0.05}
    assert found.missing() == []
    assert Winners(external_config={}).missing()[-1] == "lambda_reg (lambda_reg_study)"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lambda_reg", "lambda_reg: much"),
        ("lambda_reg", "0.5"),
        ("classifier_config", "{widths: 3}"),
        ("external_config", "- a\n- b"),
        ("external_config", "{{"),
    ],
)
def test_a_corrupted_winner_is_refused_by_name(tmp_path, name, text):
    run = Run("run", tmp_path)
    run.folder.mkdir()
    (run.folder / f"{name}.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.yaml is corrupted .*delete it"):
        run.winners()


# ------------------------------------------------------------------ trials that ended badly


def opened(folder, identity=None):
    run = Run("run", folder)
    return studies.open_study(run, SUBMODELS, identity or {"data": "x"}, None, LagPruner())


def lock_of(folder):
    return Run("run", folder).locked


def test_a_setting_that_was_not_stored_is_compared(tmp_path):
    opened(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"made with another teacher \(y instead of None\); trials of both would not compare",
    ):
        opened(tmp_path, {"data": "x", "teacher": "y"})


def test_trials_that_somebody_adds_are_welcome(tmp_path):
    study = opened(tmp_path)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    study.enqueue_trial({"x": 0.25})
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study.add_trial(optuna.create_trial(params={"x": 0.5}, distributions=space, value=0.5))
    again = opened(tmp_path)
    again.sampler = study.sampler
    run_trials(again, lambda trial: trial.suggest_float("x", 0, 1), 4, lock_of(tmp_path))
    values = [trial.params["x"] for trial in again.trials]
    assert values[:2] == [0.25, 0.5]
    assert [trial.state for trial in again.trials] == [TrialState.COMPLETE] * 4
    assert min(trial.value for trial in studies.completed(again)) == min(values)


def test_optunas_own_callbacks_may_stop_a_study(tmp_path):
    study = opened(tmp_path)
    stop = optuna.study.MaxTrialsCallback(2, states=(TrialState.COMPLETE,))
    run_trials(
        study, lambda trial: trial.suggest_float("x", 0, 1), 9, lock_of(tmp_path), callbacks=[stop]
    )
    assert len(study.trials) == 2
    assert studies.trials_left(study, 9, None, True) == 0, "the same command adds none"
    assert studies.trials_left(study, 10, None, True) == 8
    run_trials(study, lambda trial: 1.0, 9, lock_of(tmp_path))
    assert len(study.trials) == 2, "another process ends as well"


def test_a_study_that_a_callback_has_stopped_before_it_has_a_value_goes_on(tmp_path):
    study = opened(tmp_path)

    def broken(trial):
        trial.set_user_attr(CAUSE, "the GPU was full")
        raise TrialFailed

    run_trials(study, broken, 4, lock_of(tmp_path), callbacks=[lambda study, trial: study.stop()])
    run_trials(study, lambda trial: 1.0, 4, lock_of(tmp_path))
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, *[TrialState.COMPLETE] * 3]


def test_a_message_of_ones_own_is_not_taken_for_that_of_a_disk():
    own = ValueError("no encoder at pretrained='nobody/nothing'")
    own.__cause__ = OSError("the network is unreachable")
    assert stopped_by(own) is None
    full = RuntimeError("the writer failed")
    full.__cause__ = OSError("No space left on device")
    assert stopped_by(full) is full.__cause__


def test_workers_cannot_be_sent_what_a_notebook_defines(monkeypatch):
    notebook = types.ModuleType("__main__")
    exec("def make_model(**chosen): ...", vars(notebook))
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    with pytest.raises(
        TypeError, match=r"model must be a function that other processes can import.*notebook"
    ):
        check_workers(2, None, model=notebook.make_model)
    notebook.__file__ = __file__
    check_workers(2, None, model=notebook.make_model)


def run_drawing(run_trials, study, objective, *arguments, **options):
    run_trials(study, lambda trial: trial.suggest_float("x", 0, 1), *arguments, **options)


def test_a_seeded_sampler_of_ones_own_gives_the_same_parameters_again(tmp_path, monkeypatch):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        run = Run("run", folder)
        study = studies.open_study(run, SUBMODELS, {}, f"sqlite:///{folder}.db", None)
        studies.start_with(study, [{"x": 0.5}])
        objective = types.SimpleNamespace(run=run, stage=SUBMODELS, deadline=Deadline())
        monkeypatch.setattr("dact.tuning.workers.run_trials", partial(run_drawing, run_trials))
        job = StudyJob(objective, 3, None, RandomSampler(seed=42), None)
        job.run(study, lambda: None)
        found.append([trial.params["x"] for trial in study.trials])
    assert found[0] == found[1]
    assert len({*found[0]}) == 3


@pytest.mark.parametrize(
    "sampler", [optuna.samplers.TPESampler(seed=1), optuna.samplers.NSGAIISampler(seed=1)]
)
def test_a_sampler_of_ones_own_serves_several_studies(tmp_path, monkeypatch, sampler):
    monkeypatch.setattr("dact.tuning.workers.run_trials", partial(run_drawing, run_trials))
    for stage in (SUBMODELS, TRAINING):
        run = Run("run", tmp_path)
        study = studies.open_study(run, stage, {}, f"sqlite:///{tmp_path}/studies.db", None)
        objective = types.SimpleNamespace(run=run, stage=stage, deadline=Deadline())
        StudyJob(objective, 3, None, sampler, None).run(study, lambda: None)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3


def test_a_trial_that_died_before_it_could_say_that_it_failed_is_not_repeated(tmp_path):
    study = opened(tmp_path)
    trial = study.ask()
    trial.set_user_attr(OWNER, [socket.gethostname(), 2**22 + 1, 0.0])
    trial.set_user_attr(CAUSE, "ValueError: nothing")
    retries.sweep(study, lock_of(tmp_path))
    again = opened(tmp_path)
    assert [trial.state.name for trial in again.trials] == ["FAIL"]
    assert len(studies.finished(again)) == 1


def test_a_live_trial_of_this_host_is_not_taken_for_dead(tmp_path):
    study = opened(tmp_path)
    trial = study.ask()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        trial.set_user_attr(OWNER, [socket.gethostname(), other.pid, started])
        assert retries.sweep(study, lock_of(tmp_path)) == []
        other.communicate(b"\n")
    assert [orphan.number for orphan in retries.sweep(study, lock_of(tmp_path))] == [0]


def test_a_trial_without_a_process_is_taken_up_after_a_while(tmp_path, monkeypatch):
    """Its process died between taking it and saying so."""
    study = opened(tmp_path)
    study.ask().suggest_float("x", 0, 1)
    assert retries.sweep(study, lock_of(tmp_path)) == []
    monkeypatch.setattr(retries, "NAMELESS", 0.0)
    assert len(retries.sweep(study, lock_of(tmp_path))) == 1
    assert study.ask().suggest_float("x", 0, 1) == study.trials[0].params["x"]


@pytest.mark.slow
def test_a_silent_process_of_another_host_is_taken_up_by_its_heartbeat(tmp_path):
    study = opened(tmp_path)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    silent, lively = study.ask(), study.ask()
    for trial in (silent, lively):
        trial.set_user_attr(OWNER, ["elsewhere", 1, 0.0])
        trial.suggest_float("x", 0, 1)
        study._storage.record_heartbeat(trial._trial_id)
    assert retries.sweep(study, lock_of(tmp_path)) == []
    study._storage._backend.grace_period = 1
    end = time.monotonic() + 3
    while time.monotonic() < end:
        study._storage.record_heartbeat(lively._trial_id)
        time.sleep(0.2)
    retries.sweep(study, lock_of(tmp_path))
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING", "WAITING"]
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert study.trials[2].user_attrs == {RETRY_OF: silent.number, DEATHS: 1}
    assert study.trials[2].params == silent.params


def test_a_repeat_that_dies_before_it_drew_anything_still_owes_its_parameters(tmp_path):
    study = opened(tmp_path)
    study.ask().suggest_float("x", 0, 1)
    for drawn in ([], ["y"], ["x"]):
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            study.tell(trial.number, state=TrialState.FAIL)
        retries.sweep(study, lock_of(tmp_path))
        trial = study.ask()
        for name in drawn:
            trial.suggest_float(name, 0, 1)
    first, nothing, other, last = study.trials
    assert nothing.params == {}
    assert set(other.params) == {"y"}
    assert last.params["x"] == first.params["x"]
    assert trial.suggest_float("y", 0, 1) == other.params["y"]


def test_parameters_whose_process_died_three_times_are_not_run_again(tmp_path):
    study = opened(tmp_path)
    for _ in range(retries.MAX_DEATHS + 1):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr(OWNER, [socket.gethostname(), 2**22 + 1, 0.0])
        retries.sweep(study, lock_of(tmp_path))
    values = [trial.params["x"] for trial in study.trials if trial.params]
    assert len(set(values[: retries.MAX_DEATHS])) == 1
    assert values[retries.MAX_DEATHS] != values[0]
    assert [trial.number for trial in studies.finished(study)] == [retries.MAX_DEATHS - 1]
    with pytest.raises(
        RuntimeError, match="its process died without a word, 3 times with these parameters"
    ):
        studies.completed(study)


def test_a_process_whose_trial_was_taken_away_continues_with_the_next(tmp_path):
    study = opened(tmp_path)

    def objective(trial):
        value = trial.suggest_float("x", 0, 1)
        with _recorded_cause(trial):
            if trial.number == 0:
                optuna.load_study(study_name=study.study_name, storage=study._storage).tell(
                    0, state=TrialState.FAIL
                )
            trial.report(value, 0)
        return value

    run_trials(study, objective, 2, lock_of(tmp_path))
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert len(studies.finished(opened(tmp_path))) == 2


def test_a_process_whose_trial_was_completed_by_another_continues_with_the_next(tmp_path):
    study = opened(tmp_path)

    def objective(trial):
        value = trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            optuna.load_study(study_name=study.study_name, storage=study._storage).tell(0, 0.5)
        return value

    run_trials(study, objective, 2, lock_of(tmp_path))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert study.trials[0].value == 0.5


def test_processes_do_not_start_more_trials_than_were_asked_for(tmp_path):
    """Another process begins the last trial while this one waits for its turn; then nobody may
    begin one."""
    study, held, others = opened(tmp_path), [], []

    @contextlib.contextmanager
    def turn():
        if len(held) == 4:  # the sweep and the first trial have had their turns
            others.append(study.ask())
        with lock_of(tmp_path)():
            held.append(True)
            yield
            held.append(False)

    class Watched(optuna.samplers.RandomSampler):
        def before_trial(self, *_):
            assert held[-1] or len(held) == 4, "a trial of this process begins in its turn"

    def objective(trial):
        assert not held[-1], "which then is over"
        return 1.0

    study.sampler = Watched()
    run_trials(study, objective, 2, turn, idle=lambda: study.tell(others[0], 0.5))
    assert [trial.value for trial in study.trials] == [1.0, 0.5]


def test_the_last_trial_of_a_study_is_the_retry_of_one_that_another_process_lost(tmp_path):
    """A process that looks between the loss of a trial and its return to the queue waits, and draws
    no new one."""
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'studies.db'}")

    def objective(trial):
        value = trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            other = study.ask()
            other.suggest_float("x", 0, 1)
            other.set_user_attr(INTERRUPTED, True)
            study.tell(other, state=TrialState.FAIL)
        return value

    run_trials(study, objective, 2, lock_of(tmp_path))
    lost, last = study.trials[1:]
    assert last.user_attrs[RETRY_OF] == lost.number
    assert last.params == lost.params
    assert last.state == TrialState.COMPLETE


def test_what_no_run_can_do_is_refused_before_any_work():
    with pytest.raises(ValueError, match="max_epochs of the Trainer must be 1 or more, got 0"):
        TuningEngine(trainer={"max_epochs": 0})
    with pytest.raises(ValueError, match="fast_dev_run writes no checkpoints"):
        TuningEngine(trainer={"fast_dev_run": True})
    made = DataFactory({"class_path": "tests.foreign.MyData", "init_args": {}})
    assert isinstance(made(), LightningDataModule)
    with pytest.raises(
        ValueError, match=r"tests.foreign.MyData must take batch_size, which dact tune sets"
    ):
        made(batch_size=4)


def test_labels_of_32_bits_are_measured_as_any_others(tmp_path):
    batch = random_batch(40)
    short = {**batch, "labels": batch["labels"].int()}
    model, history = tiny_model(), History()
    rows = [{name: tensor[row] for name, tensor in short.items()} for row in range(40)]
    loader = DataLoader(rows, batch_size=16)
    trainer = make_trainer(
        {"max_epochs": 1, "accelerator": "cpu"}, callbacks=[history], enable_checkpointing=False
    )
    trainer.fit(model, loader, loader)
    for answers in (history.answers, layer_answers(model, [short])):
        assert torch.equal(answers.target, batch["labels"])
        assert torch.isfinite(outcome_of(answers, model, None, None).losses).all()
