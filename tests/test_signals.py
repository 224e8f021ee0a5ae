"""Signals: a stop that is never lost, and that comes between batches."""

import signal
import weakref

import pytest
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from dact import signals
from tests.conftest import random_batch, tiny_model

pytestmark = pytest.mark.usefixtures("_installed")


@pytest.fixture
def _installed():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Which a shell ignores in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._requested = False


class Thing:
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_weakref_callback_is_not_lost(number, capsys):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert reference() is None
    assert signals.stop_requested()
    with pytest.raises(KeyboardInterrupt):
        signals.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)  # a second one ends work that has no batches
    assert "Traceback" not in capsys.readouterr().err
    signals.install()
    signals.check()  # a new start forgets them


def test_a_fit_stops_at_the_next_batch():
    batches = [random_batch(batch=4, seed=seed) for seed in range(5)]
    seen = []

    class Terminate(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, index):
            seen.append(index)
            signal.raise_signal(signal.SIGTERM)

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    callbacks = [Terminate(), signals.StopOnSignal()]
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **off)
    with pytest.raises(SystemExit):  # how Lightning passes a KeyboardInterrupt on
        trainer.fit(tiny_model(layers=2), DataLoader(batches, batch_size=None))
    assert seen == [0]
