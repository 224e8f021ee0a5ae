"""The decisions of tuning, without any training: spaces, selection, where to try next, whom to
prune."""

import contextlib
import dataclasses
import math
import random
import socket
import subprocess
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import optuna
import psutil
import pytest
import torch
from hypothesis import given, settings
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
from dact.submodels import SubmodelConfig
from dact.tuning import TuningEngine, retries, studies, tensorboard
from dact.tuning.digests import digest
from dact.tuning.fitting import Deadline, History, make_trainer
from dact.tuning.outcome import Outcome, outcome_of
from dact.tuning.pruner import PLANNED_EPOCHS, EveryValidation, LagPruner, SameLengthPruner, lags
from dact.tuning.retries import CAUSE, DEATHS, INTERRUPTED, OWNER, RETRY_OF
from dact.tuning.run import Run, Winners
from dact.tuning.sampler import CurveSampler, SeededSampler
from dact.tuning.selection import Point, next_lambda, pareto_front, select_lambda
from dact.tuning.space import (
    DEFAULT_SPACES,
    MORE_DIMENSIONS,
    Dimension,
    build_spaces,
    complete_spaces,
    describe,
)
from dact.tuning.stages import LAMBDA_REG, STAGES, SUBMODELS, TRAINING
from dact.tuning.storage import open_storage, stopped_by
from dact.tuning.trial import _recorded_cause
from dact.tuning.trial_loop import TrialFailed, run_trials
from dact.tuning.workers import StudyJob, check_workers
from tests.conftest import random_batch, tiny_model

optuna.logging.set_verbosity(optuna.logging.ERROR)

# ------------------------------------------------------------------ spaces


@pytest.mark.parametrize("stage", DEFAULT_SPACES)
def test_every_default_dimension_can_be_suggested(stage):
    study = optuna.create_study()
    for _ in range(20):
        trial = study.ask()
        values = {
            name: dimension.suggest(trial, name)
            for name, dimension in DEFAULT_SPACES[stage].items()
        }
        assert trial.params == values
    if stage == "submodels":
        winners = Winners(**SUBMODELS.parse(values))
        assert set(winners.classifier_config) == {"num_layers", "hidden_units", "dropout"}
        SubmodelConfig(**winners.classifier_config)
        SubmodelConfig(**winners.confidence_config)


def test_spaces_are_narrowed_and_replaced():
    spaces = build_spaces(
        {
            "learning_rate": {"high": 1e-4},
            "batch_size": {"type": "int", "low": 8, "high": 64, "step": 8},
        }
    )
    assert spaces["training"]["learning_rate"] == Dimension("float", 2e-5, 1e-4, log=True)
    assert spaces["training"]["batch_size"] == Dimension("int", 8, 64, step=8)
    assert describe(spaces["lambda_reg"]) == describe(DEFAULT_SPACES["lambda_reg"])


def test_more_dimensions_are_searched_where_the_space_names_them():
    assert "classifier_activation" not in build_spaces(None)["submodels"]
    spaces = build_spaces({"classifier_activation": {}, "weight_decay": {"high": 0.01}})
    assert (
        spaces["submodels"]["classifier_activation"]
        == MORE_DIMENSIONS["submodels"]["classifier_activation"]
    )
    assert spaces["training"]["weight_decay"] == Dimension("float", 1e-4, 0.01, log=True)


