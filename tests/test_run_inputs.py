"""What factories, data and options may be in a run: each is used as it says, or refused before any
work."""

import dataclasses
import datetime
import io
import socket
import threading
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dact import DACT, TuningEngine
from dact.calibration import Promise
from dact.calibration.bounds import mean_upper_bound
from dact.cli.main import quiet_studies
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
from dact.factories import DataFactory, ModelFactory
from dact.files import read_json
from dact.submodels import SubmodelConfig
from dact.tuning import workers
from dact.tuning.baseline import _probabilities
from dact.tuning.digests import digest, teacher_digest
from dact.tuning.fitting import enough_epochs
from dact.tuning.pictures import pareto_picture
from dact.tuning.recipe import is_plain
from dact.tuning.retries import OWNER, unwatched
from dact.tuning.selection import Point
from dact.tuning.stages import TRAINING
from tests.commands import GENERATED
from tests.test_tuning import engine, small_data, small_model, study_of


def quick(folder, **options):
    return engine(
        folder, **{"n_trials": 1, "trainer": {"max_epochs": 1, "accelerator": "cpu"}, **options}
    )


@pytest.mark.slow
@pytest.mark.parametrize("side", ["model", "data"])
def test_a_teacher_that_only_one_factory_asks_for_is_none_for_the_untuned_defaults(tmp_path, side):
    if side == "model":
        options = {"model": partial(small_model, distillation=0.5)}
    else:
        folder = tmp_path / "teacher"
        made = small_data()
        made.setup("fit")
        teacher = small_model()
        teacher.class_names = made.class_names
        teacher.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)

        def with_teacher(**overrides):
            data = small_data(**overrides)
            data.teacher = str(folder)
            return data

        options = {"data": with_teacher}
    metrics, _ = quick(tmp_path, **options).run_pipeline("run")
    assert read_json(Path(metrics))["confirmation"]
    assert read_json(Path(metrics).parent / "defaults" / "metrics.json")["test"]["accuracy"] > 0


@pytest.mark.slow
def test_a_frozen_final_model_trains_as_long_as_the_trials_did(tmp_path):
    options = {
        "encoder_training": "frozen",
        "final_training": "frozen",
        "warm_up_epochs": 1,
        "compare_defaults": False,
    }
    made = quick(tmp_path, search_space={"num_epochs": {"choices": [1]}}, **options)
    metrics, _ = made.run_pipeline("run")
    frozen = tmp_path / "run" / "submodels" / "trial_0000"
    events = next(frozen.glob("events*"))
    assert events.is_file()
    study = optuna.load_study(
        study_name="run/submodels", storage=f"sqlite:///{tmp_path / 'run' / 'studies.db'}"
    )
    epochs = max(study.trials[0].intermediate_values) + 1
    assert len(read_json(Path(metrics))["history"]) == epochs == 3


@pytest.mark.slow
def test_other_examples_for_the_promise_set_it_anew(tmp_path):
    class Own(CompositionalSentiment):
        aside = 1

        def calibration_dataloader(self):
            loader = super().val_dataloader()
            return DataLoader(
                torch.utils.data.Subset(loader.dataset, range(0, len(loader.dataset), Own.aside)),
                32,
                collate_fn=loader.collate_fn,
            )

    data = partial(Own, num_train=120, num_val=60, num_test=60)
    promise = Promise(max_accuracy_loss=0.2, confidence=0.5)
    metrics, _ = quick(tmp_path, data=data, promise=promise, compare_defaults=False).run_pipeline(
        "run"
    )
    assert read_json(Path(metrics))["calibration"]["examples"] == 30
    Own.aside = 2
    again = quick(tmp_path, data=data, promise=promise, compare_defaults=False)
    assert read_json(Path(again.final_train("run")[0]))["calibration"]["examples"] == 15


def test_another_batch_size_of_the_data_is_refused_under_the_same_tag(tmp_path):
    made = quick(tmp_path, data=partial(small_data, batch_size=64))
    made.joint_tune_study("run")
    with pytest.raises(ValueError, match="was made with another batch_size"):
        quick(tmp_path, data=partial(small_data, batch_size=32)).joint_tune_study("run")


def test_a_trial_without_an_exit_loss_has_no_detached_exits():
    parsed = TRAINING.parse({"exit_loss_weight": 0.0, "detach_exits": True})["external_config"]
    small_model(**{**{"detach_exits": True}, **parsed})
    assert not parsed["detach_exits"]


