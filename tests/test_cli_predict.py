"""Commands that take a fitted model: predict, test, validate and calibrate."""

import csv
import json
import re
import shutil
import signal

import pandas as pd
import pytest
import torch
from filelock import FileLock

from dact import DACT, TextClassifier
from dact.cli.reports import promise_line
from dact.cli.stored import find_model
from dact.data import TextClassificationData
from tests import warm
from tests.commands import FIT, REVIEWS, SMALL, dact, environment


@pytest.fixture
def succeed(dact_here, monkeypatch):
    """Run a command that must succeed in this process: what it printed."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments, cwd):
        status, text = dact_here(*arguments, cwd=cwd)
        assert status == 0, text
        return text

    return call


@pytest.mark.slow
def test_test_and_validate_measure_the_checkpoint(fitted, succeed):
    folder, run, _ = fitted
    for command in ("test", "validate"):
        arguments = ["--config", FIT, *SMALL, "--ckpt_path", run / "checkpoints" / "best.ckpt"]
        text = succeed(command, *arguments, "--trainer.logger", "false", cwd=folder)
        stage = "test" if command == "test" else "val"
        for name in (
            "accuracy",
            "exit_layer",
            "agreement",
            "macro_f1",
            "task_loss",
            "layer_accuracy/3",
        ):
            assert f"{stage}_{name}" in text


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_predict_writes_one_row_per_input_in_their_order(fitted, succeed, ending):
    folder, run, _ = fitted
    output = folder / f"out.{ending}"
    arguments = [
        "--config",
        FIT,
        *SMALL,
        "--ckpt_path",
        run / "checkpoints" / "best.ckpt",
        "--output",
        output,
    ]
    succeed("predict", *arguments, "--trainer.logger", "false", cwd=folder)
    if ending == "csv":
        frame = pd.read_csv(output)
    else:
        frame = pd.read_parquet(output) if ending == "parquet" else pd.read_json(output, lines=True)
    names = ["negative", "neutral", "positive"]
    assert list(frame.columns) == [
        "label",
        *(f"probability_{name}" for name in names),
        "exit_layer",
        "reason",
    ]
    assert len(frame) == 90
    from dact.data import CompositionalSentiment

    data = CompositionalSentiment(num_test=90, max_depth=3)
    data.setup("test")
    expected = TextClassifier.from_pretrained(run / "model")(data.splits["test"].texts)
    assert frame["label"].tolist() == [prediction.label for prediction in expected]
    assert frame["exit_layer"].tolist() == [prediction.exit_layer for prediction in expected]
    scores = frame[[f"probability_{name}" for name in names]].max(axis=1)
    assert scores.tolist() == pytest.approx([prediction.score for prediction in expected], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dial", "careful"), [("halting_tolerance", "0.001"), ("halting_margin", "0.999")]
)
def test_a_calibrated_checkpoint_keeps_its_promise_in_predict(
    fitted, tmp_path, dact_here, succeed, dial, careful
):
    folder, run, _ = fitted
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    base = ["--config", FIT, *SMALL, "--ckpt_path", checkpoint]
    text = succeed(
        "calibrate", *base, "--dial", dial, "--max_layers", "2.9", "--confidence", "0.5", cwd=folder
    )
    assert "keeps max_layers=2.9 with confidence 0.5: taken alone, at most" in text
    assert "mean exit layer" in text
    assert f"wrote {dial}" in text
    stored = TextClassifier.from_pretrained(tmp_path / "run" / "model").model
    assert 0 < getattr(stored, dial) < 1
    assert stored.calibration["promise"]["max_layers"] == 2.9
    outputs = []
    for more in ([], [f"--model.{dial}", careful]):
        output = tmp_path / "out.csv"
        succeed(
            "predict", *base, "--output", output, "--trainer.logger", "false", *more, cwd=folder
        )
        outputs.append(pd.read_csv(output)["exit_layer"].mean())
    assert outputs[0] < outputs[1], "the calibrated setting counts unless another one is given"
    text = succeed("test", *base, cwd=folder)
    assert re.search(
        rf"^promise of {dial} [\d.]+: at most 2.9 layers. Here it is .*standard error",
        text,
        re.MULTILINE,
    )
    status, text = dact_here("calibrate", *base, "--dial", dial, "--max_layers", "1", cwd=folder)
    assert status == 1
    assert "the fewest layers that can be promised are" in text


@pytest.mark.slow
def test_own_files_fit_and_predict_with_reasons_for_what_cannot_be_classified(own, succeed):
    succeed("fit", "--config", "config.yaml", cwd=own)
    lines = [
        b"text",
        b"the screen is great",
        b"",
        b"\xff\xfe",
        b'"a, ""b"""',
        b"   ",
        b"the screen is awful",
    ]
    (own / "new.csv").write_bytes(b"\n".join(lines) + b"\n")
    checkpoint = "lightning_logs/version_0/checkpoints/best.ckpt"
    arguments = [
        "--config",
        "config.yaml",
        "--ckpt_path",
        checkpoint,
        "--data.predict_file",
        "new.csv",
    ]
    # Only the file to predict is needed.
    (own / "train.csv").unlink()
    succeed("predict", *arguments, "--output", "out.csv", cwd=own)
    rows = list(csv.DictReader((own / "out.csv").open()))
    assert [row["reason"] for row in rows] == [
        "",
        "empty text",
        "not valid UTF-8",
        "",
        "empty text",
        "",
    ]
    assert all((row["label"] in ("yes", "no")) == (row["reason"] == "") for row in rows)
    # A file in which nothing can be classified still gets its rows.
    (own / "new.csv").write_bytes(b"text\n \n\n")
    succeed("predict", *arguments, "--output", "none.jsonl", cwd=own)
    rows = [json.loads(line) for line in (own / "none.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == ["empty text"] * 2


def test_a_wrong_checkpoint_or_ending_is_one_clear_line(own, fitted, dact_here):
    checkpoint = ["--ckpt_path", fitted[1] / "checkpoints" / "best.ckpt"]
    status, text = dact_here(
        "test", "--config", "config.yaml", "--data.test_file", "train.csv", *checkpoint, cwd=own
    )
    assert status == 1
    assert (
        "train.csv: rows 1, 2, 3, 4, 5 and 35 more with a label outside the classes: 'no'" in text
    )
    status, text = dact_here("predict", "--config", "config.yaml", "--output", "x.csv", cwd=own)
    assert status == 1
    assert (
        "dact: error: dact predict needs a model: --model with a model/ folder, the folder of a run, such as"
        in text
    )
    assert not (own / "x.csv").exists()
    _, text = dact_here(
        "predict", "--config", "config.yaml", "--output", "x.txt", *checkpoint, cwd=own
    )
    assert "unknown ending '.txt', expected one of .csv, .jsonl, .parquet" in text
    assert (
        "Traceback"
        in dact("test", "--config", "config.yaml", cwd=own, check=False, DACT_TRACEBACK="1").stderr
    )


TEXTS = ["the screen is great", "the screen is awful", "great"]


@pytest.fixture(scope="session")
def run_of_two_files(fitted, tmp_path_factory):
    """A folder in which a fit ran on two files, of which the second one changes the model."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(fitted[1] / "model", folder / "tokenizer")
    (folder / "train.csv").write_text("text,label\n" + REVIEWS)
    from tests.commands import OWN

    (folder / "my.yaml").write_text(OWN)
    (folder / "fewer.yaml").write_text(
        "model:\n  encoder:\n    class_path: TransformerEncoder\n"
        "    init_args: {vocab_size: 42, num_layers: 3, hidden_size: 8, num_heads: 2}\n  lambda_reg: 0.01\n"
    )
    dact("fit", "--config", "my.yaml", "--config", "fewer.yaml", "--run_tag", "first", cwd=folder)
    return folder


def test_predict_takes_a_run_a_folder_or_a_checkpoint_without_any_yaml(run_of_two_files, dact_here):
    folder = run_of_two_files
    (folder / "new.csv").write_text("body\n" + "\n".join(TEXTS) + "\n")
    (folder / "new.txt").write_text("\n".join(TEXTS))
    run = "lightning_logs/first"
    classifier = TextClassifier.from_pretrained(folder / run / "model")
    assert (classifier.model.encoder.num_layers, classifier.model.output_dimension) == (3, 2)
    expected = [prediction.label for prediction in classifier(TEXTS)]
    walks = [
        ["--model", run, "--data.predict_file", "new.csv", "--data.text_column", "body"],
        ["--model", f"{run}/model", "--data.predict_file", "new.txt"],
        ["--model", f"{run}/checkpoints/last.ckpt", "--data.predict_file", "new.txt"],
        [
            "--config",
            "my.yaml",
            "--ckpt_path",
            f"{run}/checkpoints/best.ckpt",
            "--data.predict_file",
            "new.txt",
        ],
    ]
    for words in walks:
        status, text = dact_here("predict", *words, "--output", "answers.csv", cwd=folder)
        assert status == 0, text
        assert "3 predictions are in answers.csv\n" in text
        assert pd.read_csv(folder / "answers.csv")["label"].tolist() == expected
    assert [path.name for path in (folder / "lightning_logs").iterdir()] == ["first"]


def test_texts_that_the_tokenizer_does_not_know_are_reported(run_of_two_files):
    folder = run_of_two_files
    (folder / "new.txt").write_text(f"{TEXTS[0]}\nQuarterly figures disappointed analysts\n" * 3)
    words = [
        "--model",
        "lightning_logs/first",
        "--data.predict_file",
        "new.txt",
        "--output",
        "answers.csv",
    ]
    done = dact("predict", *words, cwd=folder)
    assert (
        done.stderr.count("some texts consist mostly of tokens that the tokenizer does not know")
        == 1
    )


def test_a_setting_on_the_command_line_replaces_that_of_the_stored_model(
    run_of_two_files, dact_here
):
    folder = run_of_two_files
    (folder / "new.txt").write_text("\n".join(TEXTS))
    for margin, layers in (("0", 1), ("1", None)):
        words = [
            "--model",
            "lightning_logs/first",
            "--model.halting_margin",
            margin,
            "--data.predict_file",
            "new.txt",
        ]
        assert dact_here("predict", *words, "--output", "answers.jsonl", cwd=folder)[0] == 0
        exits = [
            json.loads(line)["exit_layer"]
            for line in (folder / "answers.jsonl").read_text().splitlines()
        ]
        assert layers is None or exits == [layers] * 3
    words = [
        "--model",
        "lightning_logs/first",
        "--model.halting_margin",
        "2",
        "--data.predict_file",
        "new.txt",
    ]
    status, text = dact_here("predict", *words, cwd=folder)
    assert status == 1
    assert "halting_margin" in text


def test_a_signal_ends_a_command_that_waits_for_input_or_works(run_of_two_files):
    words = [
        "predict",
        "--model",
        "lightning_logs/first",
        "--data.predict_file",
        "-",
        "--output",
        "-",
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = warm.start("dact", words, cwd=run_of_two_files, env=environment())
        process.stdin.write("the screen is great\n" * 2100)
        process.stdin.flush()
        assert process.stdout.readline().startswith(
            "label,"
        )  # it has answered some, and waits for more
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert errors.rstrip().endswith("dact: stopped")


def test_a_reader_of_predictions_may_have_had_enough(run_of_two_files):
    (run_of_two_files / "many.txt").write_text("the screen is great\n" * 9000)
    words = [
        "predict",
        "--model",
        "lightning_logs/first",
        "--data.predict_file",
        "many.txt",
        "--output",
        "-",
    ]
    process = warm.start("dact", words, cwd=run_of_two_files, env=environment())
    assert process.stdout.readline().startswith("label,")
    process.stdout.close()
    assert process.wait(timeout=100) == 128 + 13
    assert process.stderr.read() == ""


def test_a_dial_of_a_file_is_not_ignored_without_a_word(run_of_two_files, dact_here):
    folder = run_of_two_files
    (folder / "dial.yaml").write_text("model: {halting_margin: 0.25}\n")
    words = ["--model", "lightning_logs/first", "--data.test_file", "train.csv"]
    with pytest.warns(
        UserWarning,
        match="1.0 in the stored model, and not 0.25 as in the file.*--model.halting_margin 0.25",
    ):
        dact_here("test", "--config", "dial.yaml", *words, cwd=folder)


@pytest.mark.slow
def test_columns_and_the_division_of_the_fit_count_for_its_model(
    run_of_two_files, tmp_path, dact_here, succeed
):
    shutil.copytree(run_of_two_files / "tokenizer", tmp_path / "tokenizer")
    rows = [
        f"screen {i},is {'great' if i % 2 else 'awful'},{'yes' if i % 2 else 'no'}"
        for i in range(60)
    ]
    (tmp_path / "pairs.csv").write_text("first,second,class\n" + "\n".join(rows) + "\n")
    config = (run_of_two_files / "my.yaml").read_text().replace("train.csv", "pairs.csv")
    columns = "text_column: first, text_pair_column: second, label_column: class, seed: 7, val_fraction: 0.4, calibration_fraction: 0.5, "
    (tmp_path / "my.yaml").write_text(
        config.replace("{train_file", "{" + columns + "train_file").replace(
            "max_epochs: 1", "max_epochs: 12"
        )
    )
    succeed(
        "fit",
        "--config",
        "my.yaml",
        "--run_tag",
        "pairs",
        "--model.learning_rate",
        "0.01",
        cwd=tmp_path,
    )
    model = ["--model", "lightning_logs/pairs"]
    text = succeed("test", *model, "--data.test_file", "pairs.csv", cwd=tmp_path)
    assert float(re.search(r"test_accuracy\W+([\d.]+)", text).group(1)) > 0.9
    succeed(
        "predict", *model, "--data.predict_file", "pairs.csv", "--output", "out.csv", cwd=tmp_path
    )
    assert (
        pd.read_csv(tmp_path / "out.csv")["label"] == pd.read_csv(tmp_path / "pairs.csv")["class"]
    ).mean() > 0.9
    validated = []
    data = TextClassificationData.setup

    def noted(self, stage):
        data(self, stage)
        validated.append(self.splits["val"].texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextClassificationData, "setup", noted)
        succeed("validate", *model, "--data.train_file", "pairs.csv", cwd=tmp_path)
        (tmp_path / "others.csv").write_text(
            (tmp_path / "pairs.csv").read_text().replace("screen", "battery")
        )
        succeed("validate", *model, "--data.val_file", "others.csv", cwd=tmp_path)
    fitted = TextClassificationData(
        str(tmp_path / "pairs.csv"),
        tokenizer=str(tmp_path / "tokenizer"),
        text_column="first",
        text_pair_column="second",
        label_column="class",
        seed=7,
        val_fraction=0.4,
        calibration_fraction=0.5,
    )
    fitted.setup("fit")
    assert validated[0] == fitted.splits["val"].texts, "and not texts that it was trained on"
    assert len(validated[-1]) == 60, "of another file, all of it"


def test_rows_of_standard_input_are_answered_before_it_ends(run_of_two_files):
    words = [
        "predict",
        "--model",
        "lightning_logs/first",
        "--data.predict_file",
        "-",
        "--output",
        "-",
    ]
    process = warm.start("dact", words, cwd=run_of_two_files, env=environment())
    process.stdin.write("the screen is great\n" * 4000)
    process.stdin.flush()
    answers = [process.stdout.readline() for _ in range(1025)]  # with the header
    assert answers[0].startswith("label,probability_no,probability_yes,exit_layer,reason")
    assert all(answer.split(",")[0] in ("yes", "no") for answer in answers[1:])
    rest, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    assert len(rest.splitlines()) == 4001 - 1024
    assert "4000 predictions are in standard output, and 1 without a label" in errors


def test_test_without_yaml_measures_own_files(run_of_two_files):
    done = dact(
        "test",
        "--model",
        "lightning_logs/first",
        "--data.test_file",
        "train.csv",
        cwd=run_of_two_files,
    )
    assert "test_accuracy" in done.stdout
    assert [path.name for path in (run_of_two_files / "lightning_logs").iterdir()] == ["first"]


def test_a_model_of_fewer_layers_than_its_encoder_is_calibrated_and_tested(
    run_of_two_files, tmp_path, dact_here
):
    """As `dact tune` makes it. A file of calibration examples is all that calibration needs, and
    chose no checkpoint."""
    folder = tmp_path / "copy"
    shutil.copytree(run_of_two_files, folder)
    words = [
        "--config",
        "my.yaml",
        "--config",
        "fewer.yaml",
        "--model.num_layers",
        "2",
        "--run_tag",
        "cut",
    ]
    status, text = dact_here("fit", *words, cwd=folder)
    assert status == 0, text
    assert re.search("last epoch 1: .* of 2 layers", text)
    model = ["--model", "lightning_logs/cut"]
    words = ["calibrate", *model, "--max_accuracy_loss", "0.5", "--data.calibration_file"]
    status, text = dact_here(*words, "./train.csv", cwd=folder)
    assert status == 1
    assert (
        "data.calibration_file=./train.csv is the train_file of the fit: give another file" in text
    )
    shutil.copy(folder / "train.csv", folder / "other.csv")
    words.append("other.csv")
    for confidence, kind in (("0.95", "keeps max_accuracy_loss=0.5"), ("null", "is an estimate")):
        status, text = dact_here(*words, "--confidence", confidence, cwd=folder)
        assert status == 0, text
        assert kind in text
        assert "of 2\n" in text
        assert "chose the checkpoint" not in text
    stored = (folder / "lightning_logs" / "cut" / "model" / "config.json").read_bytes()
    (folder / "few.csv").write_text(
        "".join((folder / "other.csv").read_text().splitlines(keepends=True)[:9])
    )
    few = [
        "calibrate",
        *model,
        "--max_accuracy_loss",
        "0.01",
        "--confidence",
        "null",
        "--data.calibration_file",
        "few.csv",
    ]
    status, text = dact_here(*few, cwd=folder)
    assert status == 1
    assert (
        "this estimate takes 140 examples or more, got 8: give more, or promise less. The model is left as it"
        in text
    )
    assert stored == (folder / "lightning_logs" / "cut" / "model" / "config.json").read_bytes()
    # Examples that the fit has not set aside are no others afterwards.
    words = [
        "calibrate",
        *model,
        "--config",
        "my.yaml",
        "--max_accuracy_loss",
        "0.5",
        "--confidence",
        "null",
    ]
    status, text = dact_here(*words, cwd=folder)
    assert status == 0, text
    assert "chose the checkpoint" in text
    wrong = (
        ("calibration_fraction", "0.5", "0.0"),
        ("seed", "7", "0"),
        ("val_file", "./train.csv", "None"),
    )
    for option, value, before in wrong:
        status, text = dact_here(*words, f"--data.{option}", value, cwd=folder)
        assert status == 1
        shown = repr(value) if option == "val_file" else value
        assert f"data.{option} was {before} there and is {shown} here: use the value in " in text
    shutil.copy(folder / "train.csv", folder / "new.csv")
    status, text = dact_here(*words, "--data.val_file", "new.csv", cwd=folder)
    assert status == 0, text
    status, text = dact_here("test", *model, "--data.test_file", "train.csv", cwd=folder)
    assert status == 0, text
    assert re.search(r"^estimate of halting_margin .* on these 40 examples$", text, re.MULTILINE)
    for command, option in (
        ("validate", "val_file"),
        ("calibrate", "calibration_file"),
        ("test", "test_file"),
    ):
        status, text = dact_here(command, *model, cwd=folder)
        assert status == 1
        assert f"given by --config, or --data.{option}" in text
    TextClassifier.from_pretrained(folder / "lightning_logs/cut/model").model.save_pretrained(
        folder / "bare"
    )
    status, text = dact_here(
        "predict", "--model", "bare", "--data.predict_file", "train.csv", cwd=folder
    )
    assert status == 1
    assert "no tokenizer is stored with bare: give --data.tokenizer" in text


def test_where_predictions_go_is_checked_before_anything_else(run_of_two_files, dact_here):
    folder = run_of_two_files
    (folder / "folder.csv").mkdir(exist_ok=True)
    for output, message in (
        ("x.xls", "unknown ending '.xls'"),
        ("folder.csv", "folder.csv is a folder"),
        ("train.csv/x.csv", "cannot be written"),
    ):
        words = ["--model", "absent", "--data.predict_file", "new.txt", "--output", output]
        status, text = dact_here("predict", *words, cwd=folder)
        assert status == 1
        assert message in text
    status, text = dact_here(
        "predict", "--model", "absent", "--data.predict_file", "new.txt", cwd=folder
    )
    assert status == 1
    assert "no model at absent, which does not exist" in text


SECTION = "{class_path: dact.data.TextClassificationData, init_args: {predict_file: body.csv, text_column: body}}"
FORMS = {
    "a file of the section": ["--data", "section.yaml"],
    "JSON": [
        "--data",
        "TextClassificationData",
        "--data.init_args",
        '{"predict_file": "body.csv", "text_column": "body"}',
    ],
    "two files that spell the class differently": [
        "--config",
        "data.yaml",
        "--config",
        "more.yaml",
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_options_of_the_data_count_in_every_form(run_of_two_files, tmp_path, dact_here, form):
    model = run_of_two_files / "lightning_logs" / "first"
    (tmp_path / "body.csv").write_text("body\n" + "\n".join(TEXTS) + "\n")
    (tmp_path / "section.yaml").write_text(SECTION)
    (tmp_path / "data.yaml").write_text(f"data: {SECTION}")
    (tmp_path / "more.yaml").write_text(
        "data: {class_path: TextClassificationData, init_args: {batch_size: 2}}"
    )
    words = ["predict", "--model", model, *FORMS[form]]
    status, text = dact_here(*words, "--output", "answers.csv", cwd=tmp_path)
    assert status == 0, text
    expected = [answer.label for answer in TextClassifier.from_pretrained(model / "model")(TEXTS)]
    assert list(pd.read_csv(tmp_path / "answers.csv")["label"].astype(str)) == expected
    status, text = dact_here(*words, "--output", "body.csv", cwd=tmp_path)
    assert status == 1
    assert "--output body.csv is the file with the texts" in text


def test_predictions_go_to_the_home_folder(run_of_two_files, tmp_path, dact_here, monkeypatch):
    """A shell leaves ``~`` as it is in ``--output=~/answers.csv``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "new.txt").write_text("\n".join(TEXTS))
    model = run_of_two_files / "lightning_logs" / "first"
    words = ["--model", model, "--data.predict_file", "new.txt", "--output=~/answers.csv"]
    status, text = dact_here("predict", *words, cwd=tmp_path)
    assert status == 0, text
    assert len(pd.read_csv(tmp_path / "answers.csv")) == len(TEXTS)


def test_a_fit_does_not_join_another_that_runs(run_of_two_files, dact_here):
    run = run_of_two_files / "lightning_logs" / "first"
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    again = [
        "--config",
        "my.yaml",
        "--config",
        "fewer.yaml",
        "--run_tag",
        "first",
        "--trainer.max_epochs",
        "2",
    ]
    with FileLock(run / ".lock"):  # as the other process holds it
        status, text = dact_here("fit", *again, cwd=run_of_two_files)
    assert status == 1
    assert "another dact fit writes to" in text
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_predictions_never_replace_the_texts(run_of_two_files, dact_here):
    (run_of_two_files / "same.csv").write_text("text\nthe screen is great\n")
    words = [
        "--model",
        "lightning_logs/first",
        "--data.predict_file",
        "same.csv",
        "--output",
        "./same.csv",
    ]
    status, text = dact_here("predict", *words, cwd=run_of_two_files)
    assert status == 1
    assert (
        "--output ./same.csv is the file with the texts, and would replace it: name another" in text
    )
    status, text = dact_here("predict", *words[:4], "--out", "same.csv", cwd=run_of_two_files)
    assert status == 2, "a shortened option"
    assert "no option --out. Did you mean --output?" in text
    (run_of_two_files / "predictions.csv").write_text("text\nthe screen is great\n")
    status, text = dact_here(
        "predict", *words[:2], "--data.predict_file", "predictions.csv", cwd=run_of_two_files
    )
    assert status == 1, "where no --output is given, that is where they go"
    (run_of_two_files / "predictions.csv").unlink()


def test_wrong_options_of_evaluation_are_refused_in_one_line(run_of_two_files, dact_here):
    (run_of_two_files / "same.csv").write_text("text\nthe screen is great\n")
    predict, calibrate = (
        ["predict", "--data.predict_file", "same.csv"],
        ["calibrate", "--max_layers", "2"],
    )
    margin = ["--model.halting_margin=0.3", "--data.calibration_file", "train.csv"]
    for words, message in (
        ([*predict, "--data.max_length", "-5"], "data.max_length must be 1 or more, got -5"),
        ([*predict, "--data.batch_size", "0"], "data.batch_size must be 1 or more, got 0"),
        (
            [*calibrate, "--data.test_file", "train.csv"],
            "dact calibrate needs --data.calibration_file",
        ),
        (
            [*calibrate, *margin],
            "dact calibrate finds halting_margin itself: leave --model.halting_margin out",
        ),
    ):
        status, text = dact_here(*words, "--model", "lightning_logs/first", cwd=run_of_two_files)
        assert status == 1
        assert message in text


def test_a_failing_file_leaves_no_predictions(run_of_two_files, dact_here):
    (run_of_two_files / "broken.jsonl").write_text(json.dumps({"text": "great"}) + "\n{broken\n")
    words = [
        "--model",
        "lightning_logs/first",
        "--data.predict_file",
        "broken.jsonl",
        "--output",
        "none.csv",
    ]
    status, text = dact_here("predict", *words, cwd=run_of_two_files)
    assert status == 1
    assert "broken.jsonl: line 2 is no JSON" in text
    assert not (run_of_two_files / "none.csv").exists()
    assert not list(run_of_two_files.glob(".none*"))


TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.mark.slow
def test_two_processes_classify_each_row_once_and_measure_each_example_once(
    run_of_two_files, dact_here, succeed
):
    folder, model = run_of_two_files, ["--model", "lightning_logs/first"]
    texts = [f"the screen is {('great', 'awful', 'poor')[n % 3]} {n}" for n in range(2501)]
    texts[1030] = ""
    pd.DataFrame({"text": texts}).to_csv(folder / "many.csv")
    words = ["predict", *model, "--data.predict_file", "many.csv", "--output"]
    assert dact_here(*words, "one.csv", cwd=folder)[0] == 0
    done = dact(*words, "two.csv", *TWO, cwd=folder)
    assert "2 processes write one file each, two-1-of-2.csv and so on" in done.stdout + done.stderr
    assert "1477 predictions are in two-1-of-2.csv\n" in done.stderr
    assert "1023 predictions are in two-2-of-2.csv, and 1 without a label" in done.stderr
    assert not (folder / "two.csv").exists()
    both = pd.concat([pd.read_csv(folder / f"two-{n}-of-2.csv") for n in (1, 2)]).sort_values("row")
    assert both["row"].tolist() == list(range(2501))
    alone = pd.read_csv(folder / "one.csv")
    assert both["label"].fillna("").tolist() == alone["label"].fillna("").tolist()
    assert both["exit_layer"].tolist() == pytest.approx(alone["exit_layer"].tolist(), nan_ok=True)
    assert both["reason"].fillna("").tolist() == ["" if text else "empty text" for text in texts]
    (folder / "odd.csv").write_text("text,label\n" + "".join(REVIEWS.splitlines(True)[:27]))
    words = ["test", *model, "--data.test_file", "odd.csv"]
    one = succeed(*words, cwd=folder)
    done = dact(*words, *TWO, cwd=folder)
    assert "DistributedSampler" not in done.stdout + done.stderr
    alone, both = (
        {name: float(value) for name, value in re.findall(r"^(\w+_\w+\S*) +([\d.]+)$", table, re.M)}
        for table in (one, done.stdout)
    )
    assert len(alone) > 8
    assert both == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_the_memory_of_predict_does_not_grow_with_the_file(run_of_two_files):
    peaks = []
    for rows in (5_000, 105_000):
        lines = "".join(f"the screen is great {n}\n" for n in range(rows))
        (run_of_two_files / "large.csv").write_text("text\n" + lines)
        words = [
            "--model",
            "lightning_logs/first",
            "--data.predict_file",
            "large.csv",
            "--output",
            "large.parquet",
        ]
        plan = json.dumps({"peak": True})
        process = warm.start(
            "tests.killed", [plan, "predict", *words], cwd=run_of_two_files, env=environment()
        )
        said, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        assert f"{rows} predictions" in errors
        peaks.append(int(said.split("PEAK")[1]))
    # MiB; 100,000 dicts of five entries alone would take more.
    assert peaks[1] - peaks[0] < 15, peaks


MINE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class Mine(LightningDataModule):
    def __init__(self, kind: str = "good"):
        super().__init__()
        self.kind = kind

    def loader(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 42, (40, 6), generator=generator)
        batches = []
        for start in range(0, 40, 8):
            rows = ids[start : start + 8]
            batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows[:, 0] % 2}
            if self.kind == "tuple":
                batch = (rows, rows[:, 0] % 2)
            if self.kind == "outside":
                batch["labels"] = batch["labels"] + 5
            if self.kind == "unlabelled":
                batch["labels"][0] = -100
            if self.kind == "several":
                batch["labels"] = torch.zeros(8, 2)
            batches.append(batch)
        return DataLoader(batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader
"""
MINE_YAML = """
trainer: {max_epochs: 1, accelerator: cpu}
model:
  encoder:
    class_path: TransformerEncoder
    init_args: {vocab_size: 42, num_layers: 2, hidden_size: 8, num_heads: 2}
  output_dimension: 2
data: {class_path: mine.Mine}
"""


def test_a_datamodule_of_ones_own_works_with_every_command(tmp_path, dact_here):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(MINE_YAML)
    dact("fit", "--config", "mine.yaml", "--run_tag", "own", cwd=tmp_path)
    stored = ["--config", "mine.yaml", "--model", "lightning_logs/own"]
    for command in ("test", "validate"):
        status, text = dact_here(command, *stored, cwd=tmp_path)
        assert status == 0, text
    status, text = dact_here(
        "calibrate", *stored, "--max_layers", "1.99", "--confidence", "0.1", cwd=tmp_path
    )
    assert "halting_margin" in text
    status, text = dact_here("predict", *stored, "--output", "x.csv", cwd=tmp_path)
    assert status == 0, text
    assert "40 predictions are in x.csv" in text
    assert len(pd.read_csv(tmp_path / "x.csv")) == 40
    for kind, message in (
        ("tuple", "got a list of 2"),
        ("outside", "labels must be in 0 … 1 (or -100 for none), got"),
        ("several", "several labels per example and numbers as targets are not supported"),
    ):
        status, text = dact_here("fit", "--config", "mine.yaml", "--data.kind", kind, cwd=tmp_path)
        assert status == 1
        assert text.count("dact: error:") == 1
        assert message in text.replace("got a tuple", "got a list")
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["own"], (
        "failed fits leave no folder"
    )
    status, text = dact_here("test", *stored, "--data.kind", "unlabelled", cwd=tmp_path)
    assert status == 1
    assert "a batch for test has the label -100: only training takes unlabelled examples" in text


def test_a_run_of_tune_stands_for_its_final_model(fitted, tmp_path):
    shutil.copytree(fitted[1] / "model", tmp_path / "run" / "final" / "model")
    assert find_model(tmp_path / "run") == tmp_path / "run" / "final" / "model"
    assert isinstance(DACT.from_pretrained(find_model(tmp_path / "run")), DACT)
    shutil.rmtree(tmp_path / "run" / "final" / "model")
    with pytest.raises(FileNotFoundError, match="run of dact tune without its final model"):
        find_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("full", "early", "agreement", "verdict"),
    [
        (0.9, 0.895, 0.98, "holds"),
        (0.9, 0.888, 0.98, "is within its error"),
        (0.9, 0.8, 0.88, "does not hold"),
    ],
)
def test_a_promise_is_judged_with_its_standard_error(full, early, agreement, verdict):
    calibration = {
        "promise": {"max_accuracy_loss": 0.01, "dial": "halting_margin"},
        "halting_margin": 0.9,
    }
    metrics = {"test_accuracy": early, "test_layer_accuracy/2": full, "test_agreement": agreement}
    line = promise_line(calibration, metrics, 2, torch.tensor([500, 500]))
    assert f"it {verdict} on these 1000 examples" in line
    assert f"{100 * (full - early):.2f} points (standard error at most" in line
