"""The commands over a stored model: test, validate, predict, calibrate and export."""

import csv
import json
import re
import shutil
import signal
import warnings

import pandas as pd
import pytest
import torch

from dact import DACT, TextClassifier, functional
from dact.calibration.answers import LayerAnswers, Measured
from dact.cli.output import measurements, promise_line, quiet
from dact.cli.stored import find_model
from dact.data import CompositionalSentiment
from tests import warm
from tests.commands import OWN, REVIEWS, dact, environment
from tests.tables import write_table

TEXTS = ["the screen is great", "the screen is awful", "great"]
RUN = ["--model", "lightning_logs/first"]
ANSWER = ["--output", "out.csv", "--data.predict_file"]


@pytest.fixture
def succeed(dact_here, monkeypatch):
    """Run a command that must succeed in this process: what it printed."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments, cwd):
        status, text = dact_here(*arguments, cwd=cwd)
        assert status == 0, text
        return text

    return call


@pytest.fixture(scope="session")
def run_of_two_files(fitted, tmp_path_factory):
    """A folder in which a fit ran on two files, of which the second one changes the model."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(fitted[1] / "model", folder / "tokenizer")
    (folder / "train.csv").write_text("text,label\n" + REVIEWS)
    (folder / "other.csv").write_text("text,label\n" + REVIEWS.replace("screen", "battery"))
    (folder / "new.txt").write_text("\n".join(TEXTS))
    (folder / "my.yaml").write_text(OWN)
    encoder = {"class_path": "TransformerEncoder"}
    encoder["init_args"] = {"vocab_size": 42, "num_layers": 3, "hidden_size": 8, "num_heads": 2}
    (folder / "fewer.yaml").write_text(json.dumps({"model": {"encoder": encoder}}))
    dact("fit", "--config", "my.yaml", "--config", "fewer.yaml", "--run_tag", "first", cwd=folder)
    return folder


def read_table(path):
    if path.suffix == ".csv":
        return pd.read_csv(path)
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, lines=True)


# ------------------------------------------------------------------ test and validate


def test_test_and_validate_measure_the_model_on_the_data_of_its_fit(fitted, succeed):
    folder, run, _ = fitted
    for command, examples in (("test", 90), ("validate", 60)):
        text = succeed(command, "--model", run, cwd=folder)
        assert "halting_margin " in text
        split = {"test": "test", "validate": "validation"}[command]
        assert f"examples   {examples} of the {split} split\n" in text
        assert re.search(r"^accuracy   [\d.]+ %, all 3 layers [\d.]+ %, always ", text, re.M)
        assert re.search(r"^layers     [\d.]+ of 3; after layer 1: \d+", text, re.M)
        for name in ("agreement", "macro F1", "F1 ", "confused"):
            assert re.search(rf"^{name} ", text, re.M)
    checkpoint = run / "checkpoints" / "best.ckpt"
    of_folder = succeed("test", "--model", run / "model", cwd=folder)
    assert succeed("test", "--model", checkpoint, cwd=folder) == of_folder


def test_own_files_are_tested_where_those_of_the_fit_are_gone(run_of_two_files, tmp_path, succeed):
    shutil.copytree(run_of_two_files / "lightning_logs", tmp_path / "lightning_logs")
    shutil.copy(run_of_two_files / "other.csv", tmp_path)
    text = succeed("test", *RUN, "--data.test_file", "other.csv", cwd=tmp_path)
    assert "examples   40" in text
    text = succeed("validate", *RUN, "--data.val_file", "other.csv", cwd=tmp_path)
    assert "examples   40" in text, "of another file, all of it"
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["first"]


