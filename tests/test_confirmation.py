"""The confirmation of the winners, and the final model that takes over what it fitted."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml

from dact import DACT, TuningEngine
from dact.calibration import Promise
from dact.calibration.answers import LayerAnswers
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
from dact.files import read_json
from dact.tuning import checkpointed_fit, confirmation, final
from dact.tuning.confirmation import Answered, Candidate, _beats, _best, confirm
from dact.tuning.outcome import Outcome

optuna.logging.set_verbosity(optuna.logging.ERROR)


def small_model(**overrides):
    return DACT(encoder=TransformerEncoder(42, 3, 8, 2), **{"learning_rate": 3e-3, **overrides})


def engine(tmp_path, **options):
    space = {"batch_size": {"choices": [32]}, "num_epochs": {"choices": [1]}}
    options = {
        "n_trials": 2,
        "search_space": space,
        "encoder_training": "frozen",
        "warm_up_epochs": 1,
        **options,
    }
    data = partial(CompositionalSentiment, num_train=120, num_val=60, num_test=60)
    trainer = {"max_epochs": 1, "accelerator": "cpu"}
    made = TuningEngine(
        **{"model": small_model, **options}, data=data, trainer=trainer, log_dir=tmp_path
    )
    made.progress.console.quiet = True
    return made


def studies_of(run, stage):
    return optuna.load_study(
        study_name=f"{run.name}/{stage}", storage=f"sqlite:///{run}/studies.db"
    )


@pytest.fixture
def fitted(monkeypatch):
    """The folders in which everything was fitted, in their order."""
    folders = []

    def recorded(arguments, model, data, checkpoints, *callbacks, **options):
        folders.append(checkpoints.parent)
        return resumable_fit(arguments, model, data, checkpoints, *callbacks, **options)

    resumable_fit = checkpointed_fit.resumable_fit
    monkeypatch.setattr(checkpointed_fit, "resumable_fit", recorded)
    return folders


@pytest.mark.slow
def test_two_candidates_are_fitted_as_the_final_model_which_takes_over_the_winner(
    tmp_path, fitted, monkeypatch
):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    seeds = []
    on_states = confirmation.fit_settings
    monkeypatch.setattr(
        confirmation, "fit_settings", lambda *given: seeds.append(given[2]) or on_states(*given)
    )
    run, promise = tmp_path / "run", Promise(max_layers=2.2, confidence=None)
    with monkeypatch.context() as patched:
        patched.setattr(
            final, "evaluate", killed
        )  # after the fits, while the final model is measured
        with pytest.raises(KeyboardInterrupt):
            engine(tmp_path, promise=promise).run_pipeline("run")
    confirmed = [str(folder.relative_to(run)) for folder in fitted]
    assert confirmed[0] == "confirmation/default_settings/fit"
    assert confirmed[1] in (
        f"confirmation/{name}/fit" for name in ("first_trial", "tuned", "runner-up")
    )
    assert confirmed[2:] in ([], ["confirmation/first_trial/fit"])
    tried = {trial.params["lambda_reg"] for trial in studies_of(run, "lambda_reg").get_trials()}
    winner, second = (
        yaml.safe_load((run / "lambda_reg.yaml").read_text()),
        read_json(run / "lambda_reg/runner_up.json"),
    )
    assert {winner["lambda_reg"], second["lambda_reg"]} == tried, "the best two of two"
    assert len(seeds) == 9, "three candidates, three seeds each"
    assert len({*seeds}) == 3
    assert min(seeds) > 2, "not those of the trials"

    metrics, checkpoint = engine(tmp_path, promise=promise).run_pipeline("run")
    again = [str(folder.relative_to(run)) for folder in fitted[len(confirmed) :]]
    assert again == ["final/defaults"], "nothing is fitted twice"
    assert [path.relative_to(run) for path in run.rglob("*.ckpt")] == [
        Path("final", "checkpoints", "best.ckpt")
    ]
    chosen = json.loads((run / "final" / "made_of.json").read_text())["fit"]["settings"]
    assert DACT.load_from_checkpoint(checkpoint).num_layers == chosen["num_layers"]
    found = json.loads(Path(metrics).read_text())
    text = found["confirmation"]
    assert text.split(" (")[0] in ("default settings", "first trial", "tuned", "runner-up")
    assert "default settings" in text

    engine(tmp_path, promise=promise).final_train("run")
    assert len(fitted) == len(confirmed) + 1

    # The defaults are measured at the promise of the run.
    defaults = json.loads((run / "final" / "defaults" / "metrics.json").read_text())
    assert defaults["calibration"]["promise"] == found["calibration"]["promise"]
    assert defaults["halting_margin"] == defaults["calibration"]["halting_margin"] < 1
    assert defaults["validation"]["mean_exit_layer"] <= 2.2
    assert defaults["test"]["difference_to_baseline"]["accuracy"] == pytest.approx(
        defaults["test"]["accuracy"] - found["baseline"]["test"]["accuracy"]
    )


@pytest.mark.parametrize(
    ("layers", "lost", "within", "beats"),
    [
        ((-0.5, 0.1), (0.0, 0.005), False, True),  # fewer layers at the same accuracy
        ((-0.05, 0.1), (0.0, 0.005), True, False),  # not by more than the error
        ((-0.5, 0.1), (0.01, 0.005), False, False),  # fewer, and worse
        (
            (-0.5, 0.1),
            (0.01, 0.005),
            True,
            False,
        ),  # the same, though no worse than the promise allows
        (
            (-0.5, 0.1),
            (0.01, 0.016),
            True,
            True,
        ),  # fewer, and no worse as far as the examples can tell
        (
            (-0.5, 0.1),
            (0.01, 0.016),
            False,
            False,
        ),  # the same, where the promise allows less than is lost
        ((0.05, 0.1), (-0.01, 0.005), False, True),  # better at the same layers
        ((0.5, 0.1), (-0.01, 0.005), True, False),  # better, and more layers
        ((0.0, 0.0), (0.0, 0.0), True, False),
    ],
)
def test_the_defaults_stay_unless_they_are_beaten_by_one_standard_error(
    layers, lost, within, beats
):
    assert _beats(layers, lost, within) == beats


class Known:
    """A candidate whose early exit is known, and whose dial cannot be turned."""

    def __init__(self, *tensors):
        self.outcome = Outcome(*tensors)

    def turned_down(self, layers):
        return None


def test_candidates_challenge_the_best_before_them_and_broken_ones_never_win():
    def outcome(layers):
        exits = torch.tensor([layers, layers + 0.1] * 50)
        return Known(exits, torch.zeros(100), torch.zeros(100))

    found = {
        "default settings": None,
        "first trial": outcome(3.0),
        "tuned": outcome(2.0),
        "broken": None,
    }
    candidates = [Candidate(name, {}) for name in found]
    comparisons = []
    best = _best(candidates, lambda candidate: found[candidate.name], 0.0, comparisons)
    assert best.name == "tuned"
    assert comparisons == [
        "first trial beats default settings",
        "tuned beats first trial: -1.00 ± 0.15 layers, +0.00 ± 1.39 points",
        "tuned beats default settings",
        "broken does not beat tuned",
    ]
    assert (
        _best(candidates[:1], lambda candidate: None, 0.0, comparisons).name == "default settings"
    )

    # A default that answers with one class after the first layer has the fewest layers, and loses
    # all the same.
    wrong = Known(torch.ones(100), torch.zeros(100), torch.tensor([1.0, 0.0, 0.0, 0.0] * 25))
    collapsed = {"default settings": wrong, "tuned": outcome(2.9)}
    best = _best(
        [Candidate(name, {}) for name in collapsed],
        lambda candidate: collapsed[candidate.name],
        0.01,
        [],
    )
    assert best.name == "tuned"
    best = _best(
        [Candidate(name, {}) for name in collapsed],
        lambda candidate: collapsed[candidate.name],
        None,
        [],
    )
    assert best.name == "default settings", "nothing was promised about accuracy"
    # All candidates miss the baseline on frozen states, so that alone does not decide.
    torch.manual_seed(0)
    states = {
        "first trial": Known(
            torch.full((2000,), 2.0), torch.zeros(2000), (torch.rand(2000) < 0.050).float()
        ),
        "tuned": Known(
            torch.full((2000,), 4.0), torch.zeros(2000), (torch.rand(2000) < 0.045).float()
        ),
    }
    assert (
        _best([Candidate(name, {}) for name in states], lambda one: states[one.name], 0.01, []).name
        == "first trial"
    )

    # What may be lost for fewer layers does not add up over candidates that each beat the one
    # before.
    def lower(layers, worse):
        lost = torch.zeros(1500)
        lost[:worse] = 1
        return Known(torch.full((1500,), layers), torch.zeros(1500), lost)

    chain = {
        "default settings": lower(4.0, 0),
        "first trial": lower(3.5, 1),
        "tuned": lower(3.0, 2),
    }
    comparisons = []
    best = _best(
        [Candidate(name, {}) for name in chain], lambda one: chain[one.name], 0.01, comparisons
    )
    assert best.name == "first trial"
    assert comparisons[-1].startswith("tuned does not beat default settings: -1.00")

    # One text is no evidence, however its mean and its error are rounded.
    for examples in range(100, 1500, 7):
        none, one = torch.zeros(examples), torch.zeros(examples)
        one[0] = -1
        pair = {
            n: Known(none + 3.0, none, lost)
            for n, lost in (("default settings", none), ("tuned", one))
        }
        best = _best(
            [Candidate(name, {}) for name in pair], lambda one, pair=pair: pair[one.name], 0.01, []
        )
        assert best.name == "default settings"

    # As much as fits of the same settings differ by is no gain, however many examples there are.
    alike = {"default settings": outcome(3.0), "tuned": outcome(2.9)}
    best = _best(
        [Candidate(name, {}) for name in alike], lambda candidate: alike[candidate.name], 0.0, []
    )
    assert best.name == "default settings"


def test_the_first_trial_gets_its_turn_where_the_winner_on_frozen_states_does_not_beat_the_defaults(
    monkeypatch,
):
    def known(layers, worse=0):
        lost = torch.zeros(1000)
        lost[:worse] = 1
        return Known(torch.full((1000,), layers), torch.zeros(1000), lost)

    on_states = {"first trial": known(2.5), "tuned": known(1.2)}
    live = {
        "default settings": known(2.2),
        "tuned": known(1.2, worse=10),
        "first trial": known(1.6),
    }
    fitted = []

    def as_final(run, prepared, model, progress, candidate):
        fitted.append(candidate.name)
        return live[candidate.name]

    monkeypatch.setattr(confirmation, "_as_final", as_final)
    monkeypatch.setattr(confirmation, "_on_states", lambda *given: on_states[given[-1].name])
    recipe = SimpleNamespace(
        promise=Promise(max_accuracy_loss=0.01), final_training="finetune", make_model=lambda: None
    )
    prepared = SimpleNamespace(recipe=recipe, states=object())

    def confirmed(*names):
        fitted.clear()
        return confirm(None, prepared, [Candidate(name, {"name": name}) for name in names], None)

    verdict = confirmed("default settings", "first trial", "tuned")
    assert verdict.chosen.name == "first trial"
    assert verdict.text.startswith("first trial (tuned beats first trial on frozen states: ")
    assert "; tuned does not beat default settings: -1.00" in verdict.text
    assert "; first trial beats default settings: -0.60" in verdict.text
    assert set(fitted) == live.keys()
    live["first trial"] = known(2.2)
    assert confirmed("default settings", "first trial", "tuned").chosen.name == "default settings"
    assert confirmed("default settings", "tuned").chosen.name == "default settings", (
        "a file with these settings"
    )
    live["tuned"] = known(1.2)
    assert confirmed("default settings", "first trial", "tuned").chosen.name == "tuned"
    assert fitted == ["default settings", "tuned"], "it would be a fit more"


def answered(leads, right, promise=Promise(max_accuracy_loss=0.01)):
    """Two classes: the lead of each example grows from layer to layer; answers with a small one are
    a guess."""
    is_right = torch.where(leads > 0.5, right.unsqueeze(1), torch.rand_like(leads) < 0.5)
    is_right[:, -1] = right
    y = torch.stack([(1 + leads) / 2, (1 - leads) / 2], dim=-1)
    y = torch.where(is_right.unsqueeze(-1), y, y.flip(-1)).double()
    p = torch.ones_like(leads)
    p[:, -1] = 0
    answers = LayerAnswers(y, p, y, torch.zeros(len(leads), dtype=torch.int64))
    prepared = SimpleNamespace(
        recipe=SimpleNamespace(promise=promise), baseline=SimpleNamespace(right=lambda target: None)
    )
    return Answered(
        prepared, DACT(encoder=TransformerEncoder(42, 4, 8, 2), output_dimension=2), [answers]
    )


def test_a_candidate_that_takes_more_layers_is_compared_at_as_many():
    """Full depth of the tuned one is two points better, so that its own promise lets it leave
    later."""
    torch.manual_seed(0)
    leads = torch.rand(2000, 4).cumsum(1) / 4
    default = answered(leads.sqrt(), torch.rand(2000) < 0.70)
    tuned = answered(leads, torch.rand(2000) < 0.75)
    assert tuned.outcome.layers > default.outcome.layers + 0.3
    turned = tuned.turned_down(default.outcome.layers)
    assert default.outcome.layers - 0.05 < turned.layers <= default.outcome.layers
    pair, comparisons = {"default settings": default, "tuned": tuned}, []

    def best():
        return _best(
            [Candidate(name, {}) for name in pair], lambda one: pair[one.name], 0.01, comparisons
        ).name

    assert best() == "tuned"
    assert comparisons[-1].endswith("at as many layers")
    pair["tuned"] = answered(leads, torch.rand(2000) < 0.70)
    assert best() == "default settings", "no better at as many layers"
    assert answered(leads, torch.rand(2000) < 0.75, None).turned_down(3.0) is None, (
        "without a promise there is no dial"
    )