def test_a_teacher_answers_for_every_training_example_whatever_the_order_of_training():
    class Weighted(CompositionalSentiment):
        def train_dataloader(self):
            loader = super().train_dataloader()
            sampler = WeightedRandomSampler([1.0] * 60 + [0.0] * 60, 90)
            return DataLoader(loader.dataset, 32, sampler=sampler, collate_fn=loader.collate_fn)

    model = small_model().eval()
    found = []
    for kind in (CompositionalSentiment, Weighted):
        data = kind(num_train=120, num_val=60, num_test=60)
        data.setup("fit")
        found.append(_probabilities(model, data)["probabilities"])
    torch.testing.assert_close(*found)
    assert found[0].sum(1).sub(1).abs().max() < 1e-5


def test_trials_are_never_compared_on_different_examples(tmp_path):
    trainer = {"max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 1}
    with pytest.raises(ValueError, match=r"limit_val_batches=1 counts batches.*choices: \[32\]"):
        engine(tmp_path, trainer=trainer).joint_tune_study("run")
    range_of_sizes = {"batch_size": {"type": "int", "low": 8, "high": 48, "step": 8}}
    with pytest.raises(ValueError, match=r"limit_val_batches=1 counts batches"):
        engine(tmp_path, trainer=trainer, search_space=range_of_sizes).joint_tune_study("run")
    space = {"batch_size": {"choices": [32]}}
    engine(tmp_path, trainer=trainer, n_trials=1, search_space=space).joint_tune_study("a")
    # The states of all validation examples are one batch, of which there is no half.
    half = {**trainer, "limit_val_batches": 0.5}
    frozen = {
        "encoder_training": "frozen",
        "warm_up_epochs": 0,
        "search_space": space,
        "n_trials": 1,
    }
    engine(
        tmp_path, trainer=half, data=partial(small_data, batch_size=16), **frozen
    ).joint_tune_study("b")


class TaughtData(LightningDataModule):
    """Data of one's own, whose training batches carry a teacher's probabilities."""

    def __init__(self, batch_size=32):
        super().__init__()
        self.inner = small_data(batch_size=batch_size)

    def setup(self, stage):
        self.inner.setup(stage)

    def train_dataloader(self):
        batches = [*self.inner.train_dataloader()]
        return DataLoader(
            [
                {**batch, "teacher": torch.full((len(batch["labels"]), 3), 1 / 3)}
                for batch in batches
            ],
            None,
        )

    def val_dataloader(self):
        return self.inner.val_dataloader()

    def test_dataloader(self):
        return self.inner.test_dataloader()


def test_a_teacher_that_the_batches_of_ones_own_data_carry_teaches_the_trials(tmp_path):
    made = quick(tmp_path, model=partial(small_model, distillation=0.7), data=TaughtData)
    made.joint_tune_study("run")
    assert made._prepared.build({})[0].distillation == 0.7
    model, _ = made.recipe.untuned(made._prepared.own_teacher)
    assert model.distillation == 0.7
    for own, asked, share in ((0.7, 0.5, 0.5), (0.7, 0.0, 0.0), (0.0, None, 0.5)):
        made = quick(
            tmp_path,
            model=partial(small_model, distillation=own),
            data=TaughtData,
            distillation=asked,
        )
        made.joint_tune_study(f"run-{own}-{asked}")
        assert made._prepared.build({})[0].distillation == share


@pytest.mark.slow
@pytest.mark.parametrize("encoder_training", ["frozen", "finetune"])
def test_a_run_may_train_in_half_precision(tmp_path, encoder_training):
    trainer = {"max_epochs": 1, "accelerator": "cpu", "precision": "bf16-true"}
    options = {"encoder_training": encoder_training, "warm_up_epochs": 1, "compare_defaults": False}
    metrics, _ = quick(tmp_path, trainer=trainer, **options).run_pipeline("run")
    assert read_json(Path(metrics))["test"]["accuracy"] > 0


class Verdicts(CompositionalSentiment):
    """Data of one's own with few options."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__(num_train=120, num_val=400, num_test=60, batch_size=batch_size)


@pytest.mark.slow
def test_the_configuration_of_a_final_fit_has_only_options_that_its_data_knows(tmp_path):
    section = {"class_path": "tests.test_run_inputs.Verdicts", "init_args": {}}
    encoder = {"vocab_size": 42, "num_layers": 2, "hidden_size": 8, "num_heads": 2}
    model = {"encoder": {"class_path": "dact.encoders.TransformerEncoder", "init_args": encoder}}
    made = quick(
        tmp_path, model=ModelFactory(model), data=DataFactory(section), compare_defaults=False
    )
    metrics, _ = made.run_pipeline("run")
    written = yaml.safe_load((Path(metrics).parent / "config.yaml").read_text())
    assert isinstance(DataFactory(written["data"])(), Verdicts)
    assert read_json(Path(metrics))["calibration"]["chose_checkpoint"] is False


def test_the_same_command_adds_no_trial_to_a_study_that_a_callback_has_stopped(tmp_path):
    for _ in range(3):
        stop = optuna.study.MaxTrialsCallback(1, states=None)
        made = engine(
            tmp_path, n_trials=3, callbacks=[stop], encoder_training="frozen", warm_up_epochs=0
        )
        made.joint_tune_study("run")
        assert (
            len(
                [
                    trial
                    for trial in study_of(tmp_path, "submodels").trials
                    if trial.state.is_finished()
                ]
            )
            == 1
        )


def test_a_warning_of_the_data_is_shown_once_for_all_trials(monkeypatch):
    shown = []
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *arguments: shown.append(str(message))
    )
    monkeypatch.setattr("threading.excepthook", threading.excepthook)
    monkeypatch.setattr("dact.cli.main.quiet", lambda: None)
    level = optuna.logging.get_verbosity()
    quiet_studies()
    optuna.logging.set_verbosity(level)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("some texts are cut", stacklevel=1)
            warnings.warn("others are empty", stacklevel=1)
    assert shown == ["some texts are cut", "others are empty"]


def test_a_narrowed_search_space_holds_for_what_no_study_has_chosen_yet(tmp_path):
    space = {
        "num_layers": {"type": "int", "low": 3, "high": 3},
        "detach_exits": {"choices": [False]},
        "submodel_learning_rate": {"high": 1e-3},
        "num_epochs": {"choices": [1]},
    }
    made = engine(tmp_path, search_space=space)
    surveyed = made._survey()
    chosen = {
        "num_layers": 3,
        "detach_exits": False,
        "submodel_learning_rate": 1e-3,
        "num_epochs": 1,
    }
    assert surveyed.initial == chosen
    _, recommended = surveyed.untuned
    assert surveyed.initial.items() <= recommended.items()


def test_trials_that_keep_the_encoder_frozen_do_not_choose_how_it_will_learn(tmp_path):
    def survey(**options):
        return engine(tmp_path, encoder_training="frozen", **options)._survey()

    surveyed = survey()
    assert surveyed.spaces["training"]["detach_exits"].choices == (True,)
    defaults, recommended = surveyed.untuned
    assert recommended["detach_exits"] and not defaults["detach_exits"]  # as the factory has it
    for told in ({"final_training": "frozen"}, {"search_space": {"detach_exits": {}}}):
        assert survey(**told).spaces["training"]["detach_exits"].choices == (True, False)


def test_a_narrowed_price_of_layers_is_that_of_the_recommended_settings_as_well(tmp_path):
    surveyed = engine(tmp_path, search_space={"lambda_reg": {"low": 0.1, "high": 0.5}})._survey()
    defaults, recommended = surveyed.untuned
    assert surveyed.first_trials["lambda_reg"][0] == {"lambda_reg": 0.1}
    assert recommended["lambda_reg"] == 0.1
    assert defaults["lambda_reg"] == surveyed.model.lambda_reg < 0.1


def test_on_few_texts_the_epochs_that_are_tried_make_enough_steps(tmp_path):
    trainer = {"max_epochs": 3, "accelerator": "cpu"}
    few = partial(small_data, num_train=480, batch_size=32)  # 15 steps an epoch
    surveyed = engine(tmp_path, trainer=trainer, data=few, search_space={})._survey()
    assert surveyed.spaces["training"]["num_epochs"].choices == (7, 10, 13), (
        "in place of 2, 3 and 4"
    )
    assert [trial["num_epochs"] for trial in surveyed.first_trials["training"]] == [10, 10]
    many = partial(small_data, num_train=4800, batch_size=32)
    surveyed = engine(tmp_path, trainer=trainer, data=many, search_space={})._survey()
    assert surveyed.spaces["training"]["num_epochs"].choices == (2, 3, 4)


class Own(DACT):
    """A model of somebody's own, with an argument that no checkpoint holds."""

    def __init__(self, loss_fn, **arguments):
        super().__init__(**arguments)
        self.loss_fn = loss_fn


@pytest.mark.slow
def test_a_class_with_an_argument_that_is_no_plain_data_is_tuned(tmp_path):
    def factory(**overrides):
        return Own(
            abs, encoder=TransformerEncoder(42, 3, 8, 2), **{"learning_rate": 3e-3, **overrides}
        )

    metrics, _ = quick(tmp_path, model=factory, compare_defaults=False).run_pipeline("run")
    assert read_json(Path(metrics))["layers"] in (2, 3)


def test_a_number_of_layers_that_too_few_examples_can_promise_is_refused_before_any_trial(tmp_path):
    needed = Promise(max_layers=1.2).examples_needed(3)
    exits = torch.ones(needed, dtype=torch.long)
    assert mean_upper_bound(exits, 3, 0.95) <= 1.2 < mean_upper_bound(exits[1:], 3, 0.95)
    with pytest.raises(
        ValueError, match=f"it takes {needed} examples that no study sees, and .* sets 30 aside"
    ):
        engine(tmp_path, promise=Promise(max_layers=1.2)).joint_tune_study("run")


def test_a_price_of_nothing_is_drawn():
    points = [Point(0.0, 1.0, 2.0), Point(0.0, 0.9, 3.0)]
    pareto_picture(points, points[0]).canvas.draw()


def test_durations_and_wrong_kinds_of_options_are_understood(tmp_path):
    made = engine(
        tmp_path,
        trainer={"max_epochs": 1, "max_time": datetime.timedelta(hours=1), "accelerator": "cpu"},
    )
    assert digest(made._survey().identity)
    for options, message in (({"n_trials": 2.5}, "got 2.5"),):
        with pytest.raises((TypeError, ValueError), match=message):
            TuningEngine(log_dir=tmp_path, **options)


@pytest.mark.slow
def test_a_final_fit_whose_checkpoint_is_gone_is_made_again_whole(tmp_path):
    made = quick(tmp_path, compare_defaults=False)
    _, checkpoint = made.run_pipeline("run")
    final = tmp_path / "run" / "final"
    before = {path.name for path in final.iterdir()}
    Path(checkpoint).unlink()
    made.final_train("run")
    assert Path(checkpoint).is_file()
    assert {path.name for path in final.iterdir()} >= {
        name for name in before if not name.startswith("events")
    }


def test_a_finished_study_leaves_no_unfinished_file_of_a_trial_that_died(tmp_path):
    made = quick(tmp_path)
    made.joint_tune_study("run")
    left = tmp_path / "run" / "submodels" / "trial_0000" / ".validation.safetensors.partial"
    left.write_bytes(b"half")
    made.joint_tune_study("run")
    assert not left.exists()


def test_a_trial_of_another_host_without_heartbeats_is_named(tmp_path):
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    trial.set_user_attr(OWNER, ["elsewhere", 1, 0.0])
    mine = study.ask()
    mine.set_user_attr(OWNER, [socket.gethostname(), 1, 0.0])
    assert [found.number for found in unwatched(study)] == [trial.number]
    made = engine(tmp_path)
    made.progress.console = Console(record=True, width=300, quiet=False)
    made.progress.waits_for("training", unwatched(study))
    assert "trial 0, which runs on elsewhere" in made.progress.console.export_text()
    study.tell(0, state=TrialState.FAIL)
    assert not unwatched(study)


def test_a_search_keeps_what_it_does_not_search_of_the_submodels_of_ones_own(tmp_path):
    own = {"classifier": SubmodelConfig(normalization="layer", activation="relu", hidden_units=48)}
    space = {"classifier_hidden_units": {"choices": [8, 16]}, "num_epochs": {"choices": [1]}}
    made = quick(tmp_path, model=partial(small_model, **own), search_space=space)
    defaults, recommended = made._survey().untuned
    assert SubmodelConfig(**defaults["classifier"]) == own["classifier"]
    assert SubmodelConfig(**recommended["classifier"]) == dataclasses.replace(
        own["classifier"], hidden_units=8
    )
    for settings in (defaults, recommended):
        assert SubmodelConfig(**settings["confidence"]) == SubmodelConfig()
    classifier, _ = made.joint_tune_study("run")
    found = SubmodelConfig(**classifier)
    assert (found.normalization, found.activation) == ("layer", "relu")
    assert found.hidden_units in (8, 16)


@pytest.mark.slow
def test_a_teacher_of_the_data_is_left_out_where_the_user_wants_no_distillation(tmp_path):
    def with_teacher(**overrides):
        data = small_data(**overrides)
        data.teacher = "nobody/asks"
        return data

    model = partial(small_model, distillation=0.5)
    made = quick(tmp_path, model=model, data=with_teacher, distillation=0.0, compare_defaults=False)
    metrics, _ = made.run_pipeline("run")
    assert read_json(Path(metrics))["test"]["accuracy"] > 0


@pytest.mark.slow
def test_a_promise_that_the_final_model_cannot_keep_costs_nothing_that_was_computed(
    tmp_path, monkeypatch
):
    def refuse(*arguments, **options):
        raise ValueError("the fewest layers that can be promised are 2.90 of 3")

    monkeypatch.setattr("dact.tuning.final.calibrate", refuse)
    made = quick(tmp_path, compare_defaults=False)
    made.progress.console = Console(file=io.StringIO(), width=150)
    metrics, _ = made.run_pipeline("run")
    assert (Path(metrics).parent / "model" / "config.json").is_file()
    assert "calibration" not in read_json(Path(metrics))
    said = " ".join(made.progress.console.file.getvalue().split())
    assert "kept without its promise: the fewest layers that can be promised are 2.90 of 3" in said


def test_the_seed_of_a_command_leaves_the_division_of_the_data_to_the_data(
    dact_here, tmp_path, monkeypatch
):
    seeds = []
    monkeypatch.setattr(
        TuningEngine,
        "run_pipeline",
        lambda self, tag: seeds.append((self.recipe.seed, self.recipe.data().seed)),
    )
    status, output = dact_here(
        "tune", "--config", GENERATED, "--seed_everything", "3", cwd=tmp_path
    )
    assert (status, seeds) == (0, [(3, 0)]), output


def test_a_null_in_the_trainer_section_of_tune_is_not_replaced_by_a_default(
    dact_here, tmp_path, monkeypatch
):
    clips = []
    monkeypatch.setattr(
        TuningEngine,
        "run_pipeline",
        lambda self, tag: clips.append(self.recipe.trainer["gradient_clip_val"]),
    )
    plain = "".join(
        line for line in GENERATED.read_text().splitlines(True) if "gradient_clip_val" not in line
    )
    (tmp_path / "plain.yaml").write_text(plain)
    for words in ([], ["--trainer.gradient_clip_val", "null"]):
        status, output = dact_here("tune", "--config", "plain.yaml", *words, cwd=tmp_path)
        assert status == 0, output
    assert clips == [1.0, None]


def test_tune_refuses_what_only_fit_reads(dact_here, tmp_path):
    for words in (["--optimizer", "torch.optim.SGD"], ["--monitor", "val_macro_f1"]):
        status, output = dact_here("tune", "--config", GENERATED, *words, cwd=tmp_path)
        assert status == 1
        assert f"dact tune does not read {words[0][2:]}" in output
    status, output = dact_here(
        "tune", "--config", GENERATED, "--ckpt_path", "last.ckpt", cwd=tmp_path
    )
    assert status == 1
    assert "dact tune does not begin with a checkpoint: leave ckpt_path out" in output


class ItemsOfOnesOwn(LightningDataModule):
    """Data as Hugging Face users have it: items with a `label`, which become `labels` in a
    batch."""

    def __init__(self, shift=0, batch_size=32, teacher=None, ids=0, **loaders):
        super().__init__()
        self.shift, self.batch_size, self.teacher_seed, self.ids, self.loaders = (
            shift,
            batch_size,
            teacher,
            ids,
            loaders,
        )

        self.inner = small_data()

    def setup(self, stage):
        self.inner.setup(stage)

    def _loader(self, split):
        generator = torch.Generator().manual_seed(self.teacher_seed or 0)
        items = []
        for batch in {"train": self.inner.train_dataloader, "val": self.inner.val_dataloader}.get(
            split, self.inner.test_dataloader
        )():
            for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
                item = {
                    "input_ids": ids[ids != 0],
                    "label": (int(label) + self.shift) % 3,
                    "row": self.ids + len(items),
                }
                items.append({**item, "teacher": torch.rand(3, generator=generator).softmax(0)})

        def collate(items):
            ids = torch.nn.utils.rnn.pad_sequence(
                [item["input_ids"] for item in items], batch_first=True
            )
            batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
            batch["labels"] = torch.tensor([item["label"] for item in items])
            if self.ids:
                batch["row"] = torch.tensor([item["row"] for item in items])
            if self.teacher_seed is not None and split == "train":
                batch["teacher"] = torch.stack([item["teacher"] for item in items])
            if self.loaders.get("unlabelled") and split == "test":
                del batch["labels"]
            return batch

        options = {
            name: value
            for name, value in self.loaders.items()
            if name not in ("unlabelled", "split")
        }
        options = options if split == self.loaders.get("split", "test") else {}
        if options.pop("batches", False):
            own = BatchSampler(RandomSampler(items), self.batch_size, drop_last=False)
            return DataLoader(items, batch_sampler=own, collate_fn=collate)
        return DataLoader(items, self.batch_size, collate_fn=collate, **options)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")

    def test_dataloader(self):
        return self._loader("test")


@pytest.mark.parametrize("change", [{"shift": 1}, {"teacher": 1}])
def test_other_labels_or_another_teacher_of_ones_own_data_are_refused_under_the_same_tag(
    tmp_path, change
):
    def data(**more):
        return partial(ItemsOfOnesOwn, **({"teacher": 0} | more))

    quick(tmp_path, data=data()).joint_tune_study("run")
    quick(tmp_path, data=data()).joint_tune_study("run")
    with pytest.raises(
        ValueError, match=r"run/submodels .* was made with another (data|own_teacher)"
    ):
        quick(tmp_path, data=data(**change)).joint_tune_study("run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": True}, "example by example, but the test loader shuffles"),
        (
            {"shuffle": True, "split": "val"},
            "example by example, but the validation loader shuffles",
        ),
        ({"batches": True}, "example by example, but the test loader shuffles"),
        ({"drop_last": True}, r"but the test loader drops the last examples \(drop_last\)"),
        (
            {"unlabelled": True},
            "the final model is measured on the test split, whose batches have no 'labels'",
        ),
    ],
)
def test_what_could_not_be_measured_at_the_end_is_refused_before_any_training(
    tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        quick(tmp_path, data=partial(ItemsOfOnesOwn, **options)).run_pipeline("run")
    assert not (tmp_path / "run" / "baseline").exists()


@pytest.mark.parametrize("loaders", [{}, {"batches": True, "split": "train"}])
def test_a_teacher_that_a_collate_function_adds_is_told_from_another(loaders):
    def digest_of(teacher):
        data = ItemsOfOnesOwn(teacher=teacher, **loaders)
        data.setup("fit")
        return teacher_digest(data.train_dataloader())

    assert digest_of(0) == digest_of(0) != digest_of(1)


def test_a_row_that_numbers_something_else_is_no_place_for_a_teacher(tmp_path):
    quick(tmp_path, data=partial(ItemsOfOnesOwn, ids=1000)).joint_tune_study("run")
    for ids in (1000, 1):
        data = ItemsOfOnesOwn(ids=ids)
        data.setup("fit")
        data.teacher_probabilities = None
        assert _probabilities(small_model().at_full_depth(), data) == {}


@pytest.mark.slow
def test_a_search_without_an_exit_loss_ends_with_a_model(tmp_path):
    space = {"exit_loss_weight": {"type": "categorical", "choices": [0.0, 0.5]}}
    metrics = read_json(Path(quick(tmp_path, search_space=space).run_pipeline("run")[0]))
    assert metrics["layers"] in (2, 3)


def test_a_promise_of_layers_is_checked_for_the_most_that_a_run_keeps(tmp_path):
    promise, space = Promise(max_layers=2.0, confidence=None), {"num_layers": {"low": 1, "high": 2}}
    fewer = partial(small_model, num_layers=2)
    with pytest.raises(ValueError, match="max_layers=2 promises nothing: the model has 2 layers"):
        quick(tmp_path, model=fewer, promise=promise, search_space=space).joint_tune_study(
            "bounded"
        )
    quick(tmp_path, model=fewer, promise=promise).joint_tune_study("free")  # a trial may keep three
    quick(tmp_path, promise=promise, search_space=space).joint_tune_study(
        "own"
    )  # the default settings do


def test_overfitting_a_number_of_batches_counts_as_a_limit(tmp_path):
    trainer = {"max_epochs": 1, "accelerator": "cpu", "overfit_batches": 1}
    with pytest.raises(ValueError, match="overfit_batches=1 counts batches"):
        engine(tmp_path, trainer=trainer).joint_tune_study("run")


class Divided(LightningDataModule):
    """Texts of one word each with labels at random: who is right more often than by chance has seen
    the answers."""

    def __init__(self, seed=None, sampler=None, batch_size=16):
        super().__init__()
        self.seed, self.sampler, self.batch_size = seed, sampler, batch_size
        labels = torch.randint(3, (300,), generator=torch.Generator().manual_seed(0)).tolist()
        self.items = [
            {"input_ids": torch.tensor([row % 40 + 2]), "labels": label}
            for row, label in enumerate(labels)
        ]

    def setup(self, stage):
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        self.parts = torch.utils.data.random_split(self.items, [0.6, 0.2, 0.2], generator=generator)

    def train_dataloader(self):
        if self.sampler is None:
            return DataLoader(self.parts[0], self.batch_size, shuffle=True)
        return DataLoader(self.items, self.batch_size, sampler=self.sampler)

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.parts[2], self.batch_size)


