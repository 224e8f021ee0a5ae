"""The decisions of tuning without any training: spaces, the choice of λ, proposals and pruning."""

import math
import random
import threading
import time
from functools import partial
from types import SimpleNamespace

import hypothesis.strategies as st
import optuna
import pytest
import torch
from hypothesis import given, settings
from optuna.distributions import FloatDistribution, IntDistribution

from dact.tuning.outcome import Outcome
from dact.tuning.search import (
    PLANNED_EPOCHS,
    CurveSampler,
    LagPruner,
    SameLengthPruner,
    SeededSampler,
    lags,
)
from dact.tuning.selection import Point, check_rule, next_lambda, pareto_front, select_lambda
from dact.tuning.space import (
    DEFAULT_SPACES,
    MORE_DIMENSIONS,
    build_spaces,
    complete_spaces,
    suggest,
)
from dact.tuning.studies import open_storage

optuna.logging.set_verbosity(optuna.logging.ERROR)

# ------------------------------------------------------------------ spaces


def test_spaces_are_narrowed_replaced_and_enlarged():
    assert "classifier_activation" not in build_spaces(None)["submodels"]
    changes = {
        "learning_rate": {"high": 1e-4},
        "batch_size": {"type": "int", "low": 8, "high": 64, "step": 8},
        "classifier_dropout": FloatDistribution(0, 1),
        "classifier_activation": {},
        "weight_decay": {"high": 0.01},
    }
    spaces = build_spaces(changes)
    assert spaces["training"]["learning_rate"] == FloatDistribution(2e-5, 1e-4, log=True)
    assert spaces["training"]["batch_size"] == IntDistribution(8, 64, step=8)
    assert spaces["training"]["weight_decay"] == FloatDistribution(1e-4, 0.01, log=True)
    assert spaces["submodels"]["classifier_dropout"] == FloatDistribution(0, 1)
    more = MORE_DIMENSIONS["submodels"]["classifier_activation"]
    assert spaces["submodels"]["classifier_activation"] == more
    assert spaces["lambda_reg"] == DEFAULT_SPACES["lambda_reg"]


def test_frozen_trials_choose_neither_the_rate_of_the_encoder_nor_attached_exits():
    training = build_spaces(None, frozen=True)["training"]
    assert "learning_rate" not in training
    assert training["detach_exits"].choices == (True,)
    both = build_spaces(None, frozen=True, final_frozen=True)["training"]
    assert both["detach_exits"].choices == (True, False)
    with pytest.raises(ValueError, match="Did you mean submodel_learning_rate"):
        build_spaces({"learning_rate": {"high": 1e-3}}, frozen=True)


def test_spaces_hold_the_first_trials_and_the_layers_of_the_encoder():
    start = {"batch_size": 48, "learning_rate": 5e-3, "exit_loss_weight": 0.35, "num_layers": 6}
    spaces, starts = complete_spaces(build_spaces(None), 6, {"training": [{**start, "other": 1}]})
    training = spaces["training"]
    assert starts["training"] == [start]
    assert training["batch_size"].choices == (32, 64, 48)
    assert training["learning_rate"] == FloatDistribution(2e-5, 5e-3, log=True)
    assert training["exit_loss_weight"] == FloatDistribution(0.1, 1.0), "the step would miss it"
    assert training["num_layers"] == IntDistribution(3, 6)
    study = optuna.create_study()
    study.enqueue_trial(start)
    trial = study.ask()
    values = {name: suggest(trial, name, dimension) for name, dimension in training.items()}
    assert values == {**values, **start}

    given = build_spaces({"num_layers": {"low": 2, "high": 4}})
    assert complete_spaces(given, 3, {})[0]["training"]["num_layers"] == IntDistribution(2, 3)
    spaces, starts = complete_spaces(given, 6, {"training": [start]}, bounded={"num_layers"})
    assert spaces["training"]["num_layers"] == IntDistribution(2, 4), "the bounds of the user hold"
    assert starts["training"][0]["num_layers"] == 4


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("speed", {"low": 1}, "The parameters are classifier_num_layers"),
        ("learning_rate", {"lo": 1}, "'lo'.*Give low, high"),
        ("learning_rate", {"low": 1.0}, "low=1.0, high=0.002"),
        ("learning_rate", 0.1, "float"),
        ("batch_size", {"choices": []}, "one or more"),
        ("lambda_reg", {"type": "real", "low": 0, "high": 1}, "'real'.*type: float"),
    ],
)
def test_wrong_spaces_are_refused(name, change, said):
    with pytest.raises(ValueError, match=f"search_space: .*{name}.*{said}"):
        build_spaces({name: change})


# ------------------------------------------------------------------ choosing λ


def outcome(losses=(0.5,) * 400, lost=(0.0,) * 400):
    return Outcome(torch.ones(400), torch.tensor(losses), torch.tensor(lost))


def point(lambda_reg, loss, layers, **outcomes):
    return Point(lambda_reg, loss, layers, outcome(**outcomes))


CURVE = [
    point(0.001, 0.50, 6.0),
    point(0.01, 0.501, 5.0),
    point(0.03, 0.505, 3.0),
    point(0.05, 0.507, 3.2),  # beaten by the one before
    point(0.1, 0.60, 2.0),
    point(1.0, 0.90, 1.0),
]


@pytest.mark.parametrize(
    ("rule", "options", "layers"),
    [
        ("one_standard_error", {}, 3.0),
        ("promise", {"allowed": 0.0}, 3.0),  # kept by none
        ("max_loss_increase", {"max_loss_increase": 0.0}, 6.0),
        ("max_loss_increase", {"max_loss_increase": 0.25}, 2.0),
        ("knee", {}, 3.0),
        ("max_layers", {"max_layers": 5.5}, 5.0),
    ],
)
def test_every_rule_chooses_as_it_says(rule, options, layers):
    assert select_lambda(CURVE, rule, **options).layers == layers


