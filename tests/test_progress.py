"""What the console shows of a tuning run."""

import json
import re
import time

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from rich.console import Console

from dact.tuning.progress import Progress
from dact.tuning.report import faster, guarantee, show_summary
from dact.tuning.trainer import Deadline

optuna.logging.set_verbosity(optuna.logging.ERROR)


def on_console(width, **options):
    progress = Progress()
    progress.console = Console(width=width, record=True, **options)
    return progress


# ------------------------------------------------------------------ studies


def small_study():
    """Three trials, with one parameter that differs and one that does not."""
    study = optuna.create_study()
    space = {"rate": FloatDistribution(0, 1), "same": IntDistribution(0, 9)}
    for number, state in enumerate((TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED)):
        params = {"rate": 0.1 * (number + 1), "same": 3}
        known = {"params": params, "distributions": space, "intermediate_values": {0: 0.5}}
        study.add_trial(create_trial(state=state, value=0.5 + number / 10, **known))
    return study


def shown(study, stage="training", trials=5, width=80):
    """The text of the live table."""
    progress = on_console(width)
    with progress.study(stage, study, trials, Deadline()):
        pass
    return progress.console.export_text()


def test_the_live_table_shows_what_differs_between_trials():
    study = small_study()
    study.add_trial(create_trial(state=TrialState.FAIL))  # stopped from outside: it does not count
    text = shown(study)
    assert "study training: 3 of 5 trials" in text
    assert "rate" in text
    assert "same" not in text
    assert "best so far 0.5000 (trial 0)" in text
    study = optuna.create_study(directions=["minimize", "minimize"])
    for values in ((0.5, 3.0), (0.6, 2.0), (0.7, 2.5)):
        study.add_trial(create_trial(values=values))
    text = shown(study, "lambda_reg")
    assert "2 on the Pareto front" in text
    assert "task exit" in " ".join(text.split())


def test_the_time_left_is_never_more_than_the_deadline():
    progress, study = on_console(80), small_study()
    with progress.study("training", study, 1000, Deadline(60)):
        time.sleep(0.1)
        study.add_trial(create_trial(value=1.0))
        progress.refresh()
    left = re.search(r"about (\d+) s left", progress.console.export_text())
    assert 50 <= int(left[1]) <= 60


def test_columns_that_do_not_fit_are_left_out_whole():
    study = optuna.create_study()
    names = [f"confidence_option_{number}" for number in range(20)]
    space = {name: FloatDistribution(0, 1) for name in names}
    for value in (0.123456, 0.5):
        params = dict.fromkeys(names, value)
        study.add_trial(create_trial(value=value, params=params, distributions=space))
    lines = shown(study).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if "complete" in line]
    assert len(rows) == 2
    assert rows[0][3:] == ["0.12"] * (len(rows[0]) - 3)
    assert 4 < len(rows[0]) < 23


# ------------------------------------------------------------------ the last screen


def metrics(**changes):
    """The content of a metrics.json as `dact tune` leaves it, as far as the console looks at it."""
    entry = {"accuracy": 0.785, "macro_f1": 0.712, "majority_share": 0.4}
    entry |= {"mean_exit_layer": 2.51, "texts_per_second": 900.0}
    entry["difference_to_baseline"] = {"accuracy": -0.002, "standard_error": 0.004}
    full = {"accuracy": 0.79, "mean_exit_layer": 4, "texts_per_second": 600.0}
    entry["full_depth"] = {**entry, **full}
    curve = [
        {"margin": margin, "accuracy": 0.79 - 0.004 * step, "mean_exit_layer": 4 - 0.3 * step}
        for step, margin in enumerate((1.0, 0.95, 0.9, 0.83, 0.8, 0.7, 0.6, 0.5, 0.4))
    ]
    baseline = {"accuracy": 0.787, "macro_f1": 0.72, "texts_per_second": 450.0}
    promise = {"max_accuracy_loss": 0.01, "min_agreement": None, "max_layers": None}
    found = {
        "test": entry,
        "validation": entry,
        "baseline": {"layers": 6, "test": baseline, "validation": baseline},
        "layers": 4,
        "halting_tolerance": 0.0,
        "halting_margin": 0.83,
        "margin_curve": curve,
        "calibration": {"promise": {**promise, "confidence": 0.95}},
        "confirmation": "tuned settings (under new seeds the tuned ones differ by -0.52 ± 0.15 "
        "layers and +0.10 ± 0.40 points)",
    }
    return {**found, **changes}


def screen(folder, found, width=80, **options):
    """The lines of the last screen."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(found))
    progress = on_console(width, **options)
    show_summary(progress, folder)
    return [line.rstrip() for line in progress.console.export_text().splitlines()]


def test_the_last_screen_says_in_order_what_was_found_what_it_is_worth_and_what_to_do(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run/final"
    (folder / "defaults").mkdir(parents=True)
    (folder / "defaults/metrics.json").write_text(json.dumps({"test": metrics()["test"]}))
    lines = screen(folder.relative_to(tmp_path), metrics(), force_terminal=True)
    assert len(lines) <= 23, "and a line for the prompt"
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    order = ("Found: tuned", "Result: 78.50 %", "2.0 times its speed")
    order += ("Guaranteed with 95%", "Faster", "Next: dact serve")
    places = [text.index(one) for one in (*order, "test accuracy to whole encoder", "Total time")]
    assert places == sorted(places)
    assert "prun" not in text
    rows = [line.split("  ")[0] for line in lines[-7:-2]]
    assert rows == ["test", "whole encoder", "all 4 layers", "tuned", "your file"]
    assert lines[-4].split()[1:] == ["78.50", "%", "-0.20", "±", "0.40", "0.712", "2.51", "900"]


def test_in_a_file_sentences_and_paths_are_not_broken(tmp_path):
    lines = screen(tmp_path, metrics())
    assert any(line.startswith("Found: tuned") and line.endswith("points)") for line in lines)


@pytest.mark.parametrize(
    ("changes", "promise", "said"),
    [
        ({}, {}, "Guaranteed with 95% confidence .*at most 1 point .*without early exit"),
        ({}, {"confidence": None}, "Estimated, without a guarantee: at most 1 point"),
        (
            {},
            {"max_accuracy_loss": None, "max_layers": 2.5},
            ".*at most 2.5 of 4 layers",
        ),
        ({"halting_margin": 1.0}, {}, "by proof: each text gets the answer of all 4 layers"),
        ({"calibration": None}, {}, "Nothing is guaranteed at margin 0.83"),
    ],
)
def test_the_last_screen_says_what_is_guaranteed_and_against_what(changes, promise, said):
    found = metrics(**changes)
    if found["calibration"]:
        found["calibration"]["promise"] |= promise
    assert re.match(f".*{said}", guarantee(found))


def test_a_faster_setting_is_named_only_if_it_saves_layers_at_little_loss():
    (line,) = faster(metrics())
    assert "--halting_margin 0.6 takes 2.20 layers at -1.9 points" in line
    assert faster(metrics(margin_curve=metrics()["margin_curve"][:4])) == []


def test_a_model_that_gives_one_class_is_warned_of(tmp_path):
    entry = {**metrics()["validation"], "majority_share": 1.0}
    said = "Warning: all texts get one class"
    assert any(said in line for line in screen(tmp_path, metrics(validation=entry)))
    assert not any("Warning" in line for line in screen(tmp_path, metrics()))
