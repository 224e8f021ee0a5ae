"""DACT, the LightningModule: outputs, losses, early exit, schedules and what it leaves on disk."""

import copy
import json
import logging
import math
from pathlib import Path

import hypothesis.strategies as st
import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import DataLoader
from transformers import AutoModel, BertConfig

from dact import DACT, SubmodelConfig, functional
from dact.callbacks import SavePretrained
from dact.data import CompositionalSentiment
from dact.encoders import HuggingFaceEncoder, LayeredEncoder, TransformerEncoder
from dact.files import DurableCheckpointIO
from tests import references
from tests.conftest import forked, free_port, random_batch, scatter_exits, tiny_model
from tests.test_encoders import config_of


def loader(examples=64, batch_size=16, seed=0, length=12):
    batch = random_batch(examples, length, seed=seed)
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(examples)]
    return DataLoader(rows, batch_size=batch_size)


def trainer(tmp_path, **arguments):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 2}
    return pl.Trainer(default_root_dir=tmp_path, **{**quiet, **arguments})


# ------------------------------------------------------------------ outputs


@torch.no_grad()
def test_forward_gives_all_layers_without_labels():
    model, batch = tiny_model(layers=5), random_batch(7)
    batch.pop("labels")
    output = model(batch)
    assert output.probabilities.shape == (7, 3)
    assert output.layer_probabilities.shape == (7, 5, 3)
    assert output.h.shape == output.p.shape == (7, 5)
    assert output.exit_layer.dtype == torch.int64
    a, p = functional.accumulate(output.layer_probabilities, output.h)
    torch.testing.assert_close(output.probabilities, a[:, -1])
    torch.testing.assert_close(output.p, p)
    early = model.early_exit(batch)
    assert early.layer_probabilities is None
    torch.testing.assert_close(early.probabilities, functional.answer_at(a, output.exit_layer))