def lossy(*trials):
    """Points of so many layers, with so many wrong answers of 400."""
    return [
        point(1 / layers, 0.5, layers, lost=[1.0] * faults + [0.0] * (400 - faults))
        for layers, faults in trials
    ]


def test_the_promise_decides_by_paired_loss_of_accuracy_plus_one_standard_error():
    decide = partial(select_lambda, lossy((4.0, 0), (3.0, 1), (2.0, 3), (1.0, 20)), "promise")
    assert decide(allowed=0.01).layers == 3.0, "0.0075 ± 0.0043 is not within 0.01"
    assert decide(allowed=0.02).layers == 2.0
    assert decide(allowed=0.1).layers == 1.0


def test_on_frozen_states_the_promise_is_measured_from_the_most_accurate_trial():
    # All of them are at least 5 points below the baseline, as on the states of frozen mode.
    decide = partial(select_lambda, lossy((4.0, 20), (3.0, 22), (1.0, 400)), "promise")
    assert decide(allowed=0.01, from_best=True).layers == 3.0, "0.005 ± 0.0035 more"


def test_one_standard_error_is_that_of_the_paired_difference():
    noise = [0.4, 0.6] * 50
    best = point(0.01, 0.5, 4.0, losses=noise)
    alike = point(0.1, 0.52, 2.0, losses=[value + 0.02 for value in noise])
    scattered = point(0.2, 0.52, 2.0, losses=[value + 0.02 for value in reversed(noise)])
    assert select_lambda([best, alike]).layers == 4.0, "always worse by 0.02"
    assert select_lambda([best, scattered]).layers == 2.0, "0.02 ± 0.02"


def test_a_budget_that_is_missing_or_impossible_is_refused():
    with pytest.raises(ValueError, match="max_layers"):
        check_rule("max_layers", None)
    with pytest.raises(ValueError, match="no trial uses at most 0.5 layers; the fewest are 1.00"):
        select_lambda(CURVE, "max_layers", max_layers=0.5)


points = st.builds(point, st.floats(1e-4, 1), st.floats(0.1, 2), st.floats(1, 6))


@settings(max_examples=50)
@given(st.lists(points, min_size=1, max_size=12))
def test_the_winner_is_never_beaten(trials):
    front = pareto_front(trials)
    for rule in ("one_standard_error", "max_loss_increase", "knee"):
        chosen = select_lambda(trials, rule)
        assert chosen in front
        assert not any(
            (p.loss <= chosen.loss and p.layers < chosen.layers)
            or (p.loss < chosen.loss and p.layers <= chosen.layers)
            for p in trials
        )


def layers_at(value, bend=0.05, steep=8):
    """Six layers, falling to one around the bend."""
    return 1 + 5 / (1 + math.exp(steep * math.log(value / bend)))


@settings(max_examples=15)
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
    drawn = [layers_at(10 ** generator.uniform(-3, 0), bend) for _ in range(1200)]
    assert len(steep) / 12 > 1.3 * sum(1.05 < layers < 5.95 for layers in drawn) / 1200


# ------------------------------------------------------------------ pruning


def test_lagging_is_relative_to_the_better_half():
    field = [[0.9, 0.5], [0.8, 0.4], [0.85, 0.45], [2.0, 1.9]]
    assert lags([1.9], field)
    assert not lags([0.92], field)
    assert not lags([1.9], field[:2])
    assert not lags([2.5, 0.45], field), "the best epoch so far counts"


def run_study(pruner, half_of, epochs_of=lambda number: 5, trials=24):
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
    assert all(t in pruned for t in trials[8:] if t.user_attrs["bad"])
    assert all(len(t.intermediate_values) < 5 for t in pruned)


def test_a_trial_is_compared_only_with_trials_of_its_length():
    """Short trials are ahead at every epoch, since their learning rate falls sooner; long ones must
    survive them."""

    def states(pruner):
        trials = run_study(pruner, lambda number: False, lambda number: (3, 8)[number % 2])
        return {trial.state.name for trial in trials}

    assert states(SameLengthPruner(LagPruner())) == {"COMPLETE"}
    assert "PRUNED" in states(LagPruner()), "which is why the wrapper is there"


# ------------------------------------------------------------------ sampling


def draws(seed, parts=1):
    """Draw five values of a study in one process, or in several one after another."""
    study = optuna.create_study()
    for _ in range(parts):
        study.sampler = SeededSampler(seed)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5 // parts)
    return [trial.params["x"] for trial in study.trials]


def test_a_resumed_study_proposes_what_it_would_have_and_another_seed_something_else():
    assert draws(7) == draws(7, parts=5)
    assert not set(draws(7)) & set(draws(8))


def test_two_processes_never_draw_the_same_lambda(tmp_path):
    """Both begin a trial before either has drawn."""
    storage = f"sqlite:///{tmp_path}/studies.db"
    directions = ["minimize", "minimize"]
    study = optuna.create_study(
        study_name="x", storage=storage, directions=directions, sampler=CurveSampler()
    )
    for _ in range(2):
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
    assert len(set(values)) == len(values) == 4


def test_two_workers_never_take_the_same_queued_trial(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    study = optuna.create_study(study_name="x", storage=open_storage(None, run))
    for x in range(20):
        study.enqueue_trial({"x": x})
    taken, ready = [], threading.Barrier(4)

    def work():
        study = optuna.load_study(study_name="x", storage=open_storage(None, run))
        ready.wait()
        taken.extend(study.ask().number for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == list(range(20))
