"""What only a GPU shows: half precision in training and early exit there. Skipped without one."""

import lightning.pytorch as pl
import pytest
import torch

from dact import DACT
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
def test_fits_and_exits_early_on_a_gpu(precision, tmp_path):
    pl.seed_everything(0)
    data = CompositionalSentiment(num_train=2000, num_val=200, num_test=200)
    model = DACT(encoder=TransformerEncoder(data.vocab_size, 4, 32, 4), learning_rate=2e-3)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="gpu", devices=1, precision=precision,
        logger=False, default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, data)
    assert trainer.callback_metrics["val_accuracy"] > 0.5
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    data.setup("test")
    model.cuda().eval()
    for batch in data.test_dataloader():
        batch = {name: tensor.cuda() for name, tensor in batch.items()}
        with torch.no_grad():
            full = model(batch)
        early = model.early_exit(batch)
        assert torch.equal(early.probabilities.argmax(1), full.probabilities.argmax(1))
        assert torch.equal(early.exit_layer, full.exit_layer)