@settings(max_examples=60)
@given(
    layers=st.integers(1, 7),
    batch=st.integers(1, 20),
    classes=st.integers(2, 6),
    length=st.integers(1, 15),
    tolerance=st.sampled_from([0.0, 0.2, 0.8]),
    rule=st.sampled_from(["exact", "paper", "never"]),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_early_exit_is_forward_stopped_early(layers, batch, classes, length, tolerance, rule, seed):
    torch.manual_seed(seed)
    model = tiny_model(
        layers=layers, output_dimension=classes, halting=rule, halting_tolerance=tolerance
    )
    data = random_batch(batch, length, seed=seed)
    full, early = model(data), model.early_exit(data)
    assert torch.equal(early.exit_layer, full.exit_layer)
    if tolerance == 0:
        assert torch.equal(early.probabilities.argmax(1), full.probabilities.argmax(1))
    a, _ = functional.accumulate(full.layer_probabilities, full.h)
    expected = functional.answer_at(a, full.exit_layer)
    torch.testing.assert_close(early.probabilities, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("share", [False, True])
def test_one_layer_and_a_batch_of_one_work(share):
    model = tiny_model(layers=1, share_submodels=share)
    output = model.early_exit(random_batch(1))
    assert output.exit_layer.tolist() == [1]
    model.train()
    model(random_batch(1)).probabilities.sum().backward()


# ------------------------------------------------------------------ losses and metrics


def test_validation_measures_early_exit_itself(tmp_path):
    model = tiny_model(layers=5, lambda_reg=0.07, halting_tolerance=0.2)
    metrics = trainer(tmp_path).validate(model, loader(61), verbose=False)[0]
    batch = random_batch(61)
    with torch.no_grad():
        full, early = model.eval()(batch), model.early_exit(batch)
    labels, answers = batch["labels"].tolist(), early.probabilities.argmax(1).tolist()
    assert metrics["val_accuracy"] == pytest.approx(accuracy_score(labels, answers))
    f1 = f1_score(labels, answers, average="macro")
    assert metrics["val_macro_f1"] == pytest.approx(f1, abs=1e-6)
    assert metrics["val_exit_layer"] == pytest.approx(early.exit_layer.double().mean().item())
    expected = references.task_loss(early.probabilities.tolist(), labels)
    assert metrics["val_task_loss"] == pytest.approx(expected, rel=1e-4)
    cost = references.ponder_cost(full.p.tolist(), full.h.tolist(), "p")
    expected = references.task_loss(full.probabilities.tolist(), labels) + 0.07 * cost
    assert metrics["val_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["val_ponder_cost"] == pytest.approx(cost, rel=1e-4)
    agreement = accuracy_score(full.probabilities.argmax(1).tolist(), answers)
    assert metrics["val_agreement"] == pytest.approx(agreement)
    a, _ = functional.accumulate(full.layer_probabilities, full.h)
    for n in range(1, 6):
        expected = accuracy_score(labels, a[:, n - 1].argmax(1).tolist())
        assert metrics[f"val_layer_accuracy/{n}"] == pytest.approx(expected)
    assert torch.equal(model.exit_histogram, torch.bincount(early.exit_layer - 1, minlength=5))


def test_lambda_and_the_learning_rate_follow_the_real_number_of_steps(tmp_path, monkeypatch):
    seen, warm = [], DACT.warm_lambda

    def watched(model):
        rate = model.trainer.optimizers[0].param_groups[0]["lr"]
        seen.append((model.trainer.global_step, warm(model), rate))
        return seen[-1][1]

    monkeypatch.setattr(DACT, "warm_lambda", watched)
    model = tiny_model(lambda_reg=0.1, lambda_warmup=0.5, learning_rate=1.0, warmup_fraction=0.25)
    # 10 batches, 2 accumulated: 5 steps an epoch, 20 in all
    fit = trainer(tmp_path, max_epochs=4, accumulate_grad_batches=2)
    fit.fit(model, loader(40, 4))
    by_step = {step: (weight, rate) for step, weight, rate in seen}
    assert sorted(by_step) == list(range(20))
    for step, (weight, rate) in by_step.items():
        assert weight == pytest.approx(0.1 * min(1, step / 10))
        assert rate == pytest.approx((step + 1) / 6 if step < 5 else (20 - step) / 15)


def test_decay_spares_biases_and_norms_and_submodels_have_a_rate_of_their_own():
    model = tiny_model(learning_rate=0.1, submodel_learning_rate=0.2, weight_decay=0.3)
    model.trainer = trainer(".", max_steps=9)
    model.trainer.fit_loop.setup_data = lambda: None
    encoder = {id(parameter) for parameter in model.encoder.parameters()}
    groups = model.configure_optimizers()["optimizer"].param_groups
    learning = [one for one in model.parameters() if one.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(learning)
    for group in groups:
        for parameter in group["params"]:
            layers = 0 if id(parameter) in encoder else 1  # the first dimension of the submodels'
            assert group["weight_decay"] == (0.3 if parameter.dim() - layers > 1 else 0.0)
            assert group["initial_lr"] == (0.1 if id(parameter) in encoder else 0.2)


# ------------------------------------------------------------------ training


def test_it_learns(tmp_path):
    batch = random_batch(256, 6)
    batch["labels"] = batch["input_ids"][:, 0] % 3
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(256)]
    torch.manual_seed(0)
    model = DACT(encoder=TransformerEncoder(50, 2, 32, 2, pooling="first"), learning_rate=5e-3)
    fit = trainer(tmp_path, max_epochs=30, gradient_clip_val=1.0)
    fit.fit(model, DataLoader(rows, 32, shuffle=True), DataLoader(rows, 64))
    assert fit.callback_metrics["val_accuracy"] > 0.95


# Losses of version 0.1.0 and of all later ones.
TWENTY = {
    "none": [
        1.398484468460083, 1.4365776777267456, 1.4376304149627686, 1.7218999862670898,
        1.6072945594787598, 1.4932056665420532, 1.508848786354065, 1.5419931411743164,
        1.5484293699264526, 1.5884730815887451, 1.680830717086792, 1.613505482673645,
        1.5892465114593506, 1.6048033237457275, 1.5498679876327515, 1.562645673751831,
        1.5428037643432617, 1.561000943183899, 1.5340954065322876, 1.5611226558685303,
    ],
    "batch": [
        1.5954099893569946, 1.4888319969177246, 1.4404337406158447, 1.6305938959121704,
        1.6179194450378418, 1.5614076852798462, 1.5331826210021973, 1.657997727394104,
        1.5062406063079834, 1.485874056816101, 1.607330083847046, 1.6306755542755127,
        1.6794755458831787, 1.6540751457214355, 1.6386536359786987, 1.6115323305130005,
        1.4342000484466553, 1.5627238750457764, 1.4198870658874512, 1.7054972648620605,
    ],
}  # fmt: skip


@pytest.mark.parametrize("normalization", TWENTY)
def test_twenty_seeded_steps_have_the_losses_of_earlier_versions(tmp_path, normalization):
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(outputs["loss"].item())

    losses, generator = [], torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 50, (16, 9), generator=generator) for _ in range(20)]
    batches = DataLoader([{"input_ids": i, "labels": i[:, 0] % 3} for i in ids], batch_size=None)
    torch.manual_seed(0)
    encoder = TransformerEncoder(50, 3, 16, 2, dropout=0.1)
    classifier, confidence = SubmodelConfig(), SubmodelConfig()
    if normalization == "batch":
        classifier = SubmodelConfig(num_layers=2, normalization="batch")
        confidence = SubmodelConfig(normalization="batch", activation="relu")
    model = DACT(
        encoder,
        classifier=classifier,
        confidence=confidence,
        confidence_reads="state",
        lambda_reg=0.1,
        learning_rate=3e-3,
        weight_decay=0.1,
    )
    trainer(tmp_path, max_epochs=1, callbacks=[Watch()]).fit(model, batches)
    assert losses == pytest.approx(TWENTY[normalization], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_every_precision_trains(tmp_path, precision, normalization):
    encoder = TransformerEncoder(50, 3, 16, 2)
    model = DACT(encoder=encoder, classifier=SubmodelConfig(normalization=normalization))
    fit = trainer(tmp_path, precision=precision, accumulate_grad_batches=2)
    fit.fit(model, loader(65), loader(33, seed=1))  # the last batches hold one example
    assert math.isfinite(fit.callback_metrics["val_loss"])
    assert fit.callback_metrics["val_loss"].dtype in (torch.float32, torch.float64)


def _two_processes(rank, port, folder):
    """One process of a two-process fit on gloo."""
    import os

    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
    )
    torch.set_num_threads(1)
    pl.seed_everything(0)
    model = tiny_model(lambda_reg=0.05)
    fit = trainer(folder, devices=2, strategy="ddp")
    fit.fit(model, loader(64, 8), loader(32, 8, seed=1))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    seen = Seen()
    fit.callbacks.append(seen)
    fit.fit_loop.max_epochs = 3
    fit.fit(
        model,
        datamodule=CompositionalSentiment(101, 20, 20, batch_size=8, confidence_fraction=0.0),
    )
    model.save_pretrained(f"{folder}/model")  # as a script says it, in both processes
    torch.save(
        {"weights": weights, "metrics": metrics, "batches": seen.batches}, f"{folder}/rank{rank}.pt"
    )


class Seen(pl.Callback):
    """The training batches of a fit: their rows and lengths."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((batch["row"].tolist(), batch["input_ids"].shape[1]))


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    context, port = forked(__name__), free_port()
    processes = [
        context.Process(target=_two_processes, args=(rank, port, str(tmp_path)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    # (The two processes see different training examples, so that equal values are those of both.)
    for name in ("train_loss", "val_loss", "val_accuracy", "val_exit_layer", "val_task_loss"):
        assert first["metrics"][name] == second["metrics"][name], name
    # Both see all training examples of a datamodule of dact's, texts of similar length at the same
    # time.
    rows = [row for rank in (first, second) for rows, _ in rank["batches"] for row in rows]
    assert (sorted({*rows}), len(rows)) == ([*range(101)], 102)
    for (_, one), (_, other) in zip(first["batches"], second["batches"], strict=True):
        assert abs(one - other) <= 1
    assert DACT.from_pretrained(tmp_path / "model").class_names[0] == "negative"
    # What both halves measured together is what one process measures of everything.
    model = tiny_model(lambda_reg=0.05)
    torch.nn.utils.vector_to_parameters(first["weights"], model.parameters())
    alone = trainer(tmp_path).validate(model, loader(32, 8, seed=1), verbose=False)[0]
    for name in ("val_loss", "val_accuracy", "val_exit_layer"):
        assert alone[name] == pytest.approx(first["metrics"][name], rel=1e-5)


def test_a_loaded_model_is_trained_with_dropout(tmp_path):
    encoder = TransformerEncoder(50, 2, 16, 2)
    DACT(encoder, classifier=SubmodelConfig(normalization="batch")).save_pretrained(tmp_path)
    model = DACT.from_pretrained(tmp_path)
    assert not model.training
    trainer(tmp_path, max_epochs=1).fit(model, loader(), loader(seed=1))
    learns = [*model.encoder.modules(), *model.classifier.modules()]
    assert all(module.training for module in learns)
    assert (model.classifier[1].running_mean != 0).all()


# ------------------------------------------------------------------ an encoder of your user's own


class LayeredEncoderOfYourUser(LayeredEncoder):
    """A stack of perceptrons on a bag of words."""

    num_layers, hidden_size = 3, 8

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(50, 8)
        self.steps = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def embed(self, batch):
        return self.table(batch["input_ids"])

    def layer(self, layer, hidden, context):
        return hidden + self.steps[layer - 1](hidden).relu()

    def pool(self, layer, hidden, mask):
        return (hidden * mask.unsqueeze(-1)).sum(1)


def test_any_module_that_keeps_the_contract_is_an_encoder(tmp_path):
    model = scatter_exits(DACT(encoder=LayeredEncoderOfYourUser(), confidence_reads="state"))
    fit = trainer(tmp_path, enable_checkpointing=True)
    fit.fit(model, loader(), loader(seed=1))
    fit.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="pass encoder="):
        DACT.load_from_checkpoint(tmp_path / "own.ckpt")
    own = LayeredEncoderOfYourUser()
    again = DACT.load_from_checkpoint(tmp_path / "own.ckpt", encoder=own).eval()
    with torch.no_grad():
        batch = random_batch()
        assert torch.equal(again(batch).probabilities, model.eval()(batch).probabilities)
        assert torch.equal(again.early_exit(batch).exit_layer, again(batch).exit_layer)


# ------------------------------------------------------------------ on disk


def hugging_face_model(**arguments):
    from transformers import AutoModel

    return tiny_model(
        encoder=HuggingFaceEncoder.from_model(AutoModel.from_config(config_of("bert"))), **arguments
    )


@pytest.mark.parametrize("build", [tiny_model, hugging_face_model])
def test_checkpoints_load_by_themselves_under_weights_only(tmp_path, build):
    arguments = {"class_weights": [1.0, 2.0, 3.0], "submodel_learning_rate": 0.5, "ponder": "h"}
    model = build(class_names=["a", "b", "c"], **arguments)
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
    fit.fit(model, loader(), loader(seed=1))
    path = tmp_path / "x.ckpt"
    fit.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["dact"] == model.config()
    again = DACT.load_from_checkpoint(path)
    assert again.config() == model.config()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert DACT.load_from_checkpoint(path, halting_tolerance=0.4).halting_tolerance == 0.4
    # strict reloading by the Trainer, into a model that was built again
    fresh = build(**arguments)
    results = [trainer(tmp_path).test(fresh, loader(seed=2), ckpt_path=str(path), verbose=False)[0]]
    results.append(trainer(tmp_path).test(again, loader(seed=2), verbose=False)[0])
    assert results[0] == results[1]
    assert fresh.class_names == ["a", "b", "c"]


def test_a_resumed_fit_goes_on(tmp_path):
    torch.manual_seed(0)
    start = tiny_model(layers=2)
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    trainer(tmp_path, max_epochs=4).fit(whole, loader(), loader(seed=1))

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        trainer(tmp_path, max_epochs=4, callbacks=[Stop()]).fit(parts, loader(), loader(seed=1))
    resumed = tiny_model(layers=2)
    trainer(tmp_path, max_epochs=4).fit(
        resumed, loader(), loader(seed=1), ckpt_path=str(tmp_path / "half.ckpt")
    )
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("build", [tiny_model, hugging_face_model])
@pytest.mark.parametrize("share", [False, True])
def test_save_pretrained_and_back(tmp_path, build, share):
    model = build(share_submodels=share, halting_tolerance=0.1, halting_margin=0.6)
    model.save_pretrained(tmp_path / "model")
    expected = {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == expected
    again = DACT.from_pretrained(tmp_path / "model")
    assert not again.training
    assert again.config() == model.config()
    with torch.no_grad():
        assert torch.equal(again(random_batch()).probabilities, model(random_batch()).probabilities)
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    assert DACT.from_pretrained(tmp_path / "model", halting="never").halting == "never"


def test_the_margin_moves_the_exits_and_nothing_else():
    torch.manual_seed(0)
    model, batch = tiny_model(layers=5), random_batch(60)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(10)
        before, layers = model(batch), []
        for margin in (1.0, 0.7, 0.4, 0.1, 0.0):
            model.halting_margin = margin
            output = model(batch)
            for name in ("probabilities", "h", "p"):
                assert torch.equal(getattr(output, name), getattr(before, name))
            y = output.layer_probabilities
            left = output.exit_layer < before.exit_layer
            leads = [(i, n) for i, n in enumerate(output.exit_layer.tolist()) if left[i]]
            assert all(references.is_clear(y[i, n - 1].tolist(), margin) for i, n in leads)
            layers.append(output.exit_layer.double().mean().item())
    assert layers == sorted(layers, reverse=True)
    assert layers[0] > 3
    assert layers[-1] == 1


def test_broken_files_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        DACT.load_from_checkpoint(tmp_path / "nothing.ckpt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk" * 99)
    with pytest.raises(ValueError, match=r"junk\.ckpt cannot be read"):
        DACT.load_from_checkpoint(tmp_path / "junk.ckpt")
    with pytest.raises(FileNotFoundError, match=r"junk\.ckpt has no config.*load_from_checkpoint"):
        DACT.from_pretrained(tmp_path / "junk.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing has no config\.json"):
        DACT.from_pretrained(tmp_path / "nothing")
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match="unexpected keyword argument 'tolerance'"):
        DACT.from_pretrained(tmp_path / "model", tolerance=0.1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "output_dimension": 5}))
    with pytest.raises(ValueError, match=r"the weights do not fit this model .*classifier"):
        DACT.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a model of dact"):
        DACT.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupted"):
        DACT.from_pretrained(tmp_path / "model")


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"encoder": torch.nn.Linear(1, 1)}, TypeError, "LayeredEncoder, got Linear"),
        ({"classifier": {"num_layers": 1}}, TypeError, "such as SubmodelConfig, got {'n"),
        ({"halting": "later"}, ValueError, "got 'later'"),
        ({"halting_margin": 1.5}, ValueError, r"halting_margin must be in \[0, 1\], got 1.5"),
        ({"lambda_reg": -1.0}, ValueError, "lambda_reg.*got -1.0"),
        ({"consistency": 1.0, "exit_loss_weight": 0.0}, ValueError, "consistency needs an exit"),
        ({"class_weights": [1.0]}, ValueError, r"one entry per class \(3\), got 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        DACT(**{"encoder": TransformerEncoder(10, 1, 8, 2), **arguments})


def test_a_trainer_of_ones_own_predicts_and_searches_for_a_learning_rate(tmp_path):
    model = tiny_model()
    batches = DataLoader([random_batch(8, seed=seed) for seed in range(6)], batch_size=None)
    predictions = trainer(tmp_path).predict(model, batches)
    expected = [model.early_exit(batch) for batch in batches]
    for predicted, exited in zip(predictions, expected, strict=True):
        assert torch.equal(predicted.probabilities, exited.probabilities)
        assert torch.equal(predicted.exit_layer, exited.exit_layer)
    found = pl.tuner.Tuner(trainer(tmp_path)).lr_find(
        model.train(), batches, num_training=4, update_attr=False, early_stop_threshold=None
    )
    assert len(found.results["lr"]) == 4


@torch.no_grad()
def test_what_else_a_batch_carries_is_left_alone():
    model, batch = tiny_model(step_tokens=40), random_batch(20)
    extended = {**batch, "id": [f"row {row}" for row in range(20)]}
    assert torch.equal(model.early_exit(extended).exit_layer, model.early_exit(batch).exit_layer)
    with pytest.raises(TypeError, match="a batch is a dict .* got a tuple"):
        model((batch["input_ids"], batch["labels"]))
    with pytest.raises(KeyError, match="needs 'labels' .batch., a tensor, got the keys"):
        model.validation_step({"input_ids": batch["input_ids"]}, 0)


def test_a_checkpoint_whose_classes_stand_in_another_order_is_refused(tmp_path):
    model = tiny_model(class_names=["a", "b", "c"])
    batches = DataLoader([random_batch(8)], batch_size=None)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(model, batches, batches)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    other = tiny_model(class_names=["c", "b", "a"])
    with pytest.raises(
        ValueError, match=r"the classes a, b, c, in this order, but here they are c, b, a"
    ):
        trainer(tmp_path).test(other, batches, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert DACT.load_from_checkpoint(tmp_path / "x.ckpt").class_names == ["a", "b", "c"]


def test_a_checkpoint_may_lie_at_an_address(tmp_path):
    """And the model is then written where the logger writes."""
    batches = DataLoader([random_batch(8)], batch_size=None)
    checkpoints = pl.callbacks.ModelCheckpoint("memory://fits/one", "best", monitor="val_loss")
    fit = trainer(
        tmp_path,
        max_epochs=1,
        callbacks=[checkpoints, SavePretrained()],
        enable_checkpointing=True,
        plugins=[DurableCheckpointIO()],
        logger=pl.loggers.CSVLogger(tmp_path),
    )
    model = tiny_model()
    fit.fit(model, batches, batches)
    saved = DACT.from_pretrained(Path(fit.log_dir) / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)


# ------------------------------------------------------------------ files of others

EARLIER = Path(__file__).parent / "fixtures" / "version_0_1_0"


@pytest.mark.parametrize("name", ["checkpoint", "model"])
@torch.no_grad()
def test_files_of_version_0_1_0_load_and_answer_as_they_did(name):
    expected = json.loads((EARLIER / "expected.json").read_text())
    load = {"checkpoint": DACT.load_from_checkpoint, "model": DACT.from_pretrained}[name]
    model = load(EARLIER / {"checkpoint": "best.ckpt"}.get(name, name)).eval()
    ids = torch.tensor(expected["input_ids"])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    full, early = model(batch), model.early_exit(batch)
    for found, kind in ((full, "full"), (early, "early")):
        answers = torch.tensor(expected[name][kind])
        torch.testing.assert_close(found.probabilities, answers, atol=1e-5, rtol=1e-4)
    assert early.exit_layer.tolist() == expected[name]["exit_layer"]
    assert model.class_names == ["even", "odd"]
    assert model.temperatures is None
    if name == "model":
        margins = model.halting_margin, model.calibration["halting_margin"]
        assert margins == (expected[name]["halting_margin"],) * 2


@torch.no_grad()
def test_weights_that_another_tool_saved_in_half_precision_load_into_float32(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    half = {name: weight.half() for name, weight in weights.items()}
    save_file(half, tmp_path / "model.safetensors")
    again = DACT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    batch = random_batch()
    torch.testing.assert_close(
        again(batch).probabilities, model(batch).probabilities, atol=0.02, rtol=0.1
    )


# ------------------------------------------------------------------ a part of the encoder


@torch.no_grad()
def test_the_first_layers_of_an_encoder_are_a_model_of_their_own(tmp_path):
    whole, batch = tiny_model(layers=6), random_batch(20)
    model = DACT(
        encoder=whole.encoder,
        classifier=whole.classifier.config,
        confidence=whole.confidence.config,
        confidence_reads="state",
        num_layers=3,
    )
    model.eval()
    for name in ("classifier", "confidence"):
        first = {one: weight[:3] for one, weight in getattr(whole, name).state_dict().items()}
        getattr(model, name).load_state_dict(first)
    deep, states = whole(batch), {"states": whole.encoder(batch)}
    entered = []
    for number, layer in enumerate(model.encoder.layers, start=1):
        layer.register_forward_hook(lambda *args, number=number: entered.append(number))
    output = model(batch)
    torch.testing.assert_close(output.layer_probabilities, deep.layer_probabilities[:, :3])
    assert torch.equal(model.early_exit(batch).exit_layer, output.exit_layer)
    assert output.exit_layer.max() <= 3
    assert max(entered) == 3
    torch.testing.assert_close(model(states).probabilities, output.probabilities)
    model.save_pretrained(tmp_path)
    again = DACT.from_pretrained(tmp_path)
    assert again.num_layers == 3
    assert again.encoder.num_layers == 6
    assert torch.equal(again(batch).probabilities, output.probabilities)
    with pytest.raises(ValueError, match=r"num_layers must be in 1 … 6, got 7"):
        tiny_model(layers=6, num_layers=7)


# ------------------------------------------------------------------ the loss for others


def test_the_loss_needs_no_trainer():
    model, batch = tiny_model(lambda_reg=0.5, exit_loss_weight=0.2).train(), random_batch()
    for price, lambda_reg in ((0.5, None), (3.0, 3.0)):
        found = model.loss(batch, lambda_reg)
        expected = found.task_loss + price * found.ponder_cost + 0.2 * found.exit_loss
        torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    assert model.encoder.tokens.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------ what Lightning has


def test_several_validation_loaders_are_measured_apart(tmp_path):
    model, loaders = tiny_model(), [loader(32), loader(48, seed=3)]
    metrics = {}
    for result in trainer(tmp_path).validate(model, loaders, verbose=False):
        metrics |= result
    alone = [trainer(tmp_path).validate(model, one, verbose=False)[0] for one in loaders]
    for name, value in alone[0].items():
        assert metrics[name] == pytest.approx(value), name
    for name in ("val_loss", "val_accuracy", "val_exit_layer"):
        assert metrics[f"{name}/dataloader_idx_1"] == pytest.approx(alone[1][name])
    one = trainer(tmp_path)
    one.test(model, loaders, verbose=False)
    one.test(model, loaders[0], verbose=False)
    assert "test_loss/dataloader_idx_1" not in one.callback_metrics
    fit = trainer(tmp_path)
    fit.fit(model, loader(), loaders)
    assert {"val_loss", "val_loss/dataloader_idx_1"} <= fit.callback_metrics.keys()


def test_an_encoder_that_lightning_unfreezes_later_trains(tmp_path):
    class Unfreeze(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.encoder)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.encoder, optimizer, lr=1e-3)

    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    model = tiny_model(learning_rate=1e-2)
    before = model.encoder.tokens.weight.detach().clone()
    trainer(tmp_path, max_epochs=4, callbacks=[Unfreeze(), Watch()]).fit(
        model, loader(), loader(seed=1)
    )
    assert not torch.equal(model.encoder.tokens.weight, before)
    added = [step[-1] for step in rates if len(step) > len(rates[0])]
    assert added == sorted(added, reverse=True), "it decays with the others"
    assert added[-1] < 5e-4


def test_a_logger_gets_the_settings(tmp_path):
    import yaml

    logger = pl.loggers.TensorBoardLogger(tmp_path, "board")
    model = tiny_model(lambda_reg=0.125)
    trainer(tmp_path, max_epochs=1, logger=logger).fit(model, loader(), loader(seed=1))
    known = yaml.safe_load((tmp_path / "board" / "version_0" / "hparams.yaml").read_text())
    assert (known["lambda_reg"], known["encoder"]["num_layers"]) == (0.125, 4)
    assert model.hparams_initial["halting"] == "exact"


class Focused(DACT):
    """A subclass with an encoder and arguments of its own."""

    def __init__(self, vocab: int, focus: float = 1.0, words: list[str] | None = None, **kwargs):
        encoder = TransformerEncoder(vocab, 2, 8, 2)
        super().__init__(encoder, exit_loss_weight=0.7, **kwargs)
        self.save_hyperparameters(ignore=["encoder"])
        self.focus, self.words = focus, words


def test_a_subclass_gets_its_own_arguments_back(tmp_path):
    model = Focused(30, 0.5, words=["a"], lambda_reg=0.3, output_dimension=4)
    fit = trainer(tmp_path, max_epochs=1)
    fit.strategy.connect(model)
    fit.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    model.halting_margin = 0.25
    model.save_pretrained(tmp_path / "model")
    loaded = [
        Focused.load_from_checkpoint(tmp_path / "x.ckpt"),
        Focused.from_pretrained(tmp_path / "model", words=["b"]),
    ]
    for again in loaded:
        assert again.focus == 0.5
        assert (again.lambda_reg, again.exit_loss_weight, again.output_dimension) == (0.3, 0.7, 4)
        assert again.encoder.vocab_size == 30
    assert [again.words for again in loaded] == [["a"], ["b"]]
    assert loaded[1].halting_margin == 0.25
    assert DACT.from_pretrained(tmp_path / "model").lambda_reg == 0.3
    copied = copy.deepcopy(model)
    assert copied.config() == model.config()


# ------------------------------------------------------------------ somebody else's LightningCLI

SETTINGS = {
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    "model": {
        "encoder": {
            "class_path": "dact.encoders.TransformerEncoder",
            "init_args": {"vocab_size": 50, "num_layers": 2, "hidden_size": 8, "num_heads": 2},
        },
        "lambda_reg": 0.125,
        "focus": 0.5,
    },
}
COMMANDS = [["fit"], ["test"], ["predict"], ["fit", "--trainer.max_epochs=2"]]


def test_every_command_of_a_foreign_cli_takes_the_checkpoint(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    from tests.foreign import MyDACT, MyData

    settings = copy.deepcopy(SETTINGS)
    settings["trainer"] |= {"default_root_dir": str(tmp_path)}
    checkpoint = tmp_path / "checkpoints" / "epoch=0-step=4.ckpt"
    for number, (command, *more) in enumerate(COMMANDS):
        arguments = {
            command: {**settings, **({"ckpt_path": str(checkpoint)} if number else {})},
            "subcommand": command,
        }
        arguments[command]["trainer"] = {**settings["trainer"], "max_epochs": 2 if more else 1}
        cli = LightningCLI(MyDACT, MyData, args=arguments, save_config_callback=None)
        assert cli.model.focus == 0.5
    assert cli.trainer.global_step == 8
    assert MyDACT.load_from_checkpoint(checkpoint).focus == 0.5
    assert DACT.load_from_checkpoint(checkpoint).lambda_reg == 0.125


def test_detached_exits_learn_as_a_multi_exit_does_and_the_confidence_as_ever():
    joint = tiny_model(exit_loss_weight=0.5, lambda_reg=0.1)
    detached = tiny_model(exit_loss_weight=0.5, lambda_reg=0.1, detach_exits=True)
    detached.load_state_dict(joint.state_dict())
    batch = random_batch(12)
    loss = {"joint": joint.loss(batch), "detached": detached.loss(batch)}
    # Only who learns from it differs.
    torch.testing.assert_close(loss["joint"].loss, loss["detached"].loss)

    def gradients(model, value):
        model.zero_grad()
        value.backward(retain_graph=True)
        named = model.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    exits = gradients(joint, 0.5 * loss["joint"].exit_loss)
    learned = gradients(detached, loss["detached"].loss)
    others = {name for name in learned if not name.startswith("confidence")}
    assert others and others == {name for name in exits if not name.startswith("confidence")}
    torch.testing.assert_close({n: learned[n] for n in others}, {n: exits[n] for n in others})
    whole = gradients(joint, loss["joint"].loss)
    own = {name for name in learned if name.startswith("confidence")}
    torch.testing.assert_close({n: learned[n] for n in own}, {n: whole[n] for n in own})
    assert DACT.from_config(detached.config(), encoder=detached.encoder).detach_exits
    with pytest.raises(ValueError, match="detach_exits needs an exit_loss_weight above 0"):
        tiny_model(exit_loss_weight=0.0, detach_exits=True)


@pytest.mark.parametrize(("width", "rate"), [(64, 1e-4), (768, 3e-5), (1024, 2e-5)])
def test_the_learning_rate_follows_the_width_of_a_pretrained_encoder(width, rate):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=9, hidden_size=width, **sizes)
    model = DACT(encoder=HuggingFaceEncoder.from_model(AutoModel.from_config(config)))
    assert model.learning_rate == model.config()["learning_rate"] == rate
    assert DACT(encoder=model.encoder, learning_rate=0.5).learning_rate == 0.5


@torch.no_grad()
def test_at_layer_k_exactly_the_examples_that_need_it_enter():
    model, batch = tiny_model(layers=6), random_batch(40)
    entered = []
    for module in model.encoder.layers:
        module.register_forward_hook(lambda module, inputs, output: entered.append(len(inputs[0])))
    exits = model.early_exit(batch).exit_layer
    assert len(set(exits.tolist())) > 2, "the model of this test spreads its exits"
    assert entered == [int((exits >= k).sum()) for k in range(1, int(exits.max()) + 1)]


@torch.no_grad()
def test_batch_size_and_order_change_nothing():
    model, batch = tiny_model(layers=6), random_batch(24)
    whole = model.early_exit(batch)
    order = torch.randperm(24)
    shuffled = model.early_exit({name: tensor[order] for name, tensor in batch.items()})
    assert torch.equal(shuffled.exit_layer, whole.exit_layer[order])
    for row in range(24):
        single = model.early_exit({name: tensor[row : row + 1] for name, tensor in batch.items()})
        assert single.exit_layer[0] == whole.exit_layer[row]
        torch.testing.assert_close(
            single.probabilities[0], whole.probabilities[row], atol=1e-5, rtol=1e-4
        )


def test_class_weights_weigh_examples_and_not_batches(tmp_path):
    model = tiny_model(class_weights=[1.0, 5.0, 0.5], lambda_reg=0.0)
    losses = [
        trainer(tmp_path).validate(model, loader(60, batch_size=size), verbose=False)[0]["val_loss"]
        for size in (7, 60)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    batch = random_batch(60)
    with torch.no_grad():
        answers = model.eval()(batch).probabilities
    expected = references.task_loss(answers.tolist(), batch["labels"].tolist(), [1.0, 5.0, 0.5])
    assert losses[0] == pytest.approx(expected, rel=1e-4)


def test_val_loss_has_the_final_lambda_from_the_first_epoch_on(tmp_path):
    """λ warms up in training only, and neither exit loss nor warm-up touches val_loss."""
    torch.manual_seed(0)
    models = [
        tiny_model(lambda_reg=0.5, lambda_warmup=warmup, exit_loss_weight=w)
        for warmup, w in ((0, 0), (1, 9))
    ]
    models[1].load_state_dict(models[0].state_dict())
    values = [
        trainer(tmp_path).validate(model, loader(), verbose=False)[0]["val_loss"]
        for model in models
    ]
    assert values[0] == values[1]


def test_a_checkpoint_of_another_shape_or_class_count_is_one_clear_error(tmp_path):
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(tiny_model(), loader())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    layers = tiny_model().encoder.num_layers
    for other, difference in (
        (tiny_model(hidden=32), "such as .* instead of"),
        (tiny_model(layers=layers + 1), rf"\[{layers}, 16\] instead of \[{layers + 1}, 16\]"),
        (tiny_model(output_dimension=4), "such as .* instead of"),
    ):
        with pytest.raises(ValueError, match=f"the weights do not fit this model .*{difference}"):
            trainer(tmp_path).test(
                other, loader(), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False
            )


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("encoder", {"num_layers": 10**9}),
        ("classifier", {"num_layers": 300, "hidden_units": 4096}),
    ],
)
def test_a_description_of_an_absurd_model_is_refused_at_once(tmp_path, section, changed):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[section] |= changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="more layers than fit its .* weights"):
        DACT.from_pretrained(tmp_path)


def test_shared_batch_normalization_trains_with_the_statistics_that_it_has_in_eval_mode():
    torch.manual_seed(0)
    config = SubmodelConfig(normalization="batch", dropout=0.0)
    encoder = TransformerEncoder(50, 4, 16, 2)
    model = DACT(encoder=encoder, classifier=config, confidence=config, share_submodels=True)
    states = torch.randn(64, 4, 16) + 5 * torch.arange(4).view(1, 4, 1)  # layers differ
    for _ in range(200):
        trained = model.classifier(states)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval().classifier(states), trained.detach(), atol=0.05, rtol=0.05
        )


def test_a_fit_says_which_learning_rate_the_encoder_has_chosen(tmp_path, caplog):
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    for arguments, said in (({}, True), ({"learning_rate": 1e-3}, False)):
        caplog.clear()
        trainer(tmp_path).fit(tiny_model(**arguments), DataLoader([random_batch()], None))
        assert ("learning_rate is 0.0001" in caplog.text) == said
