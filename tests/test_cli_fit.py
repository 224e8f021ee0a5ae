"""``dact fit``: its name, its checkpoints, how it is stopped and resumed, and what it says; and the
errors of YAML."""

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import rich
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from dact import DACT
from dact.callbacks import LastCheckpoint
from dact.cli.output import Bar
from dact.files import DurableCheckpointIO
from tests import warm
from tests.commands import FIT, OWN, ROOT, SMALL, dact, environment
from tests.conftest import random_batch, tiny_model


class Scripted(LightningModule):
    """Logs given losses, one per epoch."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def validation_step(self, batch, index):
        self.log("val_loss", self.losses[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit_scripted(folder, losses, resume_from=None):
    """Return the epochs of the best and of the last checkpoint."""
    loader = DataLoader(torch.ones(4, 1), 2)
    best = ModelCheckpoint(folder, "best", monitor="val_loss", enable_version_counter=False)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    more = {"callbacks": [best, LastCheckpoint(best)], "plugins": [DurableCheckpointIO()]}
    trainer = Trainer(max_epochs=len(losses), accelerator="cpu", **off, **more)
    trainer.fit(Scripted(losses), loader, loader, ckpt_path=resume_from)
    paths = [folder / name for name in ("best.ckpt", "last.ckpt")]
    return [torch.load(path, weights_only=True)["epoch"] for path in paths]


def test_a_resumed_fit_keeps_the_best_epoch_of_before(tmp_path):
    last = tmp_path / "last.ckpt"
    assert fit_scripted(tmp_path, [2.0, 3.0]) == [0, 1]
    assert fit_scripted(tmp_path, [2.0, 3.0, 2.5], resume_from=last) == [0, 2]
    assert fit_scripted(tmp_path, [2.0, 3.0, 2.5, 1.0], resume_from=last) == [3, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.slow
def test_a_fit_has_a_name_resumes_by_it_and_is_no_run_of_tune(own, dact_here):
    csv = {"class_path": "CSVLogger", "init_args": {"save_dir": "curves", "name": "mine"}}
    board = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "boards"}}
    (own / "csv.yaml").write_text(json.dumps({"trainer": {"logger": [csv, board]}}))
    words = ["fit", "--config", "config.yaml", "--config", "csv.yaml", "--run_tag", "first"]
    status, text = dact_here(*words, cwd=own)
    assert status == 0, text
    assert not re.search("[Ww]arning", text)
    run = own / "lightning_logs" / "first"
    assert {"checkpoints", "model", "config.yaml"} <= {path.name for path in run.iterdir()}
    assert (own / "curves/mine/first/metrics.csv").is_file()
    (own / "lightning_logs" / "tuned" / "final").mkdir(parents=True)
    more = "--trainer.max_epochs=2"
    for options, message in (
        ([], "run first has finished epoch 1, its last: raise --trainer.max_epochs"),
        ([more, "--model.learning_rate=0.1"], "with model.learning_rate None, and now it is 0.1"),
        ([more, "--monitor=val_accuracy"], "with monitor 'last', and now it is 'val_accuracy'"),
        (["--run_tag", "tuned"], "lightning_logs/tuned belongs to dact tune"),
    ):
        status, text = dact_here(*words, *options, cwd=own)
        assert status == 1
        assert message in text
    status, text = dact_here(*words, more, cwd=own)
    assert status == 0, text
    assert "resuming lightning_logs/first after epoch 1" in text
    assert re.findall(r"^epoch (\d)", text, re.MULTILINE) == ["2"]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["ckpt_path"] is None, "a fit from it begins anew"
    tune = ["tune", "--config", "config.yaml", "--data.test_file=train.csv", "--run_tag=first"]
    status, text = dact_here(*tune, cwd=own)
    assert status == 1
    assert "lightning_logs/first belongs to dact fit: give another --run_tag" in text


class Failing(Callback):
    """Fails in the third epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("no memory left")


