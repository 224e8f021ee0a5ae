"""TuningEngine, on encoders and data so small that a trial takes a moment."""

import contextlib
import io
import json
import pickle
import pickletools
import sqlite3
import subprocess
import sys
import time
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from typing import ClassVar
from wsgiref.util import setup_testing_defaults

import lightning.pytorch as pl
import optuna
import pytest
import torch
import yaml
from rich.console import Console

from dact import DACT, SubmodelConfig, TextClassifier, TuningEngine
from dact.calibration import Promise
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
from dact.files import read_tensors
from dact.tuning.features import Features, FeaturesData, compute_features
from dact.tuning.outcome import OUTCOME, Outcome
from dact.tuning.stages import STAGES as ALL_STAGES
from dact.tuning.trial import CAUSE
from tests.conftest import free_port, tiny_model

optuna.logging.set_verbosity(optuna.logging.ERROR)
STAGES = [stage.name for stage in ALL_STAGES]


def small_model(**overrides):
    return DACT(encoder=TransformerEncoder(42, 3, 8, 2), **{"learning_rate": 3e-3, **overrides})


def chosen_settings(run):
    return json.loads((run / "run.json").read_text())["steps"]["confirmation"]["settings"]


small_data = partial(CompositionalSentiment, num_train=120, num_val=60, num_test=60)


# With this limit, which is none, few examples get no more epochs.
QUICK = {"max_epochs": 1, "accelerator": "cpu", "limit_train_batches": 1.0}


def engine(tmp_path, **options):
    defaults = {"model": small_model, "data": small_data, "n_trials": 3, "log_dir": tmp_path}
    defaults["trainer"] = QUICK
    space = {"batch_size": {"choices": [32, 64]}, "num_epochs": {"choices": [1, 2]}}
    made = TuningEngine(**{**defaults, "search_space": space, **options})
    made.progress.console.quiet = True
    return made


def study_of(tmp_path, stage, tag="run"):
    return optuna.load_study(
        study_name=f"{tag}/{stage}", storage=f"sqlite:///{tmp_path / tag / 'studies.db'}"
    )


def metrics_of(run):
    return json.loads((run / "final" / "metrics.json").read_text())


def prepared_of(made, tag="run"):
    """What all fits of a run share, after it was made."""
    with made._run(tag) as prepared:
        return prepared


# ------------------------------------------------------------------ the whole

TRIALS = {"finetune": 3, "frozen": 2}
once = pytest.mark.parametrize("tuned", ["finetune"], indirect=True)


@pytest.fixture(scope="module", params=TRIALS)
def tuned(request, tmp_path_factory):
    """An engine after its pipeline, and where it ran."""
    folder, trials = tmp_path_factory.mktemp(request.param), TRIALS[request.param]
    options = {"encoder_training": request.param, "warm_up_epochs": 1, "n_trials": trials}
    made = engine(folder, time_out=60, **options)
    made.progress.console = Console(
        file=io.StringIO(), width=150, force_terminal=True, color_system=None
    )
    return made, folder / "run", made.run_pipeline("run")


def test_the_pipeline_leaves_what_the_design_lists(tuned):
    made, run, paths = tuned
    assert paths == (
        str(run / "final" / "metrics.json"),
        str(run / "final" / "checkpoints" / "best.ckpt"),
    )
    for stage in STAGES:
        for number in range(TRIALS[made.recipe.encoder_training]):
            assert any((run / stage / f"trial_{number:04d}").glob("events.out.tfevents.*"))
        assert any((run / stage / "study").glob("*.png"))
    for name in ("classifier_config", "confidence_config", "external_config"):
        assert yaml.safe_load((run / f"{name}.yaml").read_text()) == getattr(made, name)
    stored = yaml.safe_load((run / "lambda_reg.yaml").read_text())
    assert stored == {"lambda_reg": made.lambda_reg}
    SubmodelConfig(**made.classifier_config)
    SubmodelConfig(**made.confidence_config)
    assert made.external_config.keys() >= {"batch_size", "num_epochs", "num_layers"}
    rate = "learning_rate" in made.external_config
    assert rate == (made.recipe.encoder_training == "finetune")
    final = {path.name for path in (run / "final").iterdir()}
    assert final >= {"checkpoints", "config.yaml", "metrics.json", "model", "dials.png"}
    assert {str(path) for path in run.rglob("*.ckpt")} == {paths[1]}


