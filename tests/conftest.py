import gc
import multiprocessing
import os
import shutil
import socket
import sys

import hypothesis
import psutil
import pytest
import torch


def _memory_takes_files(folder="/dev/shm"):
    """Whether there is room in memory for the files of tests, and scripts among them could be
    run."""
    if not os.path.isdir(folder) or os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return False
    return (
        shutil.disk_usage(folder).free > 4 * 2**30 and psutil.virtual_memory().available > 6 * 2**30
    )


# Files of tests need no disk that outlives a loss of power, on which each sync takes milliseconds.
if "PYTEST_DEBUG_TEMPROOT" not in os.environ and _memory_takes_files():
    os.environ["PYTEST_DEBUG_TEMPROOT"] = "/dev/shm"

# Nothing here may reach for a hub: a test that tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("dact", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dact")

from dact import DACT, SubmodelConfig  # noqa: E402
from dact.__main__ import main  # noqa: E402
from dact.encoders import TransformerEncoder  # noqa: E402
from tests.commands import FIT, OWN, REVIEWS, SMALL, dact  # noqa: E402

gc.freeze()  # the collection after each trial need not visit what is imported
torch.set_num_threads(
    1
)  # for fixtures that are made before the first test as well, which must not depend on its place


@pytest.fixture(autouse=True)
def _one_seed_and_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tests run side by side


@pytest.fixture
def dact_here(monkeypatch, capsys):
    """Run the command in this process, which is faster: (exit status, what it printed)."""

    def call(*arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["dact", *map(str, arguments)])
        # Another test of this process may have registered a device.
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
        status = 0
        monkeypatch.setattr(sys, "path", [*sys.path])
        try:
            main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """A folder in which `dact fit` ran on a small version of configs/fit.yaml."""
    folder = tmp_path_factory.mktemp("fitted")
    done = dact("fit", "--config", FIT, *SMALL, cwd=folder)
    return folder, folder / "lightning_logs" / "version_0", done


@pytest.fixture
def own(fitted, tmp_path):
    """A folder with a file of one's own, a tokenizer, and a configuration with a `tuner:`
    section."""
    shutil.copytree(fitted[1] / "model", tmp_path / "tokenizer")
    (tmp_path / "config.yaml").write_text(OWN)
    (tmp_path / "train.csv").write_text("text,label\n" + REVIEWS)
    return tmp_path


def scatter_exits(model):
    """Give the submodels of an untrained model random heads, so that its examples leave at many
    different layers."""
    generator = torch.Generator().manual_seed(1)
    for submodels, scale in ((model.classifier, 4.0), (model.confidence, 12.0)):
        last = submodels[-1]
        with torch.no_grad():
            for weight in last.weight:  # of each layer
                weight.normal_(std=scale / weight.shape[1] ** 0.5, generator=generator)
            last.bias.zero_()
    return model


def tiny_model(layers=4, hidden=16, vocab=50, **arguments):
    """An untrained DACT in eval mode, whose examples leave at different layers."""
    encoder = arguments.pop("encoder", None) or TransformerEncoder(vocab, layers, hidden, 2)
    torch.nn.init.normal_(encoder.tokens.weight) if hasattr(encoder, "tokens") else None
    config = SubmodelConfig(num_layers=1, hidden_units=16, dropout=0.0)
    # Random states give a confidence of any value; random answers hardly move one.
    arguments.setdefault("confidence_reads", "state")
    return scatter_exits(
        DACT(encoder=encoder, classifier=config, confidence=config, **arguments).eval()
    )


def assert_same_answers(found, expected):
    """Assert that two answers of a TextClassifier are the same but for the last bits: memory may
    lie otherwise."""
    assert [(one.label, one.exit_layer) for one in found] == [
        (one.label, one.exit_layer) for one in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def random_batch(batch=16, length=12, vocab=50, labels=3, seed=0):
    """Token ids with padding of random lengths on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(3, vocab, (batch, length), generator=generator) * mask
    target = torch.randint(0, labels, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": target}


def forked(module):
    """A context of processes that share one import of `module`, instead of one each.

    A process has one such server, which starts with the first use: that of a study with workers may
    be it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dact.tuning.studies", module])
    return context


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