def test_a_fit_that_fails_keeps_what_it_has_logged_and_resumes_from_checkpoints_of_ones_own(
    own, dact_here
):
    mine = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_accuracy"}}
    failing = {"class_path": "tests.test_cli_fit.Failing"}
    words = ["fit", "--config", "config.yaml", "--config", "more.yaml", "--run_tag", "first"]
    words += ["--trainer.max_epochs", "4"]
    (own / "more.yaml").write_text(json.dumps({"trainer": {"callbacks": [mine, failing]}}))
    status, text = dact_here(*words, cwd=own)
    assert status == 1
    assert "no memory left" in text
    assert any((own / "lightning_logs" / "first").glob("events.*")), "curves of two epochs"
    status, text = dact_here(*words, cwd=own)
    assert status == 1
    assert "resuming lightning_logs/first after epoch 2" in text


@pytest.mark.slow
def test_the_last_lines_of_a_fit_of_two_processes_are_of_all_examples(tmp_path, dact_here):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--run_tag=two"]
    done = dact("fit", "--config", FIT, *SMALL, *two, cwd=tmp_path)
    assert "3 classes: negative 220, neutral 215, positive 165" in done.stdout
    assert done.stdout.count("examples   60 of the validation split\n") == 1
    status, text = dact_here("validate", "--model", "lightning_logs/two", cwd=tmp_path)
    assert status == 0, text
    said = text.partition("halting_margin")[0]  # which goes to standard error
    assert "examples   60" in said
    assert said in done.stdout


@pytest.mark.slow
def test_a_stopped_fit_leaves_its_best_model_and_the_command_that_resumes_it(tmp_path):
    words = ["fit", "--config", str(FIT), *SMALL, "--trainer.max_epochs", "500"]
    process = warm.start("dact", words, cwd=tmp_path, env=environment())
    run = tmp_path / "lightning_logs" / "version_0"
    end = time.monotonic() + 200
    while not (run / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    DACT.from_pretrained(run / "model")
    command = re.search(r"^dact: stopped; resume with: dact (.*)$", errors, re.MULTILINE)[1]
    epochs = len(re.findall(r"^epoch ", output, re.MULTILINE))
    done = dact(*shlex.split(command), "--trainer.max_epochs", epochs + 1, cwd=tmp_path)
    assert re.findall(r"^epoch (\d+)/", done.stdout, re.MULTILINE) == [str(epochs + 1)]
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def test_a_fit_may_choose_by_macro_f1_and_balance_its_classes(own, dact_here):
    rows = "".join(f"screen {i} is awful,{'yes' if i % 10 == 0 else 'no'}\n" for i in range(100))
    (own / "train.csv").write_text("text,label\n" + rows)
    (own / "more.yaml").write_text("monitor: val_macro_f1\nmodel: {class_weights: balanced}\n")
    files = ["--config", "config.yaml", "--config", "more.yaml", "--run_tag", "balanced"]
    status, text = dact_here("fit", *files, cwd=own)
    assert status == 0, text
    stored = yaml.safe_load((own / "lightning_logs" / "balanced" / "config.yaml").read_text())
    assert stored["model"]["output_dimension"] == 2, "from the data"
    no, yes = stored["model"]["class_weights"]
    assert 0.5 < no < 0.6
    assert 4.5 < yes < 5.5
    model = DACT.from_pretrained(own / "lightning_logs" / "balanced" / "model")
    assert model.class_weights.tolist() == pytest.approx([no, yes])
    last = own / "lightning_logs/balanced/checkpoints/last.ckpt"
    callbacks = torch.load(last, weights_only=True)["callbacks"]
    assert any("'monitor': 'val_macro_f1', 'mode': 'max'" in name for name in callbacks)
    assert "2 classes: no" in text


@pytest.mark.parametrize(("monitor", "every", "kept"), [("last", 2, 2), ("val_accuracy", 1, 0)])
def test_a_fit_keeps_its_last_epoch_or_the_best_by_a_metric(own, dact_here, monitor, every, kept):
    words = ["fit", "--config", "config.yaml", "--run_tag", "run", "--monitor", monitor]
    words += ["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", every]
    # So small that the accuracy stays: the first epoch is not beaten.
    words += ["--model.learning_rate", "1e-12", "--model.submodel_learning_rate", "1e-12"]
    status, text = dact_here(*words, cwd=own)
    assert status == 0, text
    run = own / "lightning_logs" / "run"
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == kept
    stored = DACT.from_pretrained(run / "model").state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in best["state_dict"].items())