def test_data_that_is_divided_anew_by_each_fit_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"other examples for train, val, test, but .* would train on what others are",
    ):
        quick(tmp_path, data=Divided).run_pipeline("run")
    assert not (tmp_path / "run" / "baseline").exists()
    with pytest.raises(ValueError, match="two datamodules with other examples for train, val, but"):
        quick(tmp_path, data=Divided).joint_tune_study("run")
    quick(tmp_path, data=partial(Divided, seed=0)).joint_tune_study("seeded")


@pytest.mark.parametrize(
    ("sampler", "given"),
    [
        (SubsetRandomSampler(range(180)), "180 of 300, 180 in all"),
        (WeightedRandomSampler([1.0] * 300, 300), r"\d+ of 300, 300 in all"),
    ],
)
def test_a_sampler_that_frozen_states_could_not_keep_is_refused(tmp_path, sampler, given):
    data = partial(Divided, seed=0, sampler=sampler)
    with pytest.raises(
        ValueError, match=f"the sampler of the train loader gives {given}: make a data set .*Subset"
    ):
        quick(tmp_path, data=data, encoder_training="frozen").joint_tune_study("run")
    quick(tmp_path, data=data).joint_tune_study("finetuned")


def tagged(made, tag):
    made.run_tag = tag
    return made