def test_the_model_that_comes_out_is_one_ordinary_dact(tuned):
    _, run, (_, model_path) = tuned
    model = DACT.load_from_checkpoint(model_path)
    chosen = chosen_settings(run)
    assert all(getattr(model, name) == chosen[name] for name in ("num_layers", "detach_exits"))
    assert model.distillation == 0.5, "half of its targets come from the baseline"
    data = small_data()
    data.setup("test")
    metrics = metrics_of(run)
    plain = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=run
    )
    measured = plain.test(model, data, verbose=False)[0]
    assert measured["test_accuracy"] == pytest.approx(metrics["test"]["accuracy"])
    assert measured["test_exit_layer"] == pytest.approx(metrics["test"]["mean_exit_layer"])
    classifier = TextClassifier.from_pretrained(run / "final" / "model")
    assert classifier.class_names == ["negative", "neutral", "positive"]
    labels = [classifier.class_names[label] for label in data.splits["test"].labels]
    predictions = classifier(data.splits["test"].texts)
    right = sum(p.label == label for p, label in zip(predictions, labels, strict=True))
    assert right / len(labels) == pytest.approx(metrics["test"]["accuracy"])


def test_metrics_have_the_keys_of_the_design(tuned):
    _, run, _ = tuned
    metrics = metrics_of(run)
    keys = {"validation", "test", "baseline", "tolerance_curve", "margin_curve", "history"}
    more = {"lambda_reg", "layers", "halting_tolerance", "halting_margin", "calibration"}
    assert set(metrics) == keys | more | {"confirmation"}
    compared = {"accuracy", "macro_f1", "task_loss", "texts_per_second"}
    quality = compared | {"majority_share", "mean_exit_layer", "exit_histogram"}
    defaults = json.loads((run / "final" / "defaults" / "metrics.json").read_text())
    for split in ("validation", "test"):
        found, baseline = metrics[split], metrics["baseline"][split]
        assert set(found) >= quality | {"full_depth", "agreement", "difference_to_baseline"}
        assert set(found["full_depth"]) == quality
        assert set(baseline) == compared
        assert sum(found["exit_histogram"]) == sum(defaults[split]["exit_histogram"]) == 60
        assert found["full_depth"]["mean_exit_layer"] == metrics["layers"]
        difference = found["accuracy"] - baseline["accuracy"]
        assert found["difference_to_baseline"]["accuracy"] == pytest.approx(difference)
    curve = {"tolerance", "accuracy", "mean_exit_layer", "agreement"}
    assert {*metrics["tolerance_curve"][0]} >= curve
    assert len(metrics["history"]) == chosen_settings(run)["num_epochs"]
    assert all("train_loss" in record for record in metrics["history"])


def test_the_studies_hold_what_the_objectives_say(tuned):
    made, run, _ = tuned
    submodels, training, lambdas = (study_of(run.parent, stage) for stage in STAGES)
    assert made.external_config == training.best_trial.params
    for name, value in submodels.best_trial.params.items():
        prefix, _, field = name.partition("_")
        assert getattr(made, f"{prefix}_config")[field] == value
    assert all(1 <= layers <= 3 for _, layers in (trial.values for trial in lambdas.trials))
    assert made.lambda_reg in [trial.params["lambda_reg"] for trial in lambdas.trials]
    assert all(len(Outcome.unpacked(one.user_attrs[OUTCOME]).exits) == 60 for one in lambdas.trials)
    for trial in (*submodels.trials, *training.trials):
        assert trial.value == pytest.approx(min(trial.intermediate_values.values()))
    # The first trials have settings that paid, and those of the factories.
    assert submodels.trials[0].params["classifier_hidden_units"] == SubmodelConfig().hidden_units
    first, own = (trial.params for trial in training.trials[:2])
    assert (first["num_layers"], own["num_layers"]) == (2, 3)
    assert own["submodel_learning_rate"] == 3e-3
    assert lambdas.trials[0].params["lambda_reg"] == pytest.approx(0.04 / 2)


def test_the_baseline_is_full_depth_fine_tuned(tuned):
    _, run, _ = tuned
    baseline, data = DACT.from_pretrained(run / "whole_encoder" / "model"), small_data()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(baseline.early_exit(batch).exit_layer, torch.full((60,), 3))
    right = (baseline(batch).probabilities.argmax(1) == batch["labels"]).float().mean().item()
    assert metrics_of(run)["baseline"]["test"]["accuracy"] == pytest.approx(right)


