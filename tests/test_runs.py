"""A run on disk and its studies: the manifest, what is resumed, and what is refused."""

import io
import multiprocessing
from functools import partial
from pathlib import Path

import optuna
import psutil
import pytest
import torch
from rich.console import Console

from dact import DACT
from dact.calibration import Promise
from dact.data import TextClassificationData
from dact.data.tokenizers import word_tokenizer
from dact.files import read_json
from dact.tuning import studies
from dact.tuning.progress import Progress
from dact.tuning.recipe import trainer_arguments
from dact.tuning.run import Run
from dact.tuning.settings import Settings
from dact.tuning.stages import LAMBDA_REG, SUBMODELS, TRAINING
from dact.tuning.trainer import Deadline, enough_epochs, make_trainer
from dact.tuning.trial import CAUSE
from tests.test_tuning import engine, prepared_of, small_data, small_model

PARTS = {"classifier_config": {"dropout": 0.1}, "confidence_config": {"dropout": 0.2}}


# ------------------------------------------------------------------ the manifest


@pytest.mark.parametrize("tag", ["", "..", "/tmp/x", "a\\b", "a b", "a\nb", "x/../../y"])
def test_a_run_tag_never_leads_out_of_the_log_folder(tag, tmp_path):
    with pytest.raises(ValueError, match="run_tag must be a name"):
        Run(tag, tmp_path)
    if tag:
        with pytest.raises(ValueError, match="run_tag must be a name"):
            engine(tmp_path).joint_tune_study(tag)
    assert not list(tmp_path.iterdir())


def test_new_winners_make_the_later_steps_start_over(tmp_path):
    run = Run("run", tmp_path)
    with run.opened({}):
        run.save(SUBMODELS, PARTS, [3, None])
        run.save(TRAINING, {"external_config": {"num_epochs": 2}}, [3, None])
        run.save(LAMBDA_REG, {"lambda_reg": 0.1}, [3, None])
        run.store("final", {"metrics": "x"})
        run.final.mkdir()
        run.save(SUBMODELS, PARTS, [4, None])
        assert run.winners()["lambda_reg"] == 0.1, "the same winner: nothing starts over"
        run.save(SUBMODELS, {**PARTS, "classifier_config": {"dropout": 0.3}}, [5, None])
        run.save(LAMBDA_REG, {"lambda_reg": 0.2}, [3, None])
        run.save(TRAINING, {"external_config": {"num_epochs": 3}}, [3, None])
        assert run.winners()["lambda_reg"] is None, "chosen without its predecessor"
        run.drop_after("submodels")
    left = {"classifier_config": {"dropout": 0.3}, "confidence_config": {"dropout": 0.2}}
    assert run.winners() == {**left, "external_config": None, "lambda_reg": None}
    assert run.result("final") is None
    assert (run.folder / "final.outdated_1").is_dir()
    assert "dropout: 0.3" in (run.folder / "classifier_config.yaml").read_text()


def hold(folder, ready, done):
    with Run("run", folder).opened({}):
        ready.set()
        done.wait(60)


