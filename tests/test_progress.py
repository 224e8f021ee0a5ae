"""What the console shows of a tuning run."""

import json
import re
import time
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from rich.console import Console

from dact.tuning.fitting import Deadline
from dact.tuning.progress import Progress
from dact.tuning.search import PLANNED_EPOCHS
from dact.tuning.summary import _speed, headline, pruning_text, show_summary

optuna.logging.set_verbosity(optuna.logging.ERROR)
PROMISE = {"max_accuracy_loss": 0.01, "min_agreement": None, "max_layers": None, "confidence": 0.95}


def metrics(**changes):
    """The content of a metrics.json as `dact tune` leaves it, as far as the console looks at it."""
    speed = {"texts_per_second": 900.0, "macro_f1": 0.712, "majority_share": 0.4}
    entry = {"accuracy": 0.785, "mean_exit_layer": 2.51, **speed}
    entry |= {"difference_to_baseline": {"accuracy": -0.002, "standard_error": 0.004}}
    entry |= {
        "full_depth": {**entry, "accuracy": 0.79, "mean_exit_layer": 4, "texts_per_second": 600.0}
    }
    baseline = {"accuracy": 0.787, "macro_f1": 0.72, "texts_per_second": 450.0}
    curve = [
        {
            "margin": margin,
            "accuracy": 0.79 - 0.01 * step,
            "mean_exit_layer": max(1.0, 4 - 0.3 * step),
            "agreement": 1.0,
            "difference_to_baseline": {"accuracy": 0.003 - 0.01 * step, "standard_error": 0.004},
        }
        for step, margin in enumerate(
            (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
        )
    ]
    found = {
        "test": entry,
        "validation": entry,
        "baseline": {"layers": 6, "test": baseline, "validation": baseline},
    }
    found |= {
        "layers": 4,
        "halting_tolerance": 0.0,
        "halting_margin": 0.83,
        "margin_curve": curve,
        "calibration": {"promise": dict(PROMISE)},
    }
    return {**found, **changes}


def test_the_summary_begins_with_what_a_person_wants_to_know():
    found = metrics()
    assert headline(found) == (
        "78.50 % accuracy on test, -0.20 ± 0.40 points against the baseline of 6 layers, at 2.51 layers and 2.0 times its "
        "speed, under the promise of at most 1 point of accuracy below its own full depth with 95% confidence"
    )
    found["calibration"]["promise"]["confidence"] = None
    assert headline(found).endswith(
        "by the estimate of at most 1 point of accuracy below its own full depth"
    )
    found["halting_margin"] = 1.0
    assert headline(found).endswith("with the class of its own full depth by proof"), (
        "whatever was estimated"
    )
    found["halting_margin"] = 0.83
    found["calibration"]["promise"] |= {"max_accuracy_loss": None, "max_layers": 2.5}
    assert headline(found).endswith("by the estimate of at most 2.5 of 4 layers on average")
    del found["calibration"]
    assert headline(found).endswith("at tolerance 0 and margin 0.83, without a promise")
    found["halting_margin"] = 1.0
    assert headline(found).endswith("with the class of its own full depth by proof")


def test_the_summary_fits_on_a_screen_of_80_by_24(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("lightning_logs", "2026-01-01_00-00-00", "final")
    (folder / "defaults").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics()))
    (folder / "defaults" / "metrics.json").write_text(json.dumps({"test": metrics()["test"]}))
    console = Console(width=80, record=True, force_terminal=True)
    verdict = (
        "tuned (tuned beats first trial on frozen states: -0.52 ± 0.02 layers, +0.10 ± 0.40 points; runner-up does not "
        "beat tuned on frozen states: +0.10 ± 0.02 layers, +0.10 ± 0.40 points, +0.10 ± 0.40 at as many layers; tuned "
        "beats default settings: +0.28 ± 0.15 layers, +1.55 ± 0.73 points, +0.95 ± 0.73 at as many layers)"
    )
    show_summary(console, folder, verdict, [pruned_study()])
    lines = console.export_text().splitlines()
    assert len(lines) <= 23, "and a line for the prompt"
    assert max(map(len, lines)) <= 80
    assert str(folder / "model") in "".join(lines)
    text = " ".join(" ".join(lines).split())
    decisive = "tuned beats default settings: +0.28 ± 0.15 layers, +1.55 ± 0.73 points, +0.95 ± 0.73 at as many layers"
    assert f"settings: tuned ({decisive})" in text
    assert "pruning ended 1 of 3 trials early" in text
    promised = next(line for line in lines if "promised" in line)
    assert promised.split()[:2] == ["0.83", "78.50"]
    (folder / "metrics.json").write_text(json.dumps({**metrics(), "calibration": None}))
    console = Console(width=80, record=True)
    show_summary(console, folder, verdict, [])
    text = console.export_text()
    assert f"settings: tuned ({decisive})\n" in text, (
        "in a file, sentences and paths are not broken"
    )
    assert "as set" in text
    assert "promised" not in text
    assert "set by an estimate" not in text
    at_worst = {**metrics()["validation"], "majority_share": 1.0, "mean_exit_layer": 1.0}
    (folder / "metrics.json").write_text(json.dumps(metrics(validation=at_worst)))
    console = Console(width=80, record=True, force_terminal=True)
    show_summary(console, folder, verdict, [pruned_study()])
    text = console.export_text()
    assert "warning: all validation examples get one class" in text
    assert "warning: the depth has collapsed" in text
    assert len(text.splitlines()) <= 23