def test_the_baseline_is_the_whole_encoder_even_if_the_model_keeps_fewer_layers(tmp_path):
    def cut(**overrides):
        return small_model(**{"num_layers": 2, **overrides})

    made = engine(tmp_path, model=cut, n_trials=1, encoder_training="frozen", warm_up_epochs=1)
    made.train_tune_study("run")
    assert DACT.from_pretrained(tmp_path / "run" / "whole_encoder" / "model").num_layers == 3
    first = study_of(tmp_path, "training").trials[0]
    assert first.params["num_layers"] == 2
    assert first.distributions["num_layers"].high == 3, "trials may keep all layers"
    assert Features(tmp_path / "run" / "features" / "train").arrays["states"].shape[1] == 3


def test_a_second_call_reuses_everything(tuned):
    made, run, paths = tuned
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")}
    mode = made.recipe.encoder_training
    options = {"encoder_training": mode, "n_trials": TRIALS[mode]}
    again = engine(run.parent, warm_up_epochs=1, **options)
    assert again.run_pipeline("run") == paths
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")} == before
    for stage in STAGES:
        assert len(study_of(run.parent, stage).trials) == TRIALS[mode]
    assert again.external_config == made.external_config


@contextlib.contextmanager
def tensorboard(run):
    """What a TensorBoard server that has read a run answers to a path, or to a POST with a body."""
    port = str(free_port())
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run, "--port", port]
    command += ["--load_fast", "false"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        address = f"http://127.0.0.1:{port}/data/plugin/{path}"
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    names = {str(path.parent.relative_to(run)) for path in run.rglob("events.out.tfevents.*")}
    end, read = time.monotonic() + 90, 0
    try:
        while read < 2:  # what is there for the first time may still be growing
            assert time.monotonic() < end, "TensorBoard does not show the run"
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                read = read + 1 if names <= {*ask("scalars/tags"), *ask("images/tags")} else 0
        yield ask
    finally:
        server.terminate()
        server.wait(30)


@once
def test_a_tensorboard_server_shows_every_trial_with_its_metrics_status_and_pictures(tuned):
    _, run, _ = tuned
    states = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]
    question = {"experimentName": "", "allowedStatuses": states, "colParams": []}
    question |= {"startIndex": 0, "sliceSize": 100}
    with tensorboard(run) as ask:
        experiment = ask("hparams/experiment", {"experimentName": ""})
        found = ask("hparams/session_groups", question)["sessionGroups"]
        pictures = {run: set(content) for run, content in ask("images/tags").items()}
    shown = {info["name"] for info in experiment["hparamInfos"]}
    assert shown >= {"submodel_learning_rate", "confidence_dropout", "lambda_reg"}
    assert "best/val_accuracy" in {info["name"]["tag"] for info in experiment["metricInfos"]}
    groups = {group["name"]: group for group in found}
    trials = {
        f"run/{stage}/trial_{trial.number:04d}": trial
        for stage in STAGES
        for trial in study_of(run.parent, stage).trials
    }
    fits = {"run/whole_encoder", "run/final", "run/final/defaults", "run/refit/recommended"}
    assert trials.keys() | fits <= groups.keys() <= trials.keys() | fits | {"run/refit/tuned"}
    for name in fits:
        named = {value["name"]["tag"] for value in groups[name]["metricValues"]}
        assert named >= {"best/val_loss", "best/val_accuracy", "best/val_exit_layer"}, name
    baseline, _ = read_tensors(run / "whole_encoder" / "answers.safetensors")
    for name, trial in trials.items():
        complete = trial.state == optuna.trial.TrialState.COMPLETE
        (session,) = groups[name]["sessions"]
        assert session["status"] == states[not complete]
        assert trial.params.keys() <= groups[name]["hparams"].keys()
        values = {
            value["name"]["tag"]: value["value"] for value in groups[name].get("metricValues", [])
        }
        if complete and len(trial.values) == 1:
            assert values["best/val_loss"] == pytest.approx(trial.value)
        elif complete:
            both = values["best/val_task_loss"], values["best/val_exit_layer"]
            assert both == pytest.approx(tuple(trial.values))
            lost = Outcome.unpacked(trial.user_attrs[OUTCOME]).lost.double()
            early = baseline["right"][: len(lost)].double().mean() - lost.mean()
            assert values["best/val_accuracy"] == pytest.approx(early.item())
    assert pictures["submodels/study"] >= {"optimization history"}
    histories = {"history of the task loss", "history of the exit layer"}
    assert pictures["lambda_reg/study"] == histories | {"Pareto front"}
    assert pictures["final"] >= {"dials", "exit histogram"}