def test_the_bar_counts_epochs_from_1_and_ends_before_the_last_words(tmp_path, monkeypatch):
    # Lightning's bar changes the console of the whole process.
    monkeypatch.setattr(rich, "_console", None)
    screen, bars = io.StringIO(), []

    class LastWords(Callback):
        def on_fit_end(self, trainer, pl_module):
            bars.append(trainer.progress_bar_callback.progress.live.is_started)

    bar = Bar(console_kwargs={"file": screen, "force_terminal": True, "width": 80})
    loader = DataLoader([random_batch()], batch_size=None)
    Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[bar, LastWords()], default_root_dir=tmp_path,
    ).fit(tiny_model(), loader, loader)  # fmt: skip
    assert "Epoch 2" in screen.getvalue()
    assert "Epoch 0" not in screen.getvalue()
    assert bars == [False]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("max_epochs:", "max_epoch:", "line 1: unknown option 'max_epoch' in trainer. Did you"),
        ("num_heads:", "num_heds:", "line 5: unknown option 'num_heds' in model.encoder. Did you"),
        ("TransformerE", "TransformE", "line 4: there is no class TransformEncoder. Did you mean"),
        ("max_length: 16", "max_length: many", "line 8: "),
        ("data:", "\tdata:", "line 6: not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_in_yaml_is_one_line_with_its_place_and_what_was_meant(
    own, dact_here, before, after, message
):
    (own / "my.yaml").write_text(OWN.replace(before, after))
    status, text = dact_here("fit", "--config", "my.yaml", cwd=own)
    assert status == 2
    assert f"dact: error: my.yaml, {message}" in text
    assert len(text.strip().splitlines()) == 1


def heavy_modules(*words):
    code = (
        "import sys; sys.argv = ['dact', *sys.argv[1:]]\n"
        "from dact.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'optuna', 'numpy', 'yaml'}\n"
        "print('heavy:', *sorted(heavy & set(sys.modules)))"
    )
    command, options = [sys.executable, "-c", code, *words], {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=True, **options)
    return done.stdout.partition("heavy:")[2].split(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--version", "dact 0.2"),
        ("--help", "--data.help TextClassificationData"),
        ("ft", "did you mean fit?"),
    ],
)
def test_what_needs_no_lightning_imports_nothing_heavy(word, expected):
    heavy, text = heavy_modules(word)
    assert heavy == []
    assert expected in text


@pytest.mark.slow
def test_help_of_a_command_imports_neither_optuna_nor_datasets():
    heavy, text = heavy_modules("fit", "--help")
    assert not {"optuna", "datasets"} & set(heavy)
    assert "--model.lambda_reg" in text


def test_a_fit_whose_loss_is_no_number_is_an_error_and_leaves_no_model(own, dact_here):
    words = ["fit", "--config", "config.yaml", "--run_tag", "nan", "--model.learning_rate", "1e9"]
    status, output = dact_here(*words, cwd=own)
    assert status == 1
    assert "the fit broke: val_loss is nan after epoch 1. Try a smaller learning_rate" in output
    assert not list(own.rglob("nan/model"))


def test_one_line_says_which_logger_lacks_its_library(own, dact_here):
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": "."}}, "MLFlowLogger"]
    (own / "more.yaml").write_text(json.dumps({"trainer": {"logger": loggers}}))
    words = ["fit", "--config", "config.yaml", "--config", "more.yaml"]
    status, text = dact_here(*words, cwd=own)
    assert status == 1
    assert re.fullmatch(r"dact: error: Requirement 'mlflow.* not met.*\n", text)


def test_a_processor_that_is_slow_in_bfloat16_takes_float32_and_says_so(
    own, dact_here, monkeypatch
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    words = ["--trainer.precision", "bf16-mixed", "--run_tag", "run"]
    status, text = dact_here("fit", "--config", "config.yaml", *words, cwd=own)
    assert status == 0, text
    assert "precision is 32-true: this processor is far slower in bf16-mixed" in text
    run = yaml.safe_load((own / "lightning_logs" / "run" / "config.yaml").read_text())
    assert run["trainer"]["precision"] == "32-true"
