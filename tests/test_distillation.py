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
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.files import read_tensors
from dact.tuning.settings import Settings
from tests import references
from tests.conftest import random_batch, tiny_model
from tests.tables import write_table


def taught(prepared):
    """The whole encoder's probabilities of the training examples, by row."""
    return read_tensors(prepared.baseline / "answers.safetensors")[0]["probabilities"]


def test_the_loss_is_that_of_its_formula():
    answers = torch.rand(5, 4, 3).softmax(-1)
    teacher = torch.rand(5, 3).softmax(-1)
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


@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 0.5]])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_teacher_that_knows_the_labels_changes_nothing(weights, share):
    batch = random_batch(30)
    batch["teacher"] = torch.nn.functional.one_hot(batch["labels"], 3).float()
    plain = tiny_model(class_weights=weights)
    taught = tiny_model(class_weights=weights, distillation=share)
    taught.load_state_dict(plain.state_dict())
    torch.testing.assert_close(losses(plain, batch), losses(taught, batch))


def test_an_example_without_a_label_learns_from_its_teacher_alone():
    batch = random_batch(12)
    batch["teacher"] = torch.rand(12, 3).softmax(dim=1)
    unlabelled = {**batch, "labels": torch.where(torch.arange(12) < 5, -100, batch["labels"])}
    models = {
        share: tiny_model(distillation=share, exit_loss_weight=0.0, lambda_reg=0.0)
        for share in (0.25, 1.0)
    }
    models[1.0].load_state_dict(models[0.25].state_dict())
    whole = losses(models[0.25], unlabelled)
    parts = [
        losses(model, {name: tensor[rows] for name, tensor in batch.items()})
        for model, rows in ((models[1.0], slice(0, 5)), (models[0.25], slice(5, 12)))
    ]
    torch.testing.assert_close(whole, (5 * parts[0] + 7 * parts[1]) / 12)


def test_an_example_without_a_label_or_a_teacher_leaves_the_others_alone(tmp_path):
    model, batch = tiny_model(exit_loss_weight=0.5, lambda_reg=0.0), random_batch(12)
    labels = torch.where(torch.arange(12) < 5, -100, batch["labels"])
    rest = {name: tensor[5:] for name, tensor in batch.items()}
    torch.testing.assert_close(losses(model, {**batch, "labels": labels}), losses(model, rest))
    assert losses(model, {**batch, "labels": torch.full((12,), -100)}) == 0
    trainer = pl.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False
    )
    with pytest.raises(ValueError, match="a batch for val has the label -100"):
        trainer.validate(
            model, torch.utils.data.DataLoader([{**batch, "labels": labels}], None), verbose=False
        )


def test_a_missing_teacher_and_a_wrong_share_are_clear_errors():
    with pytest.raises(KeyError, match="distillation=0.5 needs 'teacher'"):
        losses(tiny_model(distillation=0.5), random_batch())
    for teacher in ([2.0, -1.0, 0.0], [0.2, 0.2, 0.2], [float("nan")] * 3):
        with pytest.raises(ValueError, match="teacher must hold probabilities"):
            losses(
                tiny_model(distillation=0.5),
                {**random_batch(4), "teacher": torch.tensor([teacher] * 4)},
            )
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
    own = DACT(
        encoder=TransformerEncoder(len(tokenizer), 2, 8, 2), class_names=["none", "plus", "minus"]
    )
    own.save_pretrained(tmp_path / "own")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config.intermediate_size, config.num_labels = 32, 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "hub")
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    for name in ("own", "hub", "encoder"):
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def data_of(folder, teacher, **more):
    return TextClassificationData(
        str(folder / "train.csv"),
        tokenizer=word_tokenizer(WORDS),
        teacher=str(folder / teacher),
        batch_size=4,
        **more,
    )