def test_an_objective_of_ones_own_replaces_nothing_of_a_run_with_other_data(tmp_path):
    quick(tmp_path).joint_tune_study("run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    assert before
    other = tagged(quick(tmp_path, data=partial(small_data, num_train=80)), "run")
    with pytest.raises(
        ValueError, match=r"the study run/submodels was made with another data; .* another run_tag"
    ):
        optuna.create_study().optimize(other.submodel_objective, n_trials=1)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    optuna.create_study().optimize(tagged(quick(tmp_path), "run").submodel_objective, n_trials=1)


def test_a_study_of_ones_own_that_goes_on_with_other_settings_says_so(tmp_path):
    study = optuna.create_study()
    study.optimize(tagged(quick(tmp_path), "own").submodel_objective, n_trials=1)
    other = tagged(quick(tmp_path, seed=3), "another")
    with pytest.warns(
        UserWarning,
        match=r"trial 1 of the study .* has another seed \(3 instead of 0\) than its first",
    ):
        study.optimize(other.submodel_objective, n_trials=1)


class Locked(Callback):
    def __init__(self):
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("trainer", "kind", "message"),
    [
        ({"max_epoch": 3}, TypeError, "the Trainer takes no max_epoch. Did you mean max_epochs?"),
        (
            {"callbacks": [Locked()]},
            TypeError,
            "gets a copy of each callback, but copy.deepcopy fails on Locked",
        ),
        ({"limit_val_batches": 0}, ValueError, "limit_val_batches=0 leaves fits without data"),
        ({"limit_train_batches": 0}, ValueError, "limit_train_batches=0 leaves fits without data"),
    ],
)
def test_a_trainer_that_no_fit_could_have_is_refused_before_any_training(
    tmp_path, trainer, kind, message
):
    with pytest.raises(kind, match=message):
        engine(tmp_path, trainer={"accelerator": "cpu", **trainer}).run_pipeline("run")
    assert not (tmp_path / "run" / "baseline").exists()