@once
def test_the_studies_open_in_optuna_dashboard(tuned):
    from optuna_dashboard import wsgi

    storage = optuna.storages.RDBStorage(f"sqlite:///{tuned[1] / 'studies.db'}")
    environ, status = {"PATH_INFO": "/api/studies"}, []
    setup_testing_defaults(environ)
    body = b"".join(wsgi(storage)(environ, lambda line, *_: status.append(line)))
    assert status == ["200 OK"]
    studies = json.loads(body)["study_summaries"]
    assert {study["study_name"] for study in studies} == {f"run/{stage}" for stage in STAGES}


def is_pickle(content):
    with contextlib.suppress(Exception):
        names = [operation.name for operation, *_ in pickletools.genops(content)]
        return names[-1:] == ["STOP"] and len(names) > 2
    return False


def test_a_run_leaves_no_pickle_but_checkpoints_that_hold_data_alone(tuned):
    assert is_pickle(pickle.dumps({"a": [1]})), "the scan finds pickles"
    _, run, (_, checkpoint) = tuned
    torch.load(checkpoint, weights_only=True)
    files = {path for path in run.rglob("*") if path.is_file()} - {Path(checkpoint)}
    assert len(files) > 20
    for path in files:
        assert not is_pickle(path.read_bytes()), path
        assert not zipfile.is_zipfile(path), path
    connection = sqlite3.connect(run / "studies.db")
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (table,) in tables:
        for row in connection.execute(f"SELECT * FROM {table}"):
            assert not any(isinstance(value, bytes) for value in row), f"{table} holds bytes"


@pytest.mark.slow
@once
def test_two_runs_with_one_seed_give_the_same_weights(tuned, tmp_path):
    engine(tmp_path, encoder_training="finetune", warm_up_epochs=1).run_pipeline("run")
    found = []
    for folder in (tuned[1].parent, tmp_path):
        trials = [
            (trial.params, trial.values)
            for stage in STAGES
            for trial in study_of(folder, stage).trials
        ]
        model = folder / "run" / "final" / "model" / "model.safetensors"
        found.append((json.dumps(trials), model.read_bytes()))
    assert found[0] == found[1]


# ------------------------------------------------------------------ objectives on their own


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_objectives_serve_studies_of_ones_own_which_log_apart(tmp_path, mode):
    for name in ("first", "second/try"):
        made = engine(tmp_path, encoder_training=mode, warm_up_epochs=0)
        made.run_tag, made.progress.console = "mine", Console(file=io.StringIO())
        study = optuna.create_study(study_name=name)
        study.optimize(made.submodel_objective, n_trials=1)
        assert study.best_value > 0
        fitted = "whole encoder, " in made.progress.console.file.getvalue()
        assert fitted == (name == "first"), "they start from one baseline"
    own = tmp_path / "mine" / "own"
    assert {str(path.relative_to(own)) for path in own.rglob("trial_0000")} == {
        "first/submodels/trial_0000",
        "second_try/submodels/trial_0000",
    }
    fixed = {"learning_rate": 1e-3, "submodel_learning_rate": 1e-3, "batch_size": 64}
    fixed |= {"num_epochs": 1, "num_layers": 2, "exit_loss_weight": 0.3, "detach_exits": True}
    fixed |= {"lambda_reg": 0.05}
    assert isinstance(made.train_tune_objective(optuna.trial.FixedTrial(fixed)), float)
    loss, layers = made.lambda_objective(optuna.trial.FixedTrial(fixed, number=1))
    assert loss > 0
    assert 1 <= layers <= 3