def test_a_second_command_under_the_same_tag_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    ready.wait(60)
    with pytest.raises(ValueError, match="another process works on run 'run'.*another run_tag"):
        with Run("run", tmp_path).opened({}):
            pass
    done.set()
    process.join()
    with Run("run", tmp_path).opened({}):
        pass


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A log folder with a run whose first study has a trial."""
    folder = tmp_path_factory.mktemp("begun")
    engine(folder, n_trials=1).joint_tune_study("run")
    return folder


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": partial(small_model, weight_decay=0.5)}, "model.weight_decay"),
        ({"data": partial(small_data, seed=9)}, "data.seed"),
        ({"promise": Promise(min_agreement=0.5, confidence=None)}, "tuner.promise"),
        ({"seed": 1}, "tuner.seed"),
    ],
)
def test_another_configuration_under_the_same_tag_is_refused(begun, changes, what):
    with pytest.raises(ValueError, match=f"run 'run' began with another {what}"):
        engine(begun, n_trials=2, **changes).joint_tune_study("run")


def test_numbers_of_trials_and_workers_are_not_compared(begun):
    engine(begun, n_trials=1, time_out=30, workers=2).joint_tune_study("run")


def test_a_changed_data_file_under_the_same_tag_is_refused(tmp_path):
    rows = [f"it {i} is {('great,yes', 'awful,no')[i % 2]}\n" for i in range(40)]
    tokenizer, file = word_tokenizer(["it", "is", "great", "awful"]), tmp_path / "train.csv"

    def data(**overrides):
        return TextClassificationData(file, tokenizer=tokenizer, max_length=8, **overrides)

    def tune():
        options = {"data": data, "output_dimension": 2, "n_trials": 1}
        model = partial(small_model, output_dimension=2)
        engine(tmp_path, model=model, **options).joint_tune_study("run")

    file.write_text("text,label\n" + "".join(rows))
    tune()
    file.write_text("text,label\n" + "".join(sorted(rows)))
    with pytest.raises(ValueError, match="began with another files.*train.csv"):
        tune()


# ------------------------------------------------------------------ studies


def open_one(tmp_path, stage=SUBMODELS, before=None):
    run = Run("run", tmp_path)
    run.folder.mkdir(exist_ok=True)
    return studies.open_study(run, stage, None, before or Settings())


def job_of(objective, n_trials):
    """A job whose objective is any function of a trial."""
    objective.deadline = Deadline()
    sampler = optuna.samplers.RandomSampler(seed=0)
    return studies.StudyJob(objective, n_trials, None, sampler, None)


def states(study):
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def quiet(*_):
    pass


def test_an_interrupted_trial_does_not_count_and_runs_again_with_its_parameters(tmp_path):
    study = open_one(tmp_path)

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 1:
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        studies.run_study(job_of(objective, 3), study, 1, quiet)
    assert states(study) == ["COMPLETE", "FAIL"]
    again = open_one(tmp_path)
    studies.run_study(job_of(objective, 3), again, 1, quiet)
    assert states(again) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert again.trials[2].params == again.trials[1].params
    assert len({trial.params["x"] for trial in again.trials}) == 3, "no other point is drawn twice"


def test_a_trial_whose_process_died_is_failed_and_runs_again(tmp_path):
    study = open_one(tmp_path)
    dead = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    assert states(study) == ["RUNNING"]
    again = open_one(tmp_path)
    assert states(again) == ["FAIL"]
    studies.run_study(job_of(lambda trial: trial.suggest_float("x", 0, 1), 1), again, 1, quiet)
    assert states(again) == ["FAIL", "COMPLETE"]
    assert again.trials[1].params == dead.params


def test_a_study_whose_every_trial_fails_ends_and_says_why(tmp_path):
    study = open_one(tmp_path)

    def broken(trial):
        trial.set_user_attr(CAUSE, "KeyError: 'nothing'")
        raise KeyError("nothing")

    studies.run_study(job_of(broken, 3), study, 1, quiet)
    assert states(study) == ["FAIL"] * 3
    with pytest.raises(RuntimeError, match="none of its 3 trials finished. Trial 0: KeyError"):
        studies.completed(study)


def test_trials_that_were_queued_before_the_run_come_first(tmp_path):
    run = Run("run", tmp_path)
    run.folder.mkdir()
    mine = optuna.create_study(
        study_name="run/submodels", storage=studies.open_storage(None, run), direction="minimize"
    )
    mine.enqueue_trial({"x": 0.25})
    study = open_one(tmp_path)
    studies.queue_first(study, [{"x": 0.75}], 3)
    job = job_of(lambda t: t.suggest_float("x", 0, 1), 3)
    studies.run_study(job, study, 1, quiet)
    assert [trial.params["x"] for trial in study.trials[:2]] == [0.25, 0.75]
    assert states(study) == ["COMPLETE"] * 3


def test_trials_under_other_winners_are_kept_under_another_name(tmp_path):
    before = Settings.of_winners(PARTS)
    study = open_one(tmp_path, stage=TRAINING, before=before)
    studies.run_study(job_of(lambda trial: 1.0, 2), study, 1, quiet)
    (tmp_path / "run" / "training" / "trial_0000").mkdir(parents=True)
    same = open_one(tmp_path, stage=TRAINING, before=before)
    assert len(same.trials) == 2
    other = open_one(tmp_path, stage=TRAINING, before=Settings({"classifier": {"dropout": 0.9}}))
    assert other.trials == []
    kept = optuna.load_study(study_name="run/training/outdated_1", storage=other._storage)
    assert len(kept.trials) == 2
    assert (tmp_path / "run" / "training.outdated_1" / "trial_0000").is_dir()


# ------------------------------------------------------------------ fits


@pytest.mark.parametrize(("devices", "kept"), [("auto", 1), (None, 1), ([0], [0]), ("1,", "1,")])
def test_a_trial_runs_on_one_device(devices, kept):
    assert trainer_arguments({"devices": devices})["devices"] == kept


@pytest.mark.parametrize("given", [{"devices": 2}, {"devices": "0,1"}, {"num_nodes": 2}])
def test_more_devices_for_a_trial_are_refused(given):
    with pytest.raises(ValueError, match="a trial runs on one device"):
        trainer_arguments(given)


@pytest.mark.parametrize(("gpus", "given"), [(1, [1, 1, 1]), (2, [[0], [1], [0]])])
def test_workers_take_gpus_of_their_own(gpus, given):
    recipe = engine(Path("unused")).recipe
    recipe = recipe.__class__(**{**vars(recipe), "trainer": trainer_arguments({})})
    assert [recipe.for_worker(n, gpus).trainer["devices"] for n in range(3)] == given


def test_a_trainer_of_a_run_has_its_own_progress_checkpoints_and_copies_of_callbacks():
    from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer

    timer = Timer()
    given = {"callbacks": [RichProgressBar(), ModelCheckpoint(), timer], "accelerator": "cpu"}
    trainer = make_trainer(given, enable_checkpointing=False)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert Timer in kinds
    assert timer not in trainer.callbacks
    assert not {RichProgressBar, ModelCheckpoint} & {*kinds}


def test_on_few_texts_the_epochs_make_enough_steps():
    data = small_data(batch_size=20)
    data.setup("fit")
    assert enough_epochs({}, data, 4, 150) == 25
    assert enough_epochs({"accumulate_grad_batches": 2}, data, 4, 150) == 28
    progress = Progress()
    progress.console = Console(file=io.StringIO())
    with progress.fit("whole encoder", 25, asked=4):
        pass
    said = "whole encoder, 25 epochs instead of 4 since texts are few: 0 s"
    assert progress.console.file.getvalue().startswith(said)


def test_a_teacher_of_the_batches_teaches_the_trials(tmp_path):
    """Data that carries a teacher of its own is not taught by the whole encoder."""

    def data(**overrides):
        made = small_data(**overrides)
        made.teacher_probabilities = torch.full((120, 3), 1 / 3)
        return made

    prepared = prepared_of(engine(tmp_path, data=data))
    assert prepared.teacher is None
    assert prepared.learning == {"distillation": 0.5}


def test_a_run_without_trials_fits_the_recommended_settings(tmp_path):
    """And the task loss that it says is the weighted one."""
    model = partial(small_model, class_weights=[1.0, 5.0, 1.0])
    made = engine(tmp_path, model=model, n_trials=0, promise=None, compare_defaults=False)
    metrics, checkpoint = made.run_pipeline("run")
    model = DACT.load_from_checkpoint(checkpoint)
    assert (model.num_layers, model.detach_exits, model.distillation) == (2, True, 0.5)
    assert not (tmp_path / "run" / "studies.db").exists()
    found = read_json(Path(metrics))
    best = min(found["history"], key=lambda epoch: epoch["val_loss"])
    assert found["validation"]["task_loss"] == pytest.approx(best["val_task_loss"], rel=1e-4)


@pytest.mark.slow
def test_many_trials_leave_nothing_behind(tmp_path):
    """Memory, open files, threads and processes stay, and each trial takes some kilobytes on
    disk."""
    process, readings = psutil.Process(), {}

    def usage():
        return {
            "memory": process.memory_info().rss / 2**20,
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "processes": len(process.children(recursive=True)),
        }

    def watch(study, trial):
        if trial.number in (8, 21):
            readings[trial.number] = usage()

    engine(
        tmp_path, encoder_training="frozen", warm_up_epochs=0, n_trials=22, callbacks=[watch]
    ).joint_tune_study("run")
    early, late = readings[8], readings[21]
    assert late["memory"] - early["memory"] < 13
    assert late["files"] <= early["files"] + 5
    assert late["threads"] <= early["threads"] + 2
    assert late["processes"] == early["processes"]
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert size < 22 * 100_000