def test_spaces_hold_what_the_studies_start_from_and_the_layers_of_the_encoder():
    start = {
        "batch_size": 48,
        "learning_rate": 5e-3,
        "exit_loss_weight": 0.35,
        "num_layers": 6,
        "unknown": 1,
    }
    spaces, starts = complete_spaces(build_spaces(None), 6, {"training": [start]})
    training = spaces["training"]
    assert starts["training"] == [
        {name: value for name, value in start.items() if name != "unknown"}
    ]
    assert training["batch_size"].choices == [32, 64, 48]
    assert training["learning_rate"] == Dimension("float", 2e-5, 5e-3, log=True)
    assert training["exit_loss_weight"] == Dimension("float", 0.1, 1.0), "the step would miss it"
    assert training["num_layers"] == Dimension("int", 3, 6)
    study = optuna.create_study()
    study.enqueue_trial({name: start[name] for name in training if name in start})
    trial = study.ask()
    values = {name: dimension.suggest(trial, name) for name, dimension in training.items()}
    assert all(values[name] == start[name] for name in values if name in start)
    given = build_spaces({"num_layers": {"low": 2, "high": 4}})
    assert complete_spaces(given, 3, {})[0]["training"]["num_layers"] == Dimension("int", 2, 3)
    spaces, starts = complete_spaces(given, 6, {"training": [start]}, bounded={"num_layers"})
    assert spaces["training"]["num_layers"] == Dimension("int", 2, 4), "the bounds of the user hold"
    assert "num_layers" not in starts["training"][0]
    with pytest.raises(ValueError, match="low=2 is above the 1 layers"):
        complete_spaces(given, 1, {})
    assert "num_layers" not in complete_spaces(build_spaces(None), 1, {})[0]["training"]
    choices = build_spaces({"num_layers": {"type": "categorical", "choices": [1, 2, 8]}})
    assert complete_spaces(choices, 8, {})[0]["training"]["num_layers"].choices == [1, 2, 8]
    with pytest.raises(
        ValueError,
        match=r"num_layers: choices must be in 1 … 6, the layers of the encoder, got 1, 2, 8",
    ):
        complete_spaces(choices, 6, {})


@pytest.mark.parametrize(
    "change",
    [
        {"lambda_reg": {"high": 1}},
        {"weight_decay": {"type": "float", "low": 0, "high": 0.1}},
        {"classifier_dropout": {"type": "categorical", "choices": [0, 0.3]}},
        {"batch_size": {"type": "int", "low": 8, "high": 64}},
        {"classifier_hidden_units": {"choices": [True, 16]}},
    ],
)
def test_tensorboard_takes_every_space(tmp_path, change):
    dimensions = {
        name: dimension
        for space in build_spaces(change).values()
        for name, dimension in space.items()
    }
    with tensorboard.writer(tmp_path) as writer:
        tensorboard.log_experiment(writer, dimensions)
        tensorboard.log_parameters(
            writer, {"submodel_learning_rate": None, "batch_size": 8}, "run/trial_0000"
        )


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


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"lambda_reg": {"type": "categorical", "choices": [0.1]}},
            ValueError,
            "lambda_reg: must be of type float",
        ),
        (
            {"lambda_reg": {"type": "float", "low": 0.1, "high": 1.0, "step": 0.1}},
            ValueError,
            "without a step",
        ),
        (
            {"speed": {"low": 1}},
            ValueError,
            "unknown parameter 'speed'. The parameters are classifier_num_layers",
        ),
        (
            {"learning_rate": {"lo": 1}},
            ValueError,
            "learning_rate: unknown entry 'lo'; expected type, low",
        ),
        (
            {"learning_rate": {"low": 1.0}},
            ValueError,
            "learning_rate: the range is empty: low=1.0 is above high=0.002",
        ),
        ({"learning_rate": {"low": "small"}}, TypeError, "low must be a number, got 'small'"),
        ({"learning_rate": {"low": 0.0}}, ValueError, "log needs low above 0"),
        ({"learning_rate": 0.1}, TypeError, "expected a mapping"),
        ({"classifier_num_layers": {"high": 2.5}}, TypeError, "high must be an integer, got 2.5"),
        ({"batch_size": {"choices": []}}, ValueError, "needs a list of choices"),
        ({"batch_size": {"low": 1}}, ValueError, "no low, high, step or log"),
        (
            {"lambda_reg": {"type": "real", "low": 0, "high": 1}},
            ValueError,
            "type must be .* got 'real'",
        ),
        (
            {"lambda_reg": {"type": "float", "low": 0.1}},
            TypeError,
            "high must be a number, got None",
        ),
    ],
)
def test_wrong_spaces_are_refused(changes, kind, message):
    with pytest.raises(kind, match=message):
        build_spaces(changes)


# ------------------------------------------------------------------ choosing λ

CURVE = [
    Point(0.001, 0.50, 6.0),
    Point(0.01, 0.501, 5.0),
    Point(0.03, 0.505, 3.0),
    Point(0.05, 0.507, 3.2),  # beaten by the one before
    Point(0.1, 0.60, 2.0),
    Point(1.0, 0.90, 1.0),
]


