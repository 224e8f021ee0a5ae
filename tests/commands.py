"""Commands as a person types them: the real command line in a folder of one's own."""

import os
import subprocess
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parent.parent
FIT = ROOT / "configs" / "fit.yaml"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
GENERATED = ROOT / "configs" / "reviews.yaml"
LABELS = ROOT / "configs" / "labels.yaml"
MPNET = ROOT / "configs" / "mpnet.yaml"
VADER = ROOT / "configs" / "vader.yaml"
SMALL = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--data.num_train=600"]
SMALL += ["--data.num_val=120", "--data.num_test=90"]
SMALL += ["--model.encoder.num_layers=3", "--model.encoder.hidden_size=16"]
OWN = """\
trainer: {max_epochs: 1, accelerator: cpu, num_sanity_val_steps: 0}
model:
  encoder:
    class_path: TransformerEncoder
    init_args: {vocab_size: 42, num_layers: 2, hidden_size: 8, num_heads: 2}
data:
  class_path: TextClassificationData
  init_args: {train_file: train.csv, tokenizer: ./tokenizer, max_length: 16}
tuner: {n_trials: 3}
"""
REVIEWS = "".join(
    f"screen {i} is {'great' if i % 2 else 'awful'},{'yes' if i % 2 else 'no'}\n" for i in range(40)
)


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **more}


def dact(*arguments, cwd, check=True, text=None, **variables):
    """Run the command, with `text` as its standard input; with `check`, it must succeed."""
    process = warm.start("dact", arguments, cwd=cwd, env=environment(**variables))
    output, errors = process.communicate(text, timeout=500)
    if check:
        assert process.returncode == 0, output + errors
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)