def test_a_margin_that_too_few_examples_could_set_is_no_fault_of_the_price(tmp_path):
    found = metrics(validation={**metrics()["validation"], "mean_exit_layer": 4.0})
    found |= {"halting_margin": 1.0, "calibration": {**found["calibration"], "examples": 3}}
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    console = Console(width=200, record=True)
    show_summary(console, tmp_path, "", [])
    text = console.export_text()
    assert (
        "warning: every validation example uses all 4 layers: no margin passed on the 3 examples that it was"
        in text
    )
    assert "lambda_reg" not in text


@pytest.mark.parametrize(
    ("layers", "said"),
    [(1.0, "one layer. If that costs"), (4.0, "all 4 layers. Try a larger"), (2.0, "")],
)
def test_a_final_model_whose_depth_has_collapsed_says_so(tmp_path, layers, said):
    entry = {**metrics()["validation"], "mean_exit_layer": layers}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics(validation=entry)))
    console = Console(width=200, record=True)
    show_summary(console, tmp_path, "tuned", [])
    text = console.export_text()
    assert ("the depth has collapsed" in text) == bool(said)
    assert said in text


def pruned_study():
    """Two whole trials of 4 and 2 epochs, and one of 4 that was pruned after its first."""
    study = optuna.create_study()
    start = datetime(2026, 1, 1)
    for state, planned, done in (
        (TrialState.COMPLETE, 4, 4),
        (TrialState.COMPLETE, 2, 2),
        (TrialState.PRUNED, 4, 1),
    ):
        trial = create_trial(
            state=state,
            value=0.5,
            params={"rate": 0.1 * done, "same": 3},
            distributions={"rate": FloatDistribution(0, 1), "same": IntDistribution(0, 9)},
            intermediate_values=dict.fromkeys(range(done), 0.5),
            user_attrs={PLANNED_EPOCHS: planned},
        )
        trial.datetime_start, trial.datetime_complete = start, start + timedelta(seconds=10 * done)
        study.add_trial(trial)
    return study


def test_the_summary_says_what_pruning_saved():
    assert (
        pruning_text([pruned_study()])
        == "pruning ended 1 of 3 trials early and saved 30% of the time of all of them"
    )
    assert pruning_text([]) == ""
    study = optuna.create_study()
    study.add_trial(create_trial(value=1.0))
    assert pruning_text([study]) == "pruning ended none of 1 trials early"