def test_the_front_leaves_out_what_is_beaten():
    assert [point.layers for point in pareto_front(CURVE)] == [1.0, 2.0, 3.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("rule", "options", "layers"),
    [
        ("one_standard_error", {}, 3.0),
        ("promise", {"allowed": 0.01}, 3.0),
        ("max_loss_increase", {}, 3.0),
        ("max_loss_increase", {"max_loss_increase": 0.0}, 6.0),
        ("max_loss_increase", {"max_loss_increase": 0.25}, 2.0),
        ("knee", {}, 3.0),
        ("max_layers", {"max_layers": 5.5}, 5.0),
        ("max_layers", {"max_layers": 1.0}, 1.0),
    ],
)
def test_every_rule_chooses_as_it_says(rule, options, layers):
    assert select_lambda(CURVE, rule, **options).layers == layers


@pytest.mark.parametrize("rule", ["max_loss_increase", "knee"])
def test_small_equal_and_collapsed_fronts_are_handled(rule):
    one = Point(0.1, 0.5, 3.0)
    assert select_lambda([one], rule) == one
    assert select_lambda([one, Point(0.01, 0.5, 3.0)], rule) == Point(0.01, 0.5, 3.0)
    ends = [Point(0.001, 0.5, 6.0), Point(1.0, 0.9, 1.0)]
    assert select_lambda(ends, rule) == ends[0]
    assert select_lambda([Point(0.1, 0.5, 1.0), Point(0.2, 0.5, 1.0)], rule).lambda_reg == 0.1


def outcome(losses=(), lost=()):
    return Outcome(torch.ones(0), torch.tensor(losses), torch.tensor(lost))


def test_the_promise_decides_by_paired_loss_of_accuracy_plus_one_standard_error():
    def point(layers, lost, examples=400):
        faults = round(lost * examples)
        return Point(
            1 / layers, 0.5, layers, outcome(lost=[1.0] * faults + [0.0] * (examples - faults))
        )

    trials = [point(4.0, 0.0), point(3.0, 0.0025), point(2.0, 0.0075), point(1.0, 0.05)]
    assert select_lambda(trials, "promise", allowed=0.01).layers == 3.0, (
        "0.0075 ± 0.0043 is not within 0.01"
    )
    assert select_lambda(trials, "promise", allowed=0.02).layers == 2.0
    assert select_lambda(trials, "promise", allowed=0.1).layers == 1.0


def test_on_frozen_states_the_promise_is_measured_from_the_most_accurate_trial():
    lost = torch.zeros(400)
    lost[:20] = 1.0  # 5 points below the baseline, all of them, as on the states of frozen mode
    worse = lost.clone()
    worse[20:22] = 1.0
    trials = [
        Point(
            lambda_reg, loss, layers, Outcome(torch.full((400,), layers), torch.zeros(400), values)
        )
        for lambda_reg, loss, layers, values in (
            (0.001, 0.1, 4.0, lost),
            (0.02, 0.2, 3.0, worse),
            (1.0, 0.9, 1.0, torch.ones(400)),
        )
    ]
    assert select_lambda(trials, "promise", allowed=0.01, from_best=True).layers == 3.0, (
        "0.005 ± 0.0035 more"
    )
    assert select_lambda(trials, "promise", allowed=0.01).layers == 4.0, (
        "none is within: one standard error of the loss"
    )


def test_one_standard_error_is_that_of_the_paired_difference():
    noise = [0.4, 0.6] * 50
    best = Point(0.01, 0.5, 4.0, outcome(losses=noise))
    alike = Point(0.1, 0.52, 2.0, outcome(losses=[value + 0.02 for value in noise]))
    scattered = Point(0.2, 0.52, 2.0, outcome(losses=[value + 0.02 for value in reversed(noise)]))
    assert select_lambda([best, alike]).layers == 4.0, "always worse by 0.02"
    assert select_lambda([best, scattered]).layers == 2.0, "0.02 ± 0.02"


def test_an_impossible_budget_names_the_fewest_layers():
    with pytest.raises(ValueError, match="no trial uses at most 0.5 layers; the fewest are 1.00"):
        select_lambda(CURVE, "max_layers", max_layers=0.5)


points = st.builds(Point, st.floats(1e-4, 1), st.floats(0.1, 2), st.floats(1, 6))