def test_a_resumed_run_names_what_has_changed_and_from_what_to_what(tmp_path):
    def options(patience=1, **trainer):
        stops = EarlyStopping("val_loss", patience=patience)
        return {"trainer": {"max_epochs": 1, "accelerator": "cpu", "callbacks": [stops], **trainer}}

    engine(tmp_path, n_trials=1, encoder_training="frozen", **options()).joint_tune_study("run")
    for change, message in (
        (
            {"model": partial(small_model, learning_rate=0.03)},
            r"model.learning_rate \(0.03 instead of 0.003\); trials",
        ),
        (options(max_epochs=2), r"max_epochs \(2 instead of 1\); trials"),
        (options(patience=9), r"callbacks.EarlyStopping.patience \(9 instead of 1\); trials"),
    ):
        with pytest.raises(ValueError, match=rf"run/submodels .* was made with another {message}"):
            engine(
                tmp_path, **{"n_trials": 1, "encoder_training": "frozen", **options(), **change}
            ).joint_tune_study("run")


def test_a_trainer_of_many_options_is_one_that_frozen_trials_and_the_configuration_keep(tmp_path):
    trainer = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "val_check_interval": 3,
        "enable_progress_bar": True,
    }
    trainer |= {"max_time": datetime.timedelta(minutes=9)}
    assert is_plain([0]) and is_plain({"minutes": 9}) and not is_plain([Callback()])
    data = partial(small_data, batch_size=16)  # of frozen states, a batch has 32 or 64
    for tag, interval, epochs in (
        ("a", 7, 1),
        ("b", 8, None),
    ):  # of 8 batches, of which the warm-up has 5
        given = {**trainer, "val_check_interval": interval, "check_val_every_n_epoch": epochs}
        made = quick(
            tmp_path, trainer=given, data=data, encoder_training="frozen", warm_up_epochs=1
        )
        made.joint_tune_study(tag)
        assert study_of(tmp_path, "submodels", tag).trials[0].state == TrialState.COMPLETE


