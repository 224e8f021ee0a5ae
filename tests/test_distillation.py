"""Learning from a teacher: the loss, where teachers come from, and the engine's own."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from dact import DACT, TuningEngine, functional
from dact.calibration.answers import layer_answers
from dact.data import CompositionalSentiment, TextClassificationData
from dact.data.tokenizers import word_tokenizer
from dact.encoders import TransformerEncoder
from dact.tuning.settings import Settings
from tests import references
from tests.conftest import random_batch, tiny_model
from tests.tables import write_table

QUIET = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)


def test_the_loss_is_that_of_its_formula():
    answers, teacher = torch.rand(5, 4, 3).softmax(-1), torch.rand(5, 3).softmax(-1)
    expected = [
        references.distillation_loss(answers[i, n].tolist(), teacher[i].tolist())
        for i in range(5)
        for n in range(4)
    ]
    loss = functional.exit_loss(answers.log(), teacher)
    assert loss.item() == pytest.approx(sum(expected) / 20, rel=1e-5)
    last = functional.task_loss(answers[:, -1], teacher)
    assert last.item() == pytest.approx(sum(expected[3::4]) / 5, rel=1e-5)


def losses(model, batch):
    return model.loss(batch).loss


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_teacher_that_knows_the_labels_changes_nothing(share):
    batch, weights = random_batch(30), [1.0, 5.0, 0.5]
    batch["teacher"] = torch.nn.functional.one_hot(batch["labels"], 3).float()
    plain = tiny_model(class_weights=weights)
    taught = tiny_model(class_weights=weights, distillation=share)
    taught.load_state_dict(plain.state_dict())
    torch.testing.assert_close(losses(plain, batch), losses(taught, batch))


def test_an_example_without_a_label_learns_from_its_teacher_alone():
    batch, options = random_batch(12), {"exit_loss_weight": 0.0, "lambda_reg": 0.0}
    batch["teacher"] = torch.rand(12, 3).softmax(dim=1)
    unlabelled = {**batch, "labels": torch.where(torch.arange(12) < 5, -100, batch["labels"])}
    both, alone = (tiny_model(distillation=share, **options) for share in (0.25, 1.0))
    alone.load_state_dict(both.state_dict())
    parts = [
        losses(model, {name: tensor[rows] for name, tensor in batch.items()})
        for model, rows in ((alone, slice(0, 5)), (both, slice(5, 12)))
    ]
    torch.testing.assert_close(losses(both, unlabelled), (5 * parts[0] + 7 * parts[1]) / 12)


def test_an_example_without_a_label_or_a_teacher_leaves_the_others_alone():
    model, batch = tiny_model(exit_loss_weight=0.5, lambda_reg=0.0), random_batch(12)
    unlabelled = {**batch, "labels": torch.where(torch.arange(12) < 5, -100, batch["labels"])}
    rest = {name: tensor[5:] for name, tensor in batch.items()}
    torch.testing.assert_close(losses(model, unlabelled), losses(model, rest))
    assert losses(model, {**batch, "labels": torch.full((12,), -100)}) == 0
    trainer = pl.Trainer(accelerator="cpu", **QUIET)
    with pytest.raises(ValueError, match="a batch for val has the label -100"):
        trainer.validate(model, torch.utils.data.DataLoader([unlabelled], None), verbose=False)


def test_a_missing_teacher_and_a_wrong_share_are_clear_errors():
    model, batch = tiny_model(distillation=0.5), random_batch(4)
    with pytest.raises(KeyError, match="distillation=0.5 needs 'teacher'"):
        losses(model, batch)
    for teacher in ([2.0, -1.0, 0.0], [0.2, 0.2, 0.2], [float("nan")] * 3):
        with pytest.raises(ValueError, match="teacher must hold probabilities"):
            losses(model, {**batch, "teacher": torch.tensor([teacher] * 4)})
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        tiny_model(distillation=1.5)
    with pytest.raises(ValueError, match=r"TuningEngine: distillation .* got -1"):
        TuningEngine(distillation=-1)


def test_full_depth_is_the_last_layer_alone():
    model, batch = tiny_model(halting_margin=0.4).at_full_depth(), random_batch(20)
    output = model(batch)
    assert torch.equal(output.probabilities, output.layer_probabilities[:, -1])
    assert (output.exit_layer == 4).all()
    model.train()
    losses(model, batch).backward()
    for parameter in model.classifier.parameters():  # the first dimension is that of the layers
        learned = parameter.grad.flatten(1).abs().sum(dim=1) > 0
        assert learned.tolist() == [False, False, False, True]
    assert all(parameter.grad is None for parameter in model.confidence.parameters())


WORDS = ["good", "bad", "fine", "the", "film"]


@pytest.fixture
def taught_folder(tmp_path):
    """A training file, and three teachers in folders: of dact, of Hugging Face, and one that was
    never fine-tuned."""
    rows = ["the film good", "the film bad", "fine", "good good", "bad"] * 4
    labels = ["plus", "minus", "none", "plus", "minus"] * 4
    write_table(tmp_path / "train.csv", {"text": rows, "label": labels})
    tokenizer = word_tokenizer(WORDS)
    encoder = TransformerEncoder(len(tokenizer), 2, 8, 2)
    DACT(encoder, class_names=["none", "plus", "minus"]).save_pretrained(tmp_path / "own")
    config = small_bert(vocab_size=len(tokenizer))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "hub")
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    for name, side in (("own", "right"), ("hub", "left"), ("encoder", "right")):
        tokenizer.padding_side = side
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def small_bert(**options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    return BertConfig(num_attention_heads=2, num_labels=3, **sizes, **options)


def data_of(folder, teacher, **more):
    given = {"tokenizer": word_tokenizer(WORDS), "teacher": str(folder / teacher)}
    return TextClassificationData(str(folder / "train.csv"), batch_size=4, **given, **more)


@torch.no_grad()
@pytest.mark.parametrize("name", ["own", "hub"])
def test_batches_carry_what_the_teacher_says(taught_folder, name):
    """Whatever side its tokenizer pads: that of the hub pads on the left."""
    hub = AutoModelForSequenceClassification.from_pretrained(taught_folder / "hub").eval()
    own = DACT.from_pretrained(taught_folder / "own")
    data = data_of(taught_folder, name)
    data.setup("fit")
    assert data.teacher_probabilities is None  # asking takes long, and comes after all checks
    assert data.class_names == ["minus", "none", "plus"]
    for batch in data.train_dataloader():
        texts = [data.splits["train"].texts[row] for row in batch["row"]]
        tokens = word_tokenizer(WORDS)(texts, padding=True, return_tensors="pt")
        if name == "own":  # the classes of the data, in its order
            expected = own(tokens).probabilities[:, [2, 0, 1]]
        else:  # which have no names there
            expected = hub(**tokens).logits.softmax(-1)
        torch.testing.assert_close(batch["teacher"], expected, atol=1e-5, rtol=1e-4)
    assert all("teacher" not in batch for batch in data.val_dataloader())


def ask(data):
    data.setup("fit")
    data.train_dataloader()


def test_teachers_that_do_not_fit_are_refused(taught_folder):
    with pytest.raises(ValueError, match="lacks 2 weights of BertForSequenceClassification"):
        ask(data_of(taught_folder, "encoder"))
    said = "no sequence-classification model at|there is none at|no tokenizer at"
    with pytest.raises(ValueError, match=said):
        ask(data_of(taught_folder, "nowhere"))
    rows = {"text": WORDS * 4, "label": ["a", "b", "a", "b", "b"] * 4}
    write_table(taught_folder / "train.csv", rows)
    said = "has the classes none, plus, minus, but the data has a, b"
    with pytest.raises(ValueError, match=said):
        ask(data_of(taught_folder, "own"))


def test_a_teacher_labels_texts_without_labels(taught_folder):
    (taught_folder / "more.txt").write_text("the good film\nbad bad\n")
    data = data_of(taught_folder, "own", unlabelled_file=str(taught_folder / "more.txt"))
    ask(data)
    batches = list(data.train_dataloader())
    rows, labels, teacher = (
        torch.cat([batch[name] for batch in batches]) for name in ("row", "labels", "teacher")
    )
    unlabelled = [data.splits["train"].texts[row] for row in rows[labels == -100]]
    assert sorted(unlabelled) == ["bad bad", "the good film"]
    torch.testing.assert_close(teacher.sum(1), torch.ones(len(rows)))


@pytest.mark.slow
def test_a_fit_with_a_teacher_learns_its_answers(taught_folder):
    options = {"distillation": 1.0, "lambda_reg": 0.0, "lambda_warmup": 0.0, "learning_rate": 2e-2}
    model = DACT(TransformerEncoder(8, 2, 16, 2), **options)
    data = data_of(taught_folder, "own")
    pl.Trainer(max_epochs=25, accelerator="cpu", limit_val_batches=0, **QUIET).fit(model, data)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        difference = (model.eval()(batch).probabilities - batch["teacher"]).abs().max()
    assert difference < 0.1


@pytest.mark.slow
def test_the_engine_trains_its_teacher_once_and_everything_starts_from_it(tmp_path):
    """The baseline is its last epoch, and the teacher that of the lowest Brier score."""
    epochs = []

    class Record(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            weights = {name: weight.clone() for name, weight in pl_module.state_dict().items()}
            epochs.append((float(trainer.callback_metrics["val_brier"]), weights))

    def model(**overrides):
        return DACT(TransformerEncoder(42, 2, 32, 2), **{"learning_rate": 1e-2, **overrides})

    def prepared():
        engine = TuningEngine(
            model=model,
            data=partial(
                CompositionalSentiment, num_train=64, num_val=100, num_test=10, max_depth=3
            ),
            trainer={"max_epochs": 12, "accelerator": "cpu", "callbacks": [Record()]},
            distillation=0.5,
            log_dir=tmp_path,
        )
        engine.progress.console.quiet = True
        with engine._run("run") as prepared:
            return prepared

    prepared()
    fitted = len(epochs)
    again = prepared()
    assert len(epochs) == fitted, "nothing is fitted twice"
    last, (score, lowest) = epochs[-1][1], min(epochs, key=lambda epoch: epoch[0])
    assert last is not lowest, "on so few examples the score rises again"
    baseline = again.whole_encoder().state_dict()
    assert all(torch.equal(baseline[name], weight) for name, weight in last.items())

    teacher = again.recipe.make_model().at_full_depth()
    teacher.load_state_dict(lowest)
    started, data = again.build(Settings(), 0, unfreeze=True)
    assert started.distillation == 0.5
    for name, weight in teacher.encoder.state_dict().items():
        assert torch.equal(started.encoder.state_dict()[name], weight)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        expected = teacher.eval()(batch).probabilities
    torch.testing.assert_close(batch["teacher"], expected)
    answers = layer_answers(teacher, data.val_dataloader())
    expected = references.brier_score(answers.a[:, -1], answers.target)
    assert score == pytest.approx(expected, abs=1e-5)


def test_a_teacher_with_fewer_positions_than_the_data_has_tokens_reads_so_many(tmp_path):
    data = CompositionalSentiment(num_train=10, num_val=3, confidence_fraction=0.0)
    teacher = AutoModelForSequenceClassification.from_config(small_bert(max_position_embeddings=6))
    teacher.save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    data.teacher = str(tmp_path)
    ask(data)
    torch.testing.assert_close(data.teacher_probabilities.sum(dim=1), torch.ones(10))
