"""Several labels per text from end to end: files, a fit, promises, predictions, tuning, export."""

import json
import random
import runpy
from pathlib import Path

import lightning.pytorch as pl
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import f1_score

from dact import DACT, TextClassifier, calibrate, functional
from dact.calibration import LayerAnswers, layer_answers
from dact.calibration.temperature import fit_temperatures, temper
from dact.calibration.thresholds import best_thresholds
from dact.data import TextClassificationData
from dact.data.tokenizers import word_tokenizer
from dact.encoders import TransformerEncoder
from dact.exporting import export
from dact.tasks import MULTILABEL, Multilabel
from dact.tuning import TuningEngine
from tests.commands import ROOT
from tests.conftest import random_batch, tiny_model
from tests.tables import write_table

NAMES = ["anger", "fear", "joy"]
WORDS = {"joy": "happy glad", "anger": "furious mad", "fear": "scared afraid"}
FILLERS = ["the", "a", "it", "was", "and", "then", "we", "went", "there", "today", "people", "say"]


def texts_with_labels(count=400):
    """Texts that differ, each with a word for each of its labels."""
    draw, found = random.Random(0), {}
    while len(found) < count:
        labels = [name for name in NAMES if draw.random() < 0.4]
        words = draw.choices(FILLERS, k=draw.randint(4, 9))
        for name in labels:
            words.insert(draw.randrange(len(words)), draw.choice(WORDS[name].split()))
        found[" ".join(words)] = labels
    return found


ROWS = texts_with_labels()


def write(folder, form):
    """Write ROWS in one of the forms, and return the options that read them."""
    lists = {"text": [*ROWS], "label": [*ROWS.values()]}
    joined = {**lists, "label": [" | ".join(labels) for labels in ROWS.values()]}
    columns = {name: [int(name in labels) for labels in ROWS.values()] for name in NAMES}
    name, table, options = {
        "lists": ("lists.jsonl", lists, {}),
        "parquet": ("lists.parquet", lists, {}),
        "separator": ("separator.csv", joined, {"label_separator": "|"}),
        "columns": ("columns.csv", {"text": [*ROWS], **columns}, {"label_columns": NAMES}),
    }[form]
    write_table(folder / name, table)
    return {"train_file": str(folder / name), **options}


def tokenizer():
    return word_tokenizer([*FILLERS, *" ".join(WORDS.values()).split()])


def make_data(folder, form="separator", **options):
    options = {"val_fraction": 0.4, "max_length": 32, "calibration_fraction": 0.5, **options}
    return TextClassificationData(**write(folder, form), tokenizer=tokenizer(), **options)


def make_model(**options):
    encoder = TransformerEncoder(len(tokenizer()), 3, 16, 2)
    options = {"output_dimension": 3, "task": "multilabel", "learning_rate": 1e-2, **options}
    return DACT(encoder=encoder, **options)


@pytest.mark.parametrize("form", ["lists", "parquet", "separator", "columns"])
def test_every_form_of_a_file_has_the_same_labels(tmp_path, form):
    data = make_data(tmp_path, form)
    data.setup("fit")
    assert (data.task, data.class_names) == ("multilabel", NAMES)
    for examples in data.splits.values():
        for text, labels in zip(examples.texts, examples.labels, strict=True):
            assert [name for name, one in zip(NAMES, labels, strict=True) if one] == ROWS[text]
    assert any(not any(labels) for labels in data.splits["train"].labels)
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"].shape, batch["labels"].dtype) == ((32, 3), torch.int64)
    learned = [*data.splits["train"].texts, *data.splits["confidence"].texts]
    count = sum("joy" in ROWS[text] for text in learned)
    assert data.describe_classes().startswith("3 labels: anger ")
    assert f"joy {count}" in data.describe_classes()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (
            "text,label\na b,x|y\nb c,z\n",
            {"class_names": ["x", "y"], "label_separator": "|"},
            "row 3 .*outside.*'z'",
        ),
        ("text,x,y\na b,0,1\nb c,2,0\n", {"label_columns": ["x", "y"]}, "'2' instead of 0 or 1"),
        ("text,x,y\na b,0,1\n", {"label_columns": ["x", "z"]}, "no column 'z'.*label_columns"),
    ],
)
def test_labels_that_are_none_are_an_error_with_their_row(tmp_path, text, options, said):
    (tmp_path / "bad.csv").write_text(text)
    data = TextClassificationData(str(tmp_path / "bad.csv"), tokenizer=tokenizer(), **options)
    with pytest.raises(ValueError, match=said):
        data.setup("fit")