@pytest.mark.slow
def test_the_third_study_measures_where_the_promise_would_let_examples_leave(tmp_path):
    promise = Promise(min_agreement=0.5, confidence=None)
    trial = optuna.trial.FixedTrial({"lambda_reg": 0.01}, number=0)
    trainer = {**QUICK, "max_epochs": 8}
    early = engine(tmp_path / "promise", trainer=trainer, promise=promise).lambda_objective(trial)
    provable = engine(tmp_path / "proof", trainer=trainer, promise=None).lambda_objective(trial)
    assert early[1] < provable[1]


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.slow
def test_final_train_lists_what_is_still_untuned_in_its_run(tmp_path):
    made = engine(tmp_path, n_trials=1)
    with pytest.raises(RuntimeError, match="not tuned yet: classifier_config"):
        made.final_train("none")
    assert not (tmp_path / "none" / "baseline").exists(), "said before anything is fitted"
    made.joint_tune_study("one")
    with pytest.raises(RuntimeError, match="not tuned yet: external_config, lambda_reg"):
        made.final_train("one")
    made.train_tune_study("two")
    assert made.classifier_config is None, "winners of one run do not enter another"
    with pytest.raises(RuntimeError, match="classifier_config"):
        made.final_train("two")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "state"), [("nan", "PRUNED"), ("memory", "FAIL")])
def test_broken_trials_end_with_their_cause_and_the_study_goes_on(tmp_path, how, state):
    class Breaks(DACT):
        def validation_step(self, batch, batch_idx):
            result = super().validation_step(batch, batch_idx)
            if self.learning_rate > 1e-3:
                if how == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")
                self._metrics[0].sums += float(how)
            return result

    def model(**overrides):
        return Breaks(encoder=TransformerEncoder(42, 2, 8, 2), **overrides)

    space = {"learning_rate": {"low": 1e-4, "high": 1e-2}, "num_epochs": {"choices": [1]}}
    engine(tmp_path, model=model, n_trials=5, search_space=space).train_tune_study("run")
    trials = study_of(tmp_path, "training").trials
    broken = [trial for trial in trials if trial.params["learning_rate"] > 1e-3]
    assert len(trials) == 5
    assert 0 < len(broken) < 5
    assert all(trial.state.name == state and trial.user_attrs[CAUSE] for trial in broken)
    assert all(trial.state.name != "FAIL" for trial in trials if trial not in broken)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"time_out": 0}, ValueError, "time_out must be above 0, got 0: it is in minutes"),
        ({"n_trials": -1}, ValueError, "n_trials.*got -1"),
        ({"workers": 0}, ValueError, "workers must be 1 or more, got 0"),
        ({"encoder_training": "thawed"}, ValueError, "'finetune', 'frozen', got 'thawed'"),
        ({"lambda_selection": "max_layers"}, ValueError, "max_layers"),
        ({"distillation": 1.5}, ValueError, r"distillation must be in \[0, 1\], got 1.5"),
        ({"final_training": "frozen"}, ValueError, "requires encoder_training='frozen'"),
        ({"model": tiny_model()}, TypeError, "model must be a function that makes one"),
        ({"trainer": {"max_epoch": 3}}, TypeError, "'max_epoch'"),
    ],
)
def test_wrong_options_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        TuningEngine(**options)


def test_a_model_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give both the same"):
        engine(tmp_path, output_dimension=4).joint_tune_study("run")