@pytest.mark.slow
def test_columns_and_the_division_of_the_fit_count_for_its_model(
    run_of_two_files, tmp_path, succeed
):
    shutil.copytree(run_of_two_files / "tokenizer", tmp_path / "tokenizer")
    words = [("great", "yes") if i % 2 else ("awful", "no") for i in range(60)]
    rows = [f"screen {i},is {word},{label}" for i, (word, label) in enumerate(words)]
    (tmp_path / "pairs.csv").write_text("first,second,class\n" + "\n".join(rows) + "\n")
    columns = "text_column: first, text_pair_column: second, label_column: class, "
    columns += "seed: 7, val_fraction: 0.4, train_file: pairs.csv"
    config = OWN.replace("train_file: train.csv", columns).replace("epochs: 1", "epochs: 6")
    (tmp_path / "my.yaml").write_text(config)
    fit = ["fit", "--config", "my.yaml", "--run_tag", "first", "--model.learning_rate", "0.02"]
    succeed(*fit, cwd=tmp_path)
    succeed("predict", *RUN, *ANSWER, "pairs.csv", cwd=tmp_path)
    answers = pd.read_csv(tmp_path / "out.csv")["label"]
    assert (answers == pd.read_csv(tmp_path / "pairs.csv")["class"]).mean() > 0.9
    # By hash, 20 of the 60 texts are for validation, and 15 of these are aside.
    assert "examples   5 of the validation split\n" in succeed("validate", *RUN, cwd=tmp_path)


@pytest.mark.parametrize(
    ("full", "early", "verdict"),
    [(900, 895, "holds"), (900, 888, "is within its error"), (900, 800, "does not hold")],
)
def test_a_promise_is_judged_with_its_standard_error(full, early, verdict):
    promise = {"max_accuracy_loss": 0.01, "dial": "halting_margin"}
    calibration = {"promise": promise, "halting_margin": 0.9}
    right = torch.arange(1000)[:, None] < torch.tensor([early, full])
    y = torch.where(right[..., None], torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9]))
    a, p = functional.accumulate(y, torch.ones(1000, 2))
    answers = LayerAnswers(a, p, y, torch.zeros(1000, dtype=torch.long))
    line = promise_line(calibration, Measured(answers, torch.ones(1000, dtype=torch.long)))
    assert f"it {verdict} on these 1000 examples" in line
    assert f"{(full - early) / 10:.2f} (standard error" in line


@pytest.mark.parametrize(
    ("layer", "warning"),
    [(1, "Every text leaves after layer 1"), (2, "No text leaves early"), (0, None)],
)
def test_measurements_have_classes_confusions_and_a_warning(layer, warning):
    y = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 1, 1, 1, 1]), 3)[:, None].float()
    a, p = functional.accumulate(y.expand(-1, 2, -1), torch.ones(7, 2))
    answers = LayerAnswers(a, p, y, torch.tensor([0, 0, 0, 1, 1, 1, 2]))
    exits = torch.full((7,), layer) if layer else torch.tensor([1, 2, 1, 1, 2, 1, 1])
    text = measurements(Measured(answers, exits), ["no", "yes", "odd"], "test")
    assert "confused   no as yes (2), odd as yes (1)\n" in text, "the two most frequent"
    assert "F1         no 0.500, yes 0.667, odd 0.000\n" in text
    assert ("Every text" in text or "No text" in text) == bool(warning)
    assert (warning or "") in text


def test_a_warning_is_printed_once_in_a_command(capsys):
    with warnings.catch_warnings():
        quiet()
        for _ in range(2):  # as when each fit reads the same file
            warnings.simplefilter("always")
            warnings.warn("a.csv: texts with conflicting labels: 3", stacklevel=1)
    assert capsys.readouterr().err == "warning: a.csv: texts with conflicting labels: 3\n"


# ------------------------------------------------------------------ predict


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_predict_writes_the_answers_of_the_classifier_in_the_order_of_the_rows(
    fitted, tmp_path, succeed, ending
):
    run, names = fitted[1], ("negative", "neutral", "positive")
    data = CompositionalSentiment(num_test=90, max_depth=3)
    data.setup("test")
    texts = data.splits["test"].texts
    columns = {"id": range(90), "text": texts, "label": ["x"] * 90, "n": [0.5] * 90}
    write_table(tmp_path / f"in.{ending}", columns)
    words = ["predict", "--model", run, "--data.predict_file", f"in.{ending}", "--output"]
    text = succeed(*words, f"out.{ending}", cwd=tmp_path)
    assert f"90 rows are in out.{ending}\n" in text
    frame = read_table(tmp_path / f"out.{ending}")
    probabilities = [f"probability_{name}" for name in names]
    answers = ["label", "score", *probabilities, "exit_layer", "reason"]
    assert list(frame.columns) == ["text", "id", *answers]
    assert frame["text"].tolist() == texts
    assert frame["id"].astype(int).tolist() == list(range(90))
    expected = TextClassifier.from_pretrained(str(run))(texts)
    assert frame["label"].tolist() == [one.label for one in expected]
    assert frame["exit_layer"].tolist() == [one.exit_layer for one in expected]
    assert frame["score"].tolist() == pytest.approx([one.score for one in expected], abs=1e-4)
    assert frame[probabilities].max(axis=1).tolist() == pytest.approx(frame["score"].tolist())
    succeed(*words, f"kept.{ending}", "--keep_columns", "[n, label]", cwd=tmp_path)
    assert list(read_table(tmp_path / f"kept.{ending}"))[:2] == ["n", "input_label"]