def test_few_steps_of_the_trainer_count_where_the_epochs_of_the_baseline_are_chosen():
    recipe = engine(Path("unused"), trainer={"max_epochs": 4, "accelerator": "cpu"}).recipe
    data = DataLoaders(100)
    assert enough_epochs(recipe.trainer, data, recipe.epochs, 300) == 4
    for option in (
        {"limit_train_batches": 60},
        {"limit_train_batches": 0.6},
        {"accumulate_grad_batches": 2},
    ):
        few = dataclasses.replace(recipe, trainer={**recipe.trainer, **option})
        assert enough_epochs(few.trainer, data, 4, 300) == (
            5 if "limit_train_batches" in option else 6
        )
    few = {
        **recipe.trainer,
        "accumulate_grad_batches": 4,
    }  # 6 batches are 2 steps: of 4 batches, and of the other 2
    assert enough_epochs(few, DataLoaders(6), 4, 28) == 14
    assert enough_epochs(recipe.trainer, DataLoaders(15), 3, 150) == 10
    assert enough_epochs(recipe.trainer, DataLoaders(1), 3, 150) == 21


class DataLoaders:
    """Data with a number of training batches."""

    def __init__(self, batches):
        self.train_dataloader = lambda: range(batches)


class Silent(DACT):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


def test_a_model_whose_validation_returns_nothing_is_named_before_any_trial(tmp_path):
    made = engine(
        tmp_path, model=lambda **overrides: Silent(TransformerEncoder(42, 2, 8, 2), **overrides)
    )
    with pytest.raises(
        ValueError,
        match="Silent.validation_step must return what that of DACT returns: .*; it returns Non",
    ):
        made.joint_tune_study("run")
    assert {trial.state for trial in study_of(tmp_path, "submodels").trials} == {TrialState.WAITING}


def test_a_worker_that_died_is_replaced_on_its_device(monkeypatch):
    started = []

    class Process:
        def __init__(self, target, args):
            self.number, self.exitcode = args[0], None
            started.append(self.number)

        def start(self):
            dies = started == [0, 1]
            self.exitcode = 1 if dies else 0 if len(started) == 3 else None

        def is_alive(self):
            self.exitcode = 0 if len(started) == 3 and self.exitcode is None else self.exitcode
            return self.exitcode is None

        def terminate(self):
            pass

        def join(self, timeout=None):
            pass

    class Context:
        SimpleQueue = staticmethod(lambda: SimpleNamespace(empty=lambda: True))

    Context.Process = Process
    monkeypatch.setattr(workers, "_context", Context)
    monkeypatch.setattr(workers, "finished", lambda study: [])
    monkeypatch.setattr(workers, "POLL", 0)
    monkeypatch.setattr(workers, "replace", lambda job, **changes: job)
    job = SimpleNamespace(for_worker=lambda number: number)
    workers.run_study(job, None, 2, lambda: None)
    assert started == [0, 1, 1]
