"""DACT, the LightningModule: outputs, losses, early exit, schedules and what it leaves on disk."""

import copy
import json
import logging
import math
import os
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
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.files import DurableCheckpointIO
from tests import references
from tests.conftest import forked, free_port, random_batch, tiny_model
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
    data.pop("labels")
    full, early = model(data), model.early_exit(data)
    assert full.layer_probabilities.shape == (batch, layers, classes)
    assert early.layer_probabilities is None
    assert torch.equal(early.exit_layer, full.exit_layer)
    if tolerance == 0:
        assert torch.equal(early.probabilities.argmax(1), full.probabilities.argmax(1))
    a, p = functional.accumulate(full.layer_probabilities, full.h)
    torch.testing.assert_close((full.probabilities, full.p), (a[:, -1], p))
    expected = functional.answer_at(a, full.exit_layer)
    torch.testing.assert_close(early.probabilities, expected, atol=1e-4, rtol=1e-3)


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


@pytest.mark.slow
def test_it_learns(tmp_path):
    batch = random_batch(160, 6)
    batch["labels"] = batch["input_ids"][:, 0] % 3
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(160)]
    model = DACT(encoder=TransformerEncoder(50, 2, 32, 2, pooling="first"), learning_rate=1e-2)
    fit = trainer(tmp_path, max_epochs=12, check_val_every_n_epoch=12, gradient_clip_val=1.0)
    fit.fit(model, DataLoader(rows, 16, shuffle=True), DataLoader(rows, 64))
    assert fit.callback_metrics["val_accuracy"] > 0.95