def test_predict_takes_a_run_a_folder_or_a_checkpoint_without_any_yaml(
    run_of_two_files, tmp_path, succeed, monkeypatch
):
    folder, run = run_of_two_files, "lightning_logs/first"
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves ~ as it is in --output=~/out.csv
    (folder / "new.csv").write_text("id|body\n" + "".join(f"1|{text}\n" for text in TEXTS))
    data = {"predict_file": "new.csv", "text_column": "body", "delimiter": "|"}
    (folder / "data.yaml").write_text(json.dumps({"data": {"init_args": data}}))
    classifier = TextClassifier.from_pretrained(folder / run / "model")
    assert (classifier.model.encoder.num_layers, classifier.model.output_dimension) == (3, 2)
    expected = [prediction.label for prediction in classifier(TEXTS)]
    columns = ["--data.text_column", "body", "--data.delimiter", "|"]
    for model, *words in (
        [run, "--data.predict_file", "new.csv", *columns],
        [run, "--config", "data.yaml"],
        [f"{run}/model", "--data.predict_file", "new.txt"],
        [f"{run}/checkpoints/last.ckpt", "--data.predict_file", "new.txt"],
    ):
        succeed("predict", "--model", model, *words, "--output=~/out.csv", cwd=folder)
        assert pd.read_csv(tmp_path / "out.csv")["label"].tolist() == expected
        (tmp_path / "out.csv").unlink()
    # A dial on the command line replaces that of the stored model.
    for margin in ("0", "1"):
        words = [*RUN, *ANSWER, "new.txt", "--halting_margin", margin]
        succeed("predict", *words, cwd=folder)
        exits = pd.read_csv(folder / "out.csv")["exit_layer"].tolist()
        assert (exits == [1, 1, 1]) == (margin == "0")


def test_what_cannot_be_classified_has_a_reason(run_of_two_files, succeed):
    folder = run_of_two_files
    lines = [b"text", b"the screen is great", b"", b"\xff\xfe", b'"a, ""b"""', b"   "]
    (folder / "odd.csv").write_bytes(b"\n".join(lines) + b"\n")
    text = succeed("predict", *RUN, *ANSWER, "odd.csv", cwd=folder)
    assert "5 rows are in out.csv, 3 of them without a label" in text
    rows = list(csv.DictReader((folder / "out.csv").open()))
    reasons = ["", "empty text", "not valid UTF-8", "", "empty text"]
    assert [row["reason"] for row in rows] == reasons
    assert all((row["label"] in ("yes", "no")) == (row["reason"] == "") for row in rows)


def streaming(folder, rows, predict_file="-"):
    """A command that has begun to answer `rows` texts of its standard input."""
    words = ["predict", *RUN, "--data.predict_file", predict_file, "--output", "-"]
    process = warm.start("dact", words, cwd=folder, env=environment())
    process.stdin.write("the screen is great\n" * rows)
    process.stdin.flush()
    header = process.stdout.readline()
    assert header.startswith("text,label,score,probability_no,probability_yes,exit_layer")
    return process


def test_a_signal_ends_a_command_that_waits_for_input(run_of_two_files):
    process = streaming(run_of_two_files, 2100)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert "Traceback" not in errors


def test_the_reader_of_predictions_may_close_the_pipe(run_of_two_files):
    (run_of_two_files / "many.txt").write_text("the screen is great\n" * 9000)
    process = streaming(run_of_two_files, 0, "many.txt")
    process.stdout.close()
    assert process.wait(timeout=100) == 128 + 13
    assert "rror" not in process.stderr.read()