@given(st.lists(points, min_size=1, max_size=20))
def test_the_winner_is_never_beaten(trials):
    front = pareto_front(trials)
    for rule in ("one_standard_error", "max_loss_increase", "knee"):
        chosen = select_lambda(trials, rule)
        assert chosen in front
        assert not any(
            p.loss <= chosen.loss
            and p.layers <= chosen.layers
            and (p.loss, p.layers) != (chosen.loss, chosen.layers)
            for p in trials
        )


def layers_at(value, bend=0.05, steep=8):
    """Six layers, falling to one around the bend."""
    return 1 + 5 / (1 + math.exp(steep * math.log(value / bend)))


@settings(max_examples=30)
@given(st.floats(0.005, 0.3))
def test_trials_go_where_the_curve_bends(bend):
    tried = []
    for _ in range(12):
        value = next_lambda(tried, 1e-3, 1.0)
        assert 1e-3 <= value <= 1.0
        tried.append((value, layers_at(value, bend)))
    assert len({value for value, _ in tried}) == 12
    steep = [value for value, layers in tried if 1.05 < layers < 5.95]
    assert len(steep) >= 5
    # As many at random, on the log scale, rarely do so well.
    generator = random.Random(0)
    drawn = [10 ** generator.uniform(-3, 0) for _ in range(1200)]
    assert (
        len(steep) / 12 > 1.3 * sum(1.05 < layers_at(value, bend) < 5.95 for value in drawn) / 1200
    )


def test_a_lambda_outside_of_the_range_does_not_stop_the_search_within_it():
    tried = [(0.02, 6.0), (3.0, 1.0)]
    for _ in range(6):
        value = next_lambda(tried, 1e-3, 1.0)
        tried.append((value, layers_at(value)))
    assert len({value for value, _ in tried}) == 8


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


def test_running_and_failed_trials_are_not_proposed_again():
    tried = [(1e-3, 6.0), (1.0, 1.0), (next_lambda([(1e-3, 6.0), (1.0, 1.0)], 1e-3, 1.0), None)]
    assert next_lambda(tried, 1e-3, 1.0) not in [value for value, _ in tried]


def test_the_sampler_drives_a_study():
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=CurveSampler())
    study.optimize(
        lambda t: (0.5, layers_at(t.suggest_float("lambda_reg", 1e-3, 1, log=True))), n_trials=8
    )
    assert [t.params["lambda_reg"] for t in study.trials[:2]] == [1e-3, 1.0]
    assert len({t.params["lambda_reg"] for t in study.trials}) == 8


# ------------------------------------------------------------------ pruning


def test_lagging_is_relative_to_the_better_half():
    field = [[0.9, 0.5], [0.8, 0.4], [0.85, 0.45], [2.0, 1.9]]
    assert lags([1.9], field, min_finished=3)
    assert not lags([0.92], field, min_finished=3)
    assert not lags([1.9], field[:2], min_finished=3)
    assert not lags([2.5, 0.45], field, min_finished=3), "the best epoch so far counts"


def run_study(pruner, half_of, epochs_of=lambda number: 5, trials=40):
    """A study of scripted curves: half of the trials are bad from the first epoch on."""
    generator = random.Random(0)

    def objective(trial):
        bad = half_of(trial.number)
        epochs = epochs_of(trial.number)
        trial.set_user_attr(PLANNED_EPOCHS, epochs)
        trial.set_user_attr("bad", bad)
        for epoch in range(epochs):
            value = (1.1 if bad else 0.9 * 0.7 ** (epoch * 5 / epochs)) + 0.02 * generator.random()
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=trials)
    return study.trials


def test_the_bad_half_is_pruned_and_none_of_the_other():
    trials = run_study(SameLengthPruner(LagPruner()), lambda number: number % 2 == 1)
    pruned = [t for t in trials if t.state == optuna.trial.TrialState.PRUNED]
    assert all(t.user_attrs["bad"] for t in pruned)
    late_and_bad = [t for t in trials[8:] if t.user_attrs["bad"]]
    assert all(t in pruned for t in late_and_bad)
    assert all(len(t.intermediate_values) < 5 for t in pruned)