@torch.no_grad()
def test_batches_carry_what_the_teacher_says(taught_folder):
    tokenizer = word_tokenizer(WORDS)
    own = DACT.from_pretrained(taught_folder / "own")
    hub = AutoModelForSequenceClassification.from_pretrained(taught_folder / "hub").eval()
    for name in ("own", "hub"):
        data = data_of(taught_folder, name)
        data.setup("fit")
        assert data.teacher_probabilities is None  # asking takes long, and comes after all checks
        assert data.class_names == ["minus", "none", "plus"]
        for batch in data.train_dataloader():
            texts = [data.splits["train"].texts[row] for row in batch["row"]]
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            # The classes of the data, in its order; those of the second teacher have no names.
            own_answer, hub_answer = (
                own(tokens).probabilities[:, [2, 0, 1]],
                hub(**tokens).logits.softmax(-1),
            )
            expected = own_answer if name == "own" else hub_answer
            torch.testing.assert_close(batch["teacher"], expected, atol=1e-5, rtol=1e-4)
        assert all("teacher" not in batch for batch in data.val_dataloader())


def ask(data):
    data.setup("fit")
    data.train_dataloader()


def test_teachers_that_do_not_fit_are_refused(taught_folder):
    with pytest.raises(ValueError, match="lacks 2 weights of BertForSequenceClassification"):
        ask(data_of(taught_folder, "encoder"))
    with pytest.raises(
        ValueError, match="no sequence-classification model at|there is none at|no tokenizer at"
    ):
        ask(data_of(taught_folder, "nowhere"))
    write_table(
        taught_folder / "train.csv", {"text": WORDS * 4, "label": ["a", "b", "a", "b", "b"] * 4}
    )
    with pytest.raises(
        ValueError, match="has the classes none, plus, minus, but the data has a, b"
    ):
        ask(data_of(taught_folder, "own"))