def test_rows_of_standard_input_are_answered_before_it_ends(run_of_two_files):
    process = streaming(run_of_two_files, 4000)
    answers = [process.stdout.readline() for _ in range(1024)]
    assert all(answer.split(",")[1] in ("yes", "no") for answer in answers)
    rest, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    assert len(rest.splitlines()) == 4001 - 1024
    assert "4001 rows are in standard output, 1 of them without a label" in errors


def test_a_failing_file_leaves_no_predictions(run_of_two_files, dact_here):
    (run_of_two_files / "broken.jsonl").write_text(json.dumps({"text": "great"}) + "\n{broken\n")
    words = [*RUN, "--data.predict_file", "broken.jsonl", "--output", "none.csv"]
    status, text = dact_here("predict", *words, cwd=run_of_two_files)
    assert status == 1
    assert "broken.jsonl: line 2 is not valid JSON" in text
    assert not (run_of_two_files / "none.csv").exists()
    assert not list(run_of_two_files.glob(".none*"))


@pytest.mark.slow
def test_the_memory_of_predict_does_not_grow_with_the_file(run_of_two_files):
    peaks = []
    for rows in (5_000, 65_000):
        lines = "".join(f"the screen is great {n}\n" for n in range(rows))
        (run_of_two_files / "large.csv").write_text("text\n" + lines)
        words = ["--data.predict_file", "large.csv", "--output", "large.parquet"]
        arguments = [json.dumps({"peak": True}), "predict", *RUN, *words]
        process = warm.start("tests.killed", arguments, cwd=run_of_two_files, env=environment())
        said, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        assert f"{rows} rows" in errors
        peaks.append(int(said.split("PEAK")[1]))
    # MiB; 60,000 dicts of five entries alone would take more.
    assert peaks[1] - peaks[0] < 9, peaks


# ------------------------------------------------------------------ calibrate