def test_a_trial_is_compared_only_with_trials_of_its_length():
    """Short trials are ahead at every epoch, since their learning rate falls sooner; long ones must
    survive them."""
    lengths = {0: 3, 1: 8}

    def epochs_of(number):
        return lengths[number % 2]

    trials = run_study(SameLengthPruner(LagPruner()), lambda number: False, epochs_of)
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in trials)
    alone = run_study(LagPruner(), lambda number: False, epochs_of)
    assert any(t.state == optuna.trial.TrialState.PRUNED for t in alone), (
        "which is why the wrapper is there"
    )


def test_any_pruner_of_optuna_can_be_wrapped():
    for pruner in (
        optuna.pruners.MedianPruner(n_startup_trials=2),
        optuna.pruners.SuccessiveHalvingPruner(),
    ):
        trials = run_study(SameLengthPruner(pruner), lambda number: number % 2 == 1)
        assert any(t.state == optuna.trial.TrialState.PRUNED for t in trials)


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


# ------------------------------------------------------------------ sampling


def draws(seed, trials=5):
    study = optuna.create_study(sampler=SeededSampler(seed))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=trials)
    return [trial.params["x"] for trial in study.trials]


def test_neighbouring_seeds_share_no_random_trial():
    assert draws(7) == draws(7)
    assert not set(draws(7)) & set(draws(8))


def test_a_resumed_study_proposes_what_it_would_have_proposed():
    study = optuna.create_study(sampler=SeededSampler(3))
    for _ in range(8):
        study.sampler = SeededSampler(3)  # as a new process has it
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert [trial.params["x"] for trial in study.trials] == draws(3, 8)


def test_two_processes_never_draw_the_same_lambda(tmp_path):
    """Both begin a trial before either has drawn."""
    storage = open_storage(None, tmp_path)
    directions = ["minimize", "minimize"]
    study = optuna.create_study(
        study_name="x", storage=storage, directions=directions, sampler=CurveSampler()
    )
    for _ in range(4):
        first, second = study.ask(), study.ask()
        drawn = {}

        def draw(trial, drawn=drawn):
            drawn[trial.number] = trial.suggest_float("lambda_reg", 1e-3, 1.0, log=True)

        late = threading.Thread(target=draw, args=(second,))
        late.start()
        time.sleep(0.1)
        assert not drawn, "the second waits for the first"
        draw(first)
        late.join()
        for trial in (first, second):
            study.tell(trial, (0.5, layers_at(drawn[trial.number])))
    values = [trial.params["lambda_reg"] for trial in study.trials]
    assert len(set(values)) == len(values) == 8


def test_every_validation_of_an_epoch_is_reported():
    study = optuna.create_study()
    trial = study.ask()
    reported = EveryValidation(trial)
    for epoch, value in ((0, 1.0), (0, 0.9), (1, 0.8), (1, 0.7)):
        reported.report(value, epoch)
    study.tell(trial, 0.7)
    assert study.trials[0].intermediate_values == {0: 1.0, 1: 0.9, 2: 0.8, 3: 0.7}


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


def test_each_stage_picks_its_winner():
    space = {"lambda_reg": optuna.distributions.FloatDistribution(0.0, 1.0)}
    curve = [(0.1, 0.50, 3.0), (0.2, 0.505, 2.0), (0.3, 0.6, 1.0)]
    both = [
        optuna.create_trial(params={"lambda_reg": x}, distributions=space, values=[*xs])
        for x, *xs in curve
    ]
    one = [optuna.create_trial(value=loss) for _, loss, _ in reversed(curve)]
    select = select_lambda
    assert [stage.pick(one, [None] * 3, select) for stage in (SUBMODELS, TRAINING)] == [one[2]] * 2
    assert LAMBDA_REG.pick(both, [None] * 3, select) == both[1], (
        "by default within one standard error, or 0.01"
    )
    select = partial(select_lambda, rule="max_layers", max_layers=1.5)
    assert LAMBDA_REG.pick(both, [None] * 3, select) == both[2]


def test_stages_are_data():
    assert [stage.name for stage in STAGES] == ["submodels", "training", "lambda_reg"]
    assert [stage.prunes for stage in STAGES] == [True, True, False]
    assert LAMBDA_REG.read({"val_task_loss": 0.5, "val_exit_layer": 2.0, "val_loss": 9.0}) == (
        0.5,
        2.0,
    )
    assert all(hasattr(TuningEngine, stage.method) for stage in STAGES)


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