def test_a_model_of_the_other_task_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ValueError, match="the data is multilabel.*set task to 'multilabel'"):
        fit(make_model(task="multiclass"), make_data(tmp_path))
    with pytest.raises(ValueError, match="thresholds go with task='multilabel'"):
        make_model(task="multiclass", thresholds=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="thresholds must be in \\(0, 1\\), got 1"):
        make_model(thresholds=[0.5, 0.5, 1])


def fit(model, data, **options):
    options = {
        "max_epochs": 12,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        **options,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, data)
    return trainer


def test_early_exit_returns_the_set_of_all_layers():
    model = tiny_model(layers=5, task="multilabel", thresholds=[0.3, 0.5, 0.8])
    early, full = model.early_exit(random_batch(300)), model.full_depth(random_batch(300))
    assert early.exit_layer.unique().numel() > 1
    assert torch.equal(early.exit_layer, full.exit_layer)
    decisions = (model.task.decide(one.probabilities) for one in (early, full))
    assert model.task.same(*decisions).all()


def test_a_stored_model_has_its_task_and_thresholds_and_a_promise_is_for_them(tmp_path):
    model = tiny_model(task="multilabel", thresholds=[0.3, 0.5, 0.8])
    batch = {**random_batch(200), "labels": torch.randint(0, 2, (200, 3))}
    calibrate(model, [batch], min_agreement=0.9)
    model.save_pretrained(tmp_path)
    stored = DACT.from_pretrained(tmp_path)
    assert stored.task == Multilabel((0.3, 0.5, 0.8))
    assert stored.calibration is not None
    stored.thresholds = [0.3, 0.5, 0.7]
    assert stored.calibration is None


def test_the_best_thresholds_are_those_of_an_exhaustive_search():
    a = (torch.rand(60, 1, 2) * 40).round() / 40  # with ties
    target = (torch.rand(60, 2) < a[:, 0] ** 2).long()
    target[:, 1] = 0
    found = best_thresholds(LayerAnswers(a, torch.zeros(60, 1), a, target, MULTILABEL))
    assert found[1] == 0.5

    def f1(threshold):
        return f1_score(target[:, 0], a[:, 0, 0] > threshold, zero_division=0)

    assert f1(found[0]) == max(f1(step / 80) for step in range(80))


def test_temperatures_of_labels_make_scores_mean_what_they_say():
    logits, exits = 2 * torch.randn(3000, 1, 2), torch.ones(3000, dtype=torch.long)
    target = torch.bernoulli(logits[:, 0].sigmoid()).long()
    a = (3 * logits).sigmoid()  # three times too sure
    answers = LayerAnswers(a, torch.zeros(3000, 1), a, target, MULTILABEL)
    tempered = temper(a[:, 0], exits, fit_temperatures(answers, exits), MULTILABEL)
    torch.testing.assert_close(tempered, logits[:, 0].sigmoid(), atol=0.05, rtol=0)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Data, a fitted model and its Trainer."""
    torch.manual_seed(0)
    data, model = make_data(tmp_path_factory.mktemp("labels")), make_model()
    return data, model, fit(model, data)


@pytest.fixture(scope="module")
def stored(learned, tmp_path_factory):
    """The folder of the fitted model and its tokenizer."""
    folder = tmp_path_factory.mktemp("stored")
    data, model, _ = learned
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return folder


def test_a_fit_learns_the_labels_and_logs_the_metrics_of_sets(learned):
    data, model, trainer = learned
    metrics = trainer.callback_metrics
    for name in ("val_micro_f1", "val_hamming_loss", "val_macro_f1", "val_accuracy"):
        assert 0 <= metrics[name] <= 1
    assert metrics["val_micro_f1"] > 0.7
    answers = layer_answers(model.eval(), data.val_dataloader())
    a, target = answers.a[:, -1], MULTILABEL.targets(answers.target, 3)
    loss = functional.task_loss(MULTILABEL.outcomes(a), target)
    ponder = functional.ponder_cost(answers.p, answers.p)
    expected = loss + model.lambda_reg * ponder
    assert metrics["val_loss"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_thresholds_are_fitted_to_validation_examples_alone(stored, learned):
    data, model, _ = learned
    fresh = DACT.from_pretrained(stored)
    found = calibrate(fresh, data, min_agreement=0.8, fit_thresholds=True)
    assert fresh.thresholds == best_thresholds(layer_answers(model, data.val_dataloader()))
    assert found.thresholds == fresh.thresholds
    assert fresh.calibration is not None
    with pytest.raises(ValueError, match="fit_thresholds needs validation examples"):
        calibrate(fresh, data.val_dataloader(), min_agreement=0.8, fit_thresholds=True)


def test_the_classifier_names_the_labels_with_their_probabilities(stored):
    texts = ["today we went happy and glad", "we went there", ""]
    happy, nothing, empty = TextClassifier.from_pretrained(stored)(texts)
    assert happy.label is None
    assert happy.labels == {n: p for n, p in happy.probabilities.items() if p > 0.5}
    least = min(max(p, 1 - p) for p in happy.probabilities.values())
    assert happy.score == pytest.approx(least)
    assert [*happy.labels] == ["joy"]
    assert nothing.labels == {}
    assert empty.labels is None


def test_a_worker_of_the_ray_example_gives_each_text_its_labels(stored):
    pytest.importorskip("ray")
    worker_of = runpy.run_path(str(ROOT / "examples" / "ray_predict.py"))["Classify"]
    worker = worker_of(TextClassifier.from_pretrained(stored), "text", "cpu")
    found = worker(pa.table({"text": ["today we went happy and glad", "we went there", ""]}))
    assert found["labels"].to_pylist() == [["joy"], [], None]


def test_a_teacher_labels_texts_of_several_labels(stored, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("we went there furious\nthe people say\n")
    taught = make_data(tmp_path, unlabelled_file=str(more), teacher=str(stored))
    fit(make_model(distillation=0.5), taught, limit_train_batches=2, max_epochs=1)
    assert taught.splits["train"].labels[-1] == (-100, -100, -100)
    assert taught.teacher_probabilities.shape == (len(taught.splits["train"]), 3)


CONFIG = """\
trainer: {max_epochs: 1, accelerator: cpu, num_sanity_val_steps: 0}
model:
  task: multilabel
  class_weights: balanced
  encoder:
    class_path: TransformerEncoder
    init_args: {vocab_size: 42, num_layers: 2, hidden_size: 8, num_heads: 2}