# Losses of version 0.1.0 and of all later ones.
TWENTY = {
    "none": [
        1.39848447, 1.43657768, 1.43763041, 1.72189999, 1.60729456, 1.49320567, 1.50884879,
        1.54199314, 1.54842937, 1.58847308, 1.68083072, 1.61350548, 1.58924651, 1.60480332,
        1.54986799, 1.56264567, 1.54280376, 1.56100094, 1.53409541, 1.56112266,
    ],
    "batch": [
        1.59540999, 1.48883200, 1.44043374, 1.63059390, 1.61791945, 1.56140769, 1.53318262,
        1.65799773, 1.50624061, 1.48587406, 1.60733008, 1.63067555, 1.67947555, 1.65407515,
        1.63865364, 1.61153233, 1.43420005, 1.56272388, 1.41988707, 1.70549726,
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
    submodels = {"classifier": classifier, "confidence": confidence, "confidence_reads": "state"}
    rates = {"lambda_reg": 0.1, "learning_rate": 3e-3, "weight_decay": 0.1}
    model = DACT(encoder, **submodels, **rates)
    trainer(tmp_path, max_epochs=1, callbacks=[Watch()]).fit(model, batches)
    assert losses == pytest.approx(TWENTY[normalization], rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "normalization"), [("bf16-mixed", "batch"), ("64-true", "none")]
)
def test_every_precision_trains(tmp_path, precision, normalization):
    encoder = TransformerEncoder(50, 3, 16, 2)
    model = DACT(encoder=encoder, classifier=SubmodelConfig(normalization=normalization))
    fit = trainer(tmp_path, precision=precision, accumulate_grad_batches=2)
    fit.fit(model, loader(65), loader(33, seed=1))  # the last batches hold one example
    assert math.isfinite(fit.callback_metrics["val_loss"])
    assert fit.callback_metrics["val_loss"].dtype in (torch.float32, torch.float64)


def _two_processes(rank, port, folder):
    """One process of a two-process fit on gloo."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    pl.seed_everything(0)
    model, seen = tiny_model(lambda_reg=0.05), Seen()
    fit = trainer(folder, devices=2, strategy="ddp")
    fit.fit(model, loader(64, 8), loader(32, 8, seed=1))
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    fit.callbacks.append(seen)
    fit.fit_loop.max_epochs = 3
    data = CompositionalSentiment(101, 20, 20, batch_size=8, confidence_fraction=0.0)
    fit.fit(model, datamodule=data)
    model.save_pretrained(f"{folder}/model")  # as a script says it, in both processes
    found = {"weights": weights, "metrics": metrics, "batches": seen.batches}
    torch.save(found, f"{folder}/rank{rank}.pt")


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


class Own(TransformerEncoder):
    """(A page of the documents has an encoder of other layers.)"""


def test_a_checkpoint_of_an_encoder_of_ones_own_is_loaded_with_the_encoder(tmp_path):
    model = tiny_model(encoder=Own(50, 3, 8, 2))
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(model, loader())
    fit.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="pass encoder="):
        DACT.load_from_checkpoint(tmp_path / "own.ckpt")
    again = DACT.load_from_checkpoint(tmp_path / "own.ckpt", encoder=Own(50, 3, 8, 2)).eval()
    with torch.no_grad():
        batch = random_batch()
        assert torch.equal(again(batch).probabilities, model.eval()(batch).probabilities)


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
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(model, loader(), loader(seed=1))
    path = tmp_path / "x.ckpt"
    fit.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["dact"] == model.config()
    again = DACT.load_from_checkpoint(path)
    assert again.config() == model.config()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert DACT.load_from_checkpoint(path, halting_tolerance=0.4).halting_tolerance == 0.4

    def test(model):
        return trainer(tmp_path).test(model, loader(seed=2), ckpt_path=path, verbose=False)[0]

    # strict reloading by the Trainer, into a model that was built again
    fresh = build(**arguments)
    assert test(fresh) == trainer(tmp_path).test(again, loader(seed=2), verbose=False)[0]
    assert fresh.class_names == ["a", "b", "c"]
    if build is tiny_model:
        for changes, difference in (
            ({"class_names": ["c", "b", "a"]}, "a, b, c, in this order, but here they are c, b, a"),
            ({"hidden": 32}, "the weights do not fit this model .*such as .* instead of"),
            ({"layers": 5}, r"fit this model .*\[4, 16\] instead of \[5, 16\]"),
            ({"output_dimension": 4}, "fit this model .*such as .* instead of"),
        ):
            with pytest.raises(ValueError, match=difference):
                test(tiny_model(**changes))


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


@pytest.mark.parametrize(("build", "share"), [(tiny_model, True), (hugging_face_model, False)])
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


def test_broken_files_are_clear_errors(tmp_path):
    (tmp_path / "junk.ckpt").write_bytes(b"junk" * 99)
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    wrong = json.dumps({**config, "output_dimension": 5})
    checkpoint, folder = DACT.load_from_checkpoint, DACT.from_pretrained
    for load, name, written, kind, message in (
        (checkpoint, "nothing.ckpt", {}, FileNotFoundError, r"nothing\.ckpt"),
        (checkpoint, "junk.ckpt", {}, ValueError, r"junk\.ckpt cannot be read"),
        (checkpoint, "model", {}, ValueError, "give the model.s folder to from_pretrained"),
        (folder, "junk.ckpt", {}, FileNotFoundError, "there is no .*config.*load_from_checkpoint"),
        (folder, "nothing", {}, FileNotFoundError, r"there is no .*nothing/config\.json"),
        (folder, "model", {"config.json": wrong}, ValueError, "do not fit this model .*classifier"),
        (folder, "model", {"config.json": "{}"}, ValueError, "does not describe a model of dact"),
        (folder, "model", {"model.safetensors": "x"}, ValueError, r"safetensors is corrupted"),
    ):
        for file, content in written.items():
            (tmp_path / name / file).write_text(content)
        with pytest.raises(kind, match=message):
            load(tmp_path / name)


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


@torch.no_grad()
def test_what_else_a_batch_carries_is_left_alone():
    model, batch = tiny_model(), random_batch(20)
    extended = {**batch, "id": [f"row {row}" for row in range(20)]}
    assert torch.equal(model.early_exit(extended).exit_layer, model.early_exit(batch).exit_layer)
    with pytest.raises(KeyError, match="input_ids"):
        model({"labels": torch.zeros(3)})
    with pytest.raises(TypeError, match="a batch is a dict .* got a tuple"):
        model((batch["input_ids"], batch["labels"]))
    with pytest.raises(KeyError, match="needs 'labels' .batch., a tensor, got the keys"):
        model.validation_step({"input_ids": batch["input_ids"]}, 0)


def test_a_checkpoint_may_lie_at_an_address(tmp_path):
    """And the model is then written where the logger writes."""
    callbacks = [pl.callbacks.ModelCheckpoint("memory://fits/one", "best"), SavePretrained()]
    options = {"logger": pl.loggers.CSVLogger(tmp_path), "plugins": [DurableCheckpointIO()]}
    options |= {"callbacks": callbacks, "enable_checkpointing": True}
    fit, model = trainer(tmp_path, max_epochs=1, **options), tiny_model()
    fit.fit(model, loader(16))
    loaded = DACT.load_from_checkpoint("memory://fits/one/best.ckpt")
    for again in (loaded, DACT.from_pretrained(Path(fit.log_dir) / "model")):
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


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


# ------------------------------------------------------------------ a part of the encoder


@torch.no_grad()
def test_the_first_layers_of_an_encoder_are_a_model_of_their_own(tmp_path):
    whole, batch = tiny_model(layers=6), random_batch(20)
    parts = {name: getattr(whole, name).config for name in ("classifier", "confidence")}
    model = DACT(encoder=whole.encoder, confidence_reads="state", num_layers=3, **parts)
    model.eval()
    for name in ("classifier", "confidence"):
        first = {one: weight[:3] for one, weight in getattr(whole, name).state_dict().items()}
        getattr(model, name).load_state_dict(first)
    entered = []
    for number, layer in enumerate(model.encoder.layers, start=1):
        layer.register_forward_hook(lambda *args, number=number: entered.append(number))
    output = model(batch)
    assert max(entered) == 3
    layers = whole(batch).layer_probabilities
    torch.testing.assert_close(output.layer_probabilities, layers[:, :3])
    assert torch.equal(model.early_exit(batch).exit_layer, output.exit_layer)
    model.save_pretrained(tmp_path)
    again = DACT.from_pretrained(tmp_path)
    assert (again.num_layers, again.encoder.num_layers) == (3, 6)
    assert torch.equal(again(batch).probabilities, output.probabilities)
    with pytest.raises(ValueError, match=r"num_layers must be in 1 … 6, got 7"):
        tiny_model(layers=6, num_layers=7)


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


@pytest.mark.slow
def test_every_command_of_a_foreign_cli_takes_the_checkpoint(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    from tests.foreign import MyDACT, MyData

    checkpoint = tmp_path / "checkpoints" / "epoch=0-step=4.ckpt"
    for command, epochs in (("fit", 1), ("test", 1), ("predict", 1), ("fit", 2)):
        options = {"default_root_dir": str(tmp_path), "max_epochs": epochs}
        given = {**SETTINGS, "trainer": {**SETTINGS["trainer"], **options}}
        given["ckpt_path"] = str(checkpoint) if checkpoint.exists() else None
        arguments = {command: given, "subcommand": command}
        cli = LightningCLI(MyDACT, MyData, args=arguments, save_config_callback=None)
        assert cli.model.focus == 0.5
    assert cli.trainer.global_step == 8
    cli.model.halting_margin = 0.25
    cli.model.save_pretrained(tmp_path / "model")
    again = MyDACT.from_pretrained(tmp_path / "model")
    assert (again.focus, again.halting_margin) == (0.5, 0.25)
    assert MyDACT.from_pretrained(tmp_path / "model", focus=2.0).focus == 2.0
    assert MyDACT.load_from_checkpoint(checkpoint).focus == 0.5
    assert DACT.load_from_checkpoint(checkpoint).lambda_reg == 0.125


def test_detached_exits_learn_as_a_multi_exit_does_and_the_confidence_as_ever():
    joint = tiny_model(exit_loss_weight=0.5, lambda_reg=0.1)
    detached = tiny_model(exit_loss_weight=0.5, lambda_reg=0.1, detach_exits=True)
    detached.load_state_dict(joint.state_dict())
    batch = random_batch(12)
    # Only who learns from it differs.
    torch.testing.assert_close(joint.loss(batch).loss, detached.loss(batch).loss)

    def gradients(model, part):
        model.zero_grad()
        getattr(model.loss(batch), part).backward()
        named = model.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    exits, whole = gradients(joint, "exit_loss"), gradients(joint, "loss")
    learned = gradients(detached, "loss")
    assert learned.keys() == whole.keys()
    for name, gradient in learned.items():
        expected = whole[name] if name.startswith("confidence") else 0.5 * exits[name]
        torch.testing.assert_close(gradient, expected, msg=name)
    assert DACT.from_config(detached.config(), encoder=detached.encoder).detach_exits
    with pytest.raises(ValueError, match="detach_exits needs an exit_loss_weight above 0"):
        tiny_model(exit_loss_weight=0.0, detach_exits=True)


def test_the_learning_rate_follows_the_width_of_a_pretrained_encoder(tmp_path, caplog):
    for width, rate in ((64, 1e-4), (768, 3e-5), (1024, 2e-5)):
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = BertConfig(vocab_size=9, hidden_size=width, **sizes)
        model = DACT(encoder=HuggingFaceEncoder.from_model(AutoModel.from_config(config)))
        assert model.learning_rate == model.config()["learning_rate"] == rate
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    for arguments, said in (({}, True), ({"learning_rate": 1e-3}, False)):
        caplog.clear()
        trainer(tmp_path, max_epochs=1).fit(tiny_model(**arguments), loader(16))
        assert ("learning_rate is 0.0001" in caplog.text) == said
    config = BertConfig(vocab_size=50, hidden_size=768, **sizes)
    wide = HuggingFaceEncoder.from_model(AutoModel.from_config(config))
    for rate, said in ((1e-4, True), (4e-5, False)):
        caplog.clear()
        trainer(tmp_path, max_epochs=1).fit(DACT(encoder=wide, learning_rate=rate), loader(16))
        warning = (
            "learning_rate is 0.0001; 3e-05 is the default for the encoder's hidden size of 768"
        )
        assert (warning in caplog.text) == said


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
    values = []
    for warmup, weight in ((0, 0), (1, 9)):
        torch.manual_seed(0)
        model = tiny_model(lambda_reg=0.5, lambda_warmup=warmup, exit_loss_weight=weight)
        values += [trainer(tmp_path).validate(model, loader(), verbose=False)[0]["val_loss"]]
    assert values[0] == values[1]


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
