"""The confirmation of the tuned settings, and the final model that takes over what it fitted."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dact import DACT
from dact.calibration import Promise
from dact.tuning import confirmation, final, fit
from dact.tuning.confirmation import confirm
from dact.tuning.outcome import Outcome
from dact.tuning.plan import Plan
from dact.tuning.progress import Progress
from dact.tuning.settings import Settings
from dact.tuning.stages import SUBMODELS
from dact.tuning.trainer import NonFiniteLoss
from tests.test_tuning import engine as tuning_engine

TUNED = Settings({"lambda_reg": 0.3})


def engine(tmp_path, **options):
    # A λ that the recommended settings do not have.
    space = {"num_epochs": {"choices": [1]}, "lambda_reg": {"low": 0.1}}
    defaults = {"n_trials": 1, "encoder_training": "frozen", "warm_up_epochs": 1}
    return tuning_engine(tmp_path, search_space=space, **{**defaults, **options})


@pytest.fixture
def fitted(monkeypatch):
    """The folders in which everything was fitted, in their order."""
    folders = []

    def recorded(arguments, model, data, checkpoints, *callbacks, **options):
        folders.append(checkpoints.parent)
        return resumable_fit(arguments, model, data, checkpoints, *callbacks, **options)

    resumable_fit = fit.resumable_fit
    for module in (fit, final):
        monkeypatch.setattr(module, "resumable_fit", recorded)
    return folders


@pytest.mark.slow
def test_both_candidates_are_fitted_like_the_final_model_which_takes_over_the_winner(
    tmp_path, fitted, monkeypatch
):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    run, promise = tmp_path / "run", Promise(max_layers=2.2, confidence=None)
    with monkeypatch.context() as patched:
        # After the fits, while the final model is measured.
        patched.setattr(final, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            engine(tmp_path, promise=promise).run_pipeline("run")
    names = [str(folder.relative_to(run)) for folder in fitted]
    assert names == ["refit/recommended/fit", "refit/tuned/fit"]

    metrics, checkpoint = engine(tmp_path, promise=promise).run_pipeline("run")
    assert [str(folder.relative_to(run)) for folder in fitted[2:]] == ["final/defaults"]
    assert [path.relative_to(run) for path in run.rglob("*.ckpt")] == [
        Path("final", "checkpoints", "best.ckpt")
    ]
    verdict = json.loads((run / "run.json").read_text())["steps"]["confirmation"]
    found = json.loads(Path(metrics).read_text())
    assert found["confirmation"] == verdict["text"]
    assert DACT.load_from_checkpoint(checkpoint).num_layers == verdict["settings"]["num_layers"]

    defaults = json.loads((run / "final" / "defaults" / "metrics.json").read_text())
    assert defaults["calibration"]["promise"] == asdict(promise)
    assert defaults["halting_margin"] == defaults["calibration"]["halting_margin"] < 1
    assert defaults["validation"]["mean_exit_layer"] <= 2.2
    assert defaults["test"]["difference_to_baseline"]["accuracy"] == pytest.approx(
        defaults["test"]["accuracy"] - found["baseline"]["test"]["accuracy"]
    )


def outcome(layers, wrong):
    """Early exit after about `layers`, with some wrong answers, each of a text of its own."""
    lost = torch.zeros(2000)
    lost[:wrong] = 1
    return Outcome(torch.full((2000,), layers), torch.zeros(2000), lost)


@pytest.fixture
def confirmed(monkeypatch):
    """A function that confirms settings by the outcome of each candidate, None for a broken one."""

    def confirmed(recommended, tuned, settings=TUNED):
        known = {"recommended": recommended, "tuned": tuned}

        def refit(prepared, name, settings, progress):
            if known[name] is None:
                raise NonFiniteLoss("val_loss is nan")
            return known[name]

        monkeypatch.setattr(confirmation, "_refit", refit)
        plan = Plan({}, {}, Settings({"num_layers": 2}), {"lambda_reg": 0.1, "batch_size": 32})
        progress = Progress()
        progress.console.quiet = True
        return confirm(SimpleNamespace(plan=plan), settings, progress)

    return confirmed


@pytest.mark.parametrize(
    ("recommended", "tuned", "winner"),
    [
        (outcome(3.0, 0), outcome(2.5, 0), "tuned"),  # fewer layers at the same accuracy
        (outcome(3.0, 0), outcome(2.9, 0), "recommended"),  # as much as fits differ by
        (outcome(3.0, 0), outcome(2.5, 1), "tuned"),  # one text is within the error
        (outcome(3.0, 0), outcome(2.5, 20), "recommended"),  # one point is lost
        (outcome(3.0, 20), outcome(3.0, 0), "tuned"),  # more accurate at the same layers
        (outcome(3.0, 1), outcome(3.0, 0), "recommended"),  # by a single text
        (outcome(3.0, 0), None, "recommended"),  # its loss is not finite
    ],
)
def test_the_recommended_settings_stay_unless_the_tuned_ones_beat_them(
    confirmed, recommended, tuned, winner
):
    verdict = confirmed(recommended, tuned)
    assert verdict["name"] == winner
    assert verdict["text"].startswith(f"{winner} settings")
    chosen = {"num_layers": 2, "lambda_reg": 0.3} if winner == "tuned" else {"num_layers": 2}
    assert verdict["settings"] == chosen


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (Settings(), "no study"),
        (Settings({"lambda_reg": 0.1}, batch_size=32), "chose the same ones"),
    ],
)
def test_equal_settings_are_not_compared(confirmed, settings, why):
    verdict = confirmed(None, None, settings)
    assert verdict["settings"] == {"num_layers": 2}
    assert why in verdict["text"]


def test_a_worker_keeps_the_activation_that_is_not_searched():
    plan = Plan({}, {}, Settings({}), {"classifier_activation": "tanh", "num_layers": 2})
    copied = pickle.loads(pickle.dumps(SUBMODELS))
    found = plan.winners(copied, {"classifier_dropout": 0.1})
    assert found["classifier_config"] == {"activation": "tanh", "dropout": 0.1}