def test_a_calibrated_dial_is_stored_and_tested(fitted, tmp_path, dact_here, succeed):
    folder, run = fitted[0], tmp_path / "run"
    shutil.copytree(fitted[1], run)
    # Examples that leave by the margin would need no tolerance.
    words = ["calibrate", "--model", run, "--dial", "halting_tolerance", "--halting_margin", "1"]
    text = succeed(*words, "--max_layers", "2.99", "--confidence", "0.2", cwd=folder)
    assert "keeps max_layers=2.99 with confidence 0.2" in text
    assert "halting_tolerance was " in text
    assert "its promise is replaced" in text, "the one of the fit"
    stored = TextClassifier.from_pretrained(run / "model").model
    assert 0 <= stored.halting_tolerance < 1
    assert stored.calibration["promise"]["max_layers"] == 2.99
    loaded = DACT.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert loaded.calibration == stored.calibration
    text = succeed("test", "--model", run, cwd=folder)
    line = r"^promise of halting_tolerance [\d.]+: at most 2.99 of 3 layers .*standard error"
    assert re.search(line, text, re.MULTILINE)
    text = succeed("test", "--model", run, "--halting_tolerance", "0.001", cwd=folder)
    assert "with no promise, as the stored one is for another setting" in text
    assert "promise of" not in text
    status, text = dact_here(*words, "--max_layers", "1", cwd=folder)
    assert status == 1
    assert re.search(r"max_layers=1 .* and [12]\.\d+ can be promised", text)


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test", "--model", "absent"], "no model at absent"),
        (["test", "--model", "first"], "did you mean lightning_logs/first?"),
        (["test", "--data.test_file", "other.csv"], "required: model"),
        (["test", *RUN], "test_file"),
        (["test", *RUN, "--data.test_file", "absent.csv"], "no file absent.csv"),
        (["test", *RUN, "--data.test_file=other.csv", "--data.label_column=class"], "'class'"),
        (["predict", *RUN], "needs --data.predict_file"),
        (
            ["predict", *RUN, "--output=other.csv", "--data.predict_file=other.csv"],
            "--output other.csv is the file with the texts",
        ),
        (["predict", *RUN, *ANSWER, "other.csv", "--output", "x.xls"], "must end in"),
        (["predict", *RUN, *ANSWER, "other.csv", "--outpt", "x.csv"], "mean output?"),
        (["predict", *RUN, *ANSWER, "other.csv", "--halting_margin=2"], "in [0, 1], got 2.0"),
        (["predict", "--model=bare", *ANSWER, "other.csv"], "is stored with bare: give --data.tok"),
        (
            ["calibrate", *RUN, "--data.calibration_file=other.csv"],
            "max_accuracy_loss=0.01 with confidence 0.95 takes 300 examples or more, and there are",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line(run_of_two_files, dact_here, words, message):
    folder = run_of_two_files
    if not (folder / "bare").exists():
        DACT.from_pretrained(folder / "lightning_logs/first/model").save_pretrained(folder / "bare")
    status, text = dact_here(*words, cwd=folder)
    assert status in (1, 2)
    assert len(re.findall("^dact: error: ", text, re.MULTILINE)) == 1
    assert message in " ".join(text.split())
    assert "Traceback" not in text
    assert not (folder / "predictions.csv").exists()


def test_an_error_is_let_through_when_its_traceback_is_asked_for(tmp_path, dact_here, monkeypatch):
    monkeypatch.setenv("DACT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="no model at absent"):
        dact_here("test", "--model", "absent", cwd=tmp_path)


# ------------------------------------------------------------------ the rest


MINE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class Mine(LightningDataModule):
    def loader(self):
        ids = torch.arange(40 * 6).view(-1, 6) % 39 + 3
        batches = [{"input_ids": rows, "labels": rows[:, 0] % 2} for rows in ids.split(8)]
        return DataLoader(batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = loader
"""


def test_a_datamodule_of_ones_own_works_with_the_commands(fitted, tmp_path, succeed):
    (tmp_path / "mine.py").write_text(MINE)
    own = OWN[: OWN.index("data:")] + "  output_dimension: 2\ndata: {class_path: mine.Mine}\n"
    (tmp_path / "mine.yaml").write_text(own)
    model = ["--model", tmp_path / "lightning_logs" / "own"]
    succeed("fit", "--config", "mine.yaml", "--run_tag", "own", cwd=tmp_path)
    for command in ("test", "validate"):
        assert "examples   40" in succeed(command, *model, cwd=tmp_path)
    words = ["calibrate", "--max_accuracy_loss=0.9", "--confidence=null", "--model"]
    text = succeed(*words, "best.ckpt", cwd=model[1] / "checkpoints")
    assert " in ../model and best.ckpt" in text
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("great\n")
    words = ["--data.predict_file", "mine.txt", "--data.tokenizer", fitted[1] / "model"]
    succeed("predict", *model, *words, cwd=tmp_path / "elsewhere")


def test_a_model_is_exported_with_its_promise_and_answers_as_before(
    fitted, run_of_two_files, tmp_path, succeed
):
    folder, run, _ = fitted
    text = succeed("export", "--output", tmp_path / "exported", "--model", run, cwd=folder)
    assert "keeps min_agreement=0.95" in text, "as the fit"
    assert DACT.from_pretrained(tmp_path / "exported").calibration["examples"] == 60
    words = ["calibrate", "--model", tmp_path / "exported", "--min_agreement", "0.9"]
    assert "min_agreement=0.9 " in succeed(*words, cwd=folder), "it knows its data"
    (tmp_path / "own.csv").write_text(
        "text,label\n" + "".join(f"great {i},positive\n" for i in range(40))
    )
    words += ["--config", "my.yaml", "--data.train_file", tmp_path / "own.csv"]
    # my.yaml has the short name of the encoder's class.
    succeed(*words, "--confidence", "null", cwd=run_of_two_files)
    labels = []
    for model in (run, tmp_path / "exported"):
        succeed("predict", "--model", model, *ANSWER, "new.txt", cwd=run_of_two_files)
        labels.append(pd.read_csv(run_of_two_files / "out.csv")["label"].tolist())
    assert labels[0] == labels[1]


def test_a_run_of_tune_stands_for_its_final_model(fitted, tmp_path):
    shutil.copytree(fitted[1] / "model", tmp_path / "run" / "final" / "model")
    assert find_model(tmp_path / "run") == tmp_path / "run" / "final" / "model"
    shutil.rmtree(tmp_path / "run" / "final" / "model")
    with pytest.raises(FileNotFoundError, match="run of dact tune without its final model"):
        find_model(tmp_path / "run")