def test_a_teacher_answers_alike_whatever_side_its_tokenizer_pads(taught_folder):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(taught_folder / "hub")
    hub = AutoModelForSequenceClassification.from_pretrained(taught_folder / "hub").eval()
    data = data_of(taught_folder, "hub")
    ask(data)
    for text, answer in zip(data.splits["train"].texts, data.teacher_probabilities, strict=True):
        with torch.no_grad():
            alone = hub(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        torch.testing.assert_close(answer, alone, atol=1e-5, rtol=1e-4)


def test_a_teacher_labels_texts_without_labels(taught_folder):
    (taught_folder / "more.txt").write_text("the good film\nbad bad\n")
    data = data_of(taught_folder, "own", unlabelled_file=str(taught_folder / "more.txt"))
    ask(data)
    assert not data.needs_teacher
    batches = list(data.train_dataloader())
    rows, labels, teacher = (
        torch.cat([batch[name] for batch in batches]) for name in ("row", "labels", "teacher")
    )
    unlabelled = [data.splits["train"].texts[row] for row in rows[labels == -100]]
    assert sorted(unlabelled) == ["bad bad", "the good film"]
    torch.testing.assert_close(teacher.sum(1), torch.ones(len(rows)))


def test_a_fit_with_a_teacher_learns_its_answers(taught_folder):
    model = DACT(
        encoder=TransformerEncoder(8, 2, 16, 2),
        distillation=1.0,
        lambda_reg=0.0,
        learning_rate=1e-2,
        lambda_warmup=0.0,
    )
    data = data_of(taught_folder, "own")
    trainer = pl.Trainer(max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        difference = (model.eval()(batch).probabilities - batch["teacher"]).abs().max()
    assert difference < 0.1


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_the_engine_trains_its_teacher_once_and_everything_starts_from_it(tmp_path, mode):
    def model(**overrides):
        return DACT(encoder=TransformerEncoder(42, 2, 8, 2), **overrides)

    def made():
        engine = TuningEngine(
            model=model,
            data=partial(
                CompositionalSentiment, num_train=100, num_val=60, num_test=60, max_depth=2
            ),
            trainer={"max_epochs": 1, "accelerator": "cpu"},
            n_trials=1,
            distillation=0.5,
            encoder_training=mode,
            warm_up_epochs=1,
            compare_defaults=False,
            log_dir=tmp_path,
        )
        engine.progress.console.quiet = True
        return engine

    def prepared_by(engine):
        with engine._run("run") as prepared:
            return prepared

    prepared_by(made())
    stored = tmp_path / "run" / "whole_encoder" / "answers.safetensors"
    before = stored.stat().st_mtime_ns
    prepared = prepared_by(made())
    assert stored.stat().st_mtime_ns == before
    started, data = prepared.build(Settings(), 0, unfreeze=True)
    assert started.distillation == 0.5
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    weights = read_tensors(prepared.baseline / "teacher.safetensors")[0]
    assert all(
        torch.equal(started.encoder.state_dict()[name], weight) for name, weight in weights.items()
    )
    fresh = prepared.recipe.make_model().encoder.state_dict()
    assert not all(torch.equal(fresh[name], weight) for name, weight in weights.items())
    torch.testing.assert_close(batch["teacher"], taught(prepared)[batch["row"]])
    torch.testing.assert_close(batch["teacher"].sum(1), torch.ones(len(batch["row"])))


EPOCHS = []


class Record(pl.Callback):
    def on_validation_end(self, trainer, pl_module):
        weights = {name: weight.clone() for name, weight in pl_module.state_dict().items()}
        EPOCHS.append((float(trainer.callback_metrics["val_brier"]), weights))


def test_the_baseline_is_its_last_epoch_and_its_teacher_that_of_the_lowest_brier_score(tmp_path):
    EPOCHS.clear()
    engine = TuningEngine(
        model=lambda **overrides: DACT(
            TransformerEncoder(42, 2, 32, 2), **{"learning_rate": 1e-2, **overrides}
        ),
        data=partial(CompositionalSentiment, num_train=64, num_val=100, num_test=10, max_depth=3),
        trainer={"max_epochs": 12, "accelerator": "cpu", "callbacks": [Record()]},
        log_dir=tmp_path,
    )
    engine.progress.console.quiet = True
    with engine._run("run") as prepared:
        pass
    last, (score, lowest) = EPOCHS[-1][1], min(EPOCHS, key=lambda epoch: epoch[0])
    assert last is not lowest, "on so few examples the score rises again"
    baseline, encoder = (
        prepared.whole_encoder().state_dict(),
        read_tensors(prepared.baseline / "teacher.safetensors")[0],
    )
    assert all(torch.equal(baseline[name], weight) for name, weight in last.items())
    assert all(torch.equal(weight, lowest[f"encoder.{name}"]) for name, weight in encoder.items())
    teacher = prepared.recipe.make_model().at_full_depth()
    teacher.load_state_dict(lowest)
    data = prepared.recipe.make_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        expected = teacher.eval()(batch).probabilities
    torch.testing.assert_close(taught(prepared)[batch["row"]], expected)
    answers = layer_answers(teacher, data.val_dataloader())
    assert score == pytest.approx(
        references.brier_score(answers.a[:, -1], answers.target), abs=1e-5
    )


@pytest.mark.parametrize("own", [True, False])
def test_a_teacher_with_fewer_positions_than_the_data_has_tokens_reads_so_many(tmp_path, own):
    data = CompositionalSentiment(num_train=10, num_val=3, confidence_fraction=0.0)
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        num_labels=3,
    )
    if own:
        encoder = HuggingFaceEncoder.from_model(AutoModel.from_config(config))
        DACT(encoder, class_names=data.class_names).save_pretrained(tmp_path)
    else:
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    data.teacher = str(tmp_path)
    data.setup("fit")
    data.train_dataloader()
    torch.testing.assert_close(data.teacher_probabilities.sum(dim=1), torch.ones(10))


def test_class_weights_weigh_the_teacher_as_well():
    batch = random_batch(30)
    batch["teacher"] = torch.nn.functional.one_hot(batch["labels"], 3).float()
    weights = [1.0, 5.0, 0.5]
    plain = tiny_model(class_weights=weights)
    for share in (0.5, 1.0):
        taught = tiny_model(class_weights=weights, distillation=share)
        taught.load_state_dict(plain.state_dict())
        torch.testing.assert_close(losses(plain, batch), losses(taught, batch))