@pytest.mark.parametrize("width", [80, 140])
def test_the_live_table_shows_what_differs_between_trials(width):
    progress = Progress()
    progress.console = Console(width=width, record=True)
    with progress.study("training", pruned_study(), 5, 0, Deadline(), Deadline()):
        pass
    text = progress.console.export_text()
    assert "study training: 3 of 5 trials" in text
    assert "rate" in text
    assert "same" not in text
    assert "best so far 0.5000 (trial 0)" in text
    assert max(map(len, text.splitlines())) <= width


def test_the_time_left_is_never_more_than_the_deadline_of_all_studies():
    progress, study = Progress(), pruned_study()
    progress.console = Console(width=80, record=True)
    with progress.study("training", study, 1000, 1000, Deadline(40), Deadline(60)):
        time.sleep(0.1)
        study.add_trial(create_trial(value=1.0))
        progress.refresh()
    left = re.search(r"about (\d+) s left", progress.console.export_text())
    assert 50 <= int(left[1]) <= 60


def test_columns_that_do_not_fit_are_left_out_whole():
    study = optuna.create_study()
    names = [f"confidence_option_{number}" for number in range(20)]
    for value in (0.123456, 0.5):
        study.add_trial(
            create_trial(
                value=value,
                params=dict.fromkeys(names, value),
                distributions={name: FloatDistribution(0, 1) for name in names},
            )
        )
    progress = Progress()
    progress.console = Console(width=80, record=True)
    with progress.study("submodels", study, 2, 0, Deadline(), Deadline()):
        pass
    lines = progress.console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if "complete" in line]
    assert len(rows) == 2
    assert rows[0][3:] == ["0.12"] * (len(rows[0]) - 3)
    assert 4 < len(rows[0]) < 23


def test_the_time_left_covers_the_fits_after_the_studies():
    progress = Progress()
    progress.console = Console(width=80, record=True)
    progress.announce([3, 3, 3], None, trials_after=2, epochs_after=8)
    study = optuna.create_study()
    progress.seconds_per_epoch = 60.0  # as the baseline took
    with progress.study("submodels", study, 1, 0, Deadline(), Deadline()):
        study.add_trial(create_trial(value=1.0))
        progress.refresh()
    assert "about 8 min left for the whole run" in progress.console.export_text()
    with progress.study("training", optuna.create_study(), 1, 0, Deadline(), Deadline()):
        pass
    assert "about 8 min left for the whole run" in progress.console.export_text(), (
        "before a trial of this study has ended"
    )


def test_the_speed_at_another_margin_is_never_more_than_its_share():
    entry = {
        **metrics()["validation"],
        "mean_exit_layer": 3.9,
        "texts_per_second": 1000.0,
    }  # of 4 layers, at 600
    speeds = [_speed(entry, layers, 4) for layers in (1.0, 2.0, 3.0, 3.9)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] == pytest.approx(3900.0)
    assert speeds[-1] == pytest.approx(1000.0)
    entry = {
        **entry,
        "mean_exit_layer": 2.0,
        "texts_per_second": 500.0,
    }  # slower than full depth: noise
    assert _speed(entry, 1.0, 4) == pytest.approx(500.0)
    entry = {**entry, "texts_per_second": 900.0}
    assert 900.0 < _speed(entry, 1.0, 4) < 1800.0


def test_the_announcement_names_what_the_deadline_does_not_bound():
    progress = Progress()
    progress.console = Console(width=80, record=True)
    progress.announce([6, 6, 6], 600.0, trials_after=2, epochs_after=8)
    said = " ".join(progress.console.export_text().split())
    assert said.startswith("6 + 6 + 6 trials, then the final fit")
    assert (
        "The studies end after 10 min; preparation, confirmation and final fit are not bounded"
        in said
    )