class OwnData(pl.LightningDataModule):
    """Data of somebody else: dicts of tensors, and each stage sets up what it is about."""

    def __init__(self, batch_size=8, source="here"):
        super().__init__()
        self.save_hyperparameters()  # part of what a run compares
        self.batch_size, self.ready = self.hparams.batch_size, set()

    def setup(self, stage):
        self.ready.add(stage)

    def train_dataloader(self, stage="fit"):
        assert stage in self.ready
        ids = torch.randint(3, 42, (24, 5), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": one, "labels": i % 3} for i, one in enumerate(ids)]
        return torch.utils.data.DataLoader(rows, self.batch_size)

    val_dataloader = train_dataloader

    def test_dataloader(self):
        return self.train_dataloader("test")


@pytest.mark.slow
def test_data_and_a_model_of_ones_own_are_tuned(tmp_path):
    class Own(DACT):
        momenta: ClassVar[list[float]] = []

        def __init__(self, *, momentum=0.9, **arguments):
            super().__init__(**arguments)
            self.momenta.append(momentum)

    def model(classifier=None, confidence=None, **arguments):  # no more than what studies choose
        own = {} if classifier is None else {"classifier": classifier, "confidence": confidence}
        assert not arguments.keys() & {"distillation", "encoder"}
        return Own(encoder=TransformerEncoder(42, 2, 8, 2), momentum=0.1, **own, **arguments)

    options = {"encoder_training": "frozen", "warm_up_epochs": 1, "compare_defaults": False}
    engine(tmp_path, n_trials=1, model=model, data=OwnData, **options).run_pipeline("run")
    assert {*Own.momenta} == {0.1}
    assert metrics_of(tmp_path / "run")["test"]["exit_histogram"]
    other = engine(tmp_path, model=model, data=partial(OwnData, source="elsewhere"), **options)
    with pytest.raises(ValueError, match="began with another data.source"):
        other.run_pipeline("run")


# ------------------------------------------------------------------ time


class Slow(pl.Callback):
    """Sleeps after each batch for `seconds`, which belong to the class since every fit has a copy
    of its callbacks."""

    seconds: ClassVar[float] = 0.0

    def on_train_batch_end(self, *args):
        time.sleep(self.seconds)


@pytest.mark.slow
def test_the_deadline_stops_a_trial_in_flight_and_with_more_time_it_runs_again(
    tmp_path, monkeypatch
):
    trainer = {**QUICK, "callbacks": [Slow()]}
    options = {"trainer": trainer, "data": partial(small_data, batch_size=16)}
    made = engine(tmp_path, n_trials=5, **options)
    prepared_of(made)  # what trials share is not bounded
    made.time_out = 2
    monkeypatch.setattr(Slow, "seconds", 2.5)
    with pytest.raises(RuntimeError, match="raise time_out"):
        made.joint_tune_study("run")
    monkeypatch.setattr(Slow, "seconds", 0.0)
    engine(tmp_path, n_trials=1, **options).joint_tune_study("run")
    first, *_, last = study_of(tmp_path, "submodels").trials
    assert (first.state.name, last.state.name) == ("FAIL", "COMPLETE")
    assert CAUSE not in first.user_attrs, "it does not count"
    assert last.params == first.params


# ------------------------------------------------------------------ frozen mode and workers


def test_features_are_the_states_of_the_encoder_in_an_order_for_each_epoch(tmp_path):
    encoder, data = TransformerEncoder(42, 3, 8, 2).eval(), small_data()
    data.setup("fit")
    compute_features(encoder, data.val_dataloader(), tmp_path)
    features = Features(tmp_path)
    stored = next(iter(FeaturesData(features, features, batch_size=16, seed=0).val_dataloader()))
    plain = list(data.val_dataloader())
    with torch.no_grad():
        states = torch.cat([encoder(batch) for batch in plain])
    torch.testing.assert_close(stored["states"], states)
    assert torch.equal(stored["labels"], torch.cat([batch["labels"] for batch in plain]))

    def order(epoch):
        """That of a fit, which may have resumed."""
        loader = FeaturesData(features, features, batch_size=16, seed=0).train_dataloader()
        loader.sampler.set_epoch(epoch)  # as a Trainer does
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [16, 16, 16, 12]
        return [batch["states"].sum().item() for batch in batches]

    assert order(1) == order(1) != order(0)


@pytest.mark.slow
def test_the_frozen_encoder_stays_where_it_is_asked_to(tmp_path):
    options = {"encoder_training": "frozen", "warm_up_epochs": 1, "compare_defaults": False}
    made = engine(tmp_path, final_training="frozen", n_trials=1, **options)
    _, model_path = made.run_pipeline("run")
    warmed, _ = read_tensors(tmp_path / "run" / "features" / "encoder.safetensors")
    model = DACT.load_from_checkpoint(model_path)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, warmed[name]), name
    names = ["negative", "neutral", "positive"]
    assert model.class_names == names, "whatever the final fit trains on"


@pytest.mark.slow
def test_workers_share_the_trials_of_a_study(tmp_path):
    made = engine(tmp_path, workers=2, n_trials=5, encoder_training="frozen", warm_up_epochs=0)
    made.joint_tune_study("run")
    trials = study_of(tmp_path, "submodels").trials
    assert len(trials) in (5, 6), "each process counts before it draws, so one more may run"
    assert all(trial.state.is_finished() for trial in trials)
    assert len({json.dumps(trial.params, sort_keys=True) for trial in trials}) == len(trials)