data:
  class_path: TextClassificationData
  init_args: {train_file: separator.csv, label_separator: "|", tokenizer: ./tokenizer,
    max_length: 32, val_fraction: 0.5}
"""


def test_the_commands_take_several_labels(tmp_path, dact_here):
    def command(*words):
        status, text = dact_here(*words, cwd=tmp_path)
        assert status == 0, text
        return text

    write(tmp_path, "separator")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "config.yaml").write_text(CONFIG)
    text = command("fit", "--config", "config.yaml", "--run_tag", "one")
    assert "3 labels: " in text
    assert "hamming loss" in text
    stored = ["--model", "lightning_logs/one"]
    command("calibrate", *stored, "--min_agreement", "0.8", "--fit_thresholds", "true")
    folder = tmp_path / "lightning_logs" / "one" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert (config["task"], len(config["thresholds"])) == ("multilabel", 3)
    (tmp_path / "new.csv").write_text("text\nwe went happy\n")
    command("predict", *stored, "--data.predict_file", "new.csv", "--output", "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    limits = zip(NAMES, config["thresholds"], strict=True)
    labels = [name for name, limit in limits if row[f"probability_{name}"] > limit]
    assert (row["label"] or "").split("|") == (labels or [""])
    assert "- Labels (3): `anger`, `fear`, `joy`" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_several_labels_are_tuned(tmp_path):
    test_file = write(tmp_path, "lists")["train_file"]
    engine = TuningEngine(
        3,
        model=make_model,
        data=lambda **options: make_data(tmp_path, **{"test_file": test_file, **options}),
        trainer={"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        n_trials=1,
        encoder_training="frozen",
        compare_defaults=False,
        log_dir=str(tmp_path / "logs"),
        warm_up_epochs=1,
        search_space={"num_epochs": {"choices": [1]}},
    )
    metrics, checkpoint = engine.run_pipeline("labels")
    content = json.loads(Path(metrics).read_text())
    assert 0 <= content["test"]["hamming_loss"] <= 1
    assert DACT.load_from_checkpoint(checkpoint).task == MULTILABEL


def test_an_exported_model_names_the_same_labels(stored, learned, tmp_path):
    pytest.importorskip("onnxruntime")
    export(stored, tmp_path / "graphs", None)
    texts = learned[0].splits["val"].texts[:40]
    expected = TextClassifier.from_pretrained(stored)(texts)
    found = TextClassifier.from_pretrained(tmp_path / "graphs")(texts)
    assert [[*one.labels] for one in found] == [[*one.labels] for one in expected]
