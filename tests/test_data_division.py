"""How examples are divided into splits: by a hash of each text, or by class, and never a text on
two sides."""

import random
from collections import Counter
from itertools import combinations

import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
from hypothesis import given

from dact.cli.main import balanced_weights
from dact.data import CompositionalSentiment, TextClassificationData
from dact.data.examples import hash_split, stratified_split, text_key
from dact.data.tokenizers import word_tokenizer
from tests.tables import write_table

WORDS = [f"word{number}" for number in range(60)]


def data(train=None, **arguments):
    return TextClassificationData(train, tokenizer=word_tokenizer(WORDS), **arguments)


def write(folder, name, texts, labels="ab"):
    path = folder / f"{name}.csv"
    repeated = [labels[row % len(labels)] for row in range(len(texts))]
    write_table(path, pd.DataFrame({"text": texts, "label": repeated}))
    return str(path)


def texts_of(module, *splits):
    return {text_key(text) for split in splits for text in module.splits[split].texts}


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=200)
FRACTIONS = st.sampled_from([0.1, 0.25, 0.5, 0.99])


@pytest.mark.parametrize("split", [hash_split, stratified_split])
@given(rows=ROWS, fraction=FRACTIONS, seed=st.integers(0, 3))
def test_a_division_is_complete_and_keeps_copies_together(split, rows, fraction, seed):
    labels, keys = [label for label, _ in rows], [str(key).encode() for _, key in rows]

    def divide():
        if split is hash_split:
            return hash_split(labels, keys, fraction, seed)
        return stratified_split(labels, fraction, seed, keys)

    kept, aside = divide()
    assert sorted(kept + aside) == list(range(len(labels)))
    assert not {keys[row] for row in kept} & {keys[row] for row in aside}
    assert (kept, aside) == divide()
    # The class of a text is that of its first copy.
    first = dict(zip(reversed(keys), reversed(labels), strict=True))
    for label in set(first.values()):
        texts = {key for key, own in first.items() if own == label}
        for side in (kept, aside):
            assert texts & {keys[row] for row in side} or len(texts) == 1


def test_the_hash_sets_a_share_of_the_texts_aside_that_depends_on_the_seed():
    keys = [text_key(str(number)) for number in range(4000)]
    one, other = (set(hash_split([0] * 4000, keys, 0.1, seed)[1]) for seed in range(2))
    assert 320 < len(one) < 480
    assert len(one & other) < 80


@given(st.lists(st.integers(0, 3), min_size=8, max_size=200), FRACTIONS, st.integers(0, 3))
def test_a_stratified_division_takes_the_share_of_each_class(labels, fraction, seed):
    _, aside = stratified_split(labels, fraction, seed)
    counts = Counter(labels)
    for label, count in counts.items():
        given_up = sum(labels[row] == label for row in aside)
        assert given_up == 0 if count == 1 else 1 <= given_up < count
        assert abs(given_up - fraction * count) <= len(counts)


def test_no_text_is_in_two_parts_of_a_file(tmp_path):
    texts = [*WORDS, *(f"  {word.upper()} " for word in WORDS)]
    file = write(tmp_path, "train", texts, "abc")
    module = data(file, val_fraction=0.3, calibration_fraction=0.5)
    module.setup("fit")
    for one, other in combinations(("train", "val", "calibration"), 2):
        assert not texts_of(module, one) & texts_of(module, other)
    assert sum(map(len, module.splits.values())) == 120
    assert 20 < len(module.splits["val"]) + len(module.splits["calibration"]) < 52


def test_texts_with_conflicting_labels_are_counted(tmp_path):
    texts = [*WORDS, WORDS[0].upper(), f" {WORDS[1]}", WORDS[2]]
    file = write(tmp_path, "train", texts, ["a", "b"] * 30 + ["b", "b", "b"])
    with pytest.warns(UserWarning, match="train.csv: texts with conflicting labels: 2"):
        data(file).setup("fit")


def test_a_changed_training_file_moves_no_text_into_or_out_of_calibration(tmp_path):
    """A correction, another order and new rows: what calibrates has never been trained on."""
    texts = [f"text {number}" for number in range(400)]
    options = {"val_fraction": 0.3, "calibration_fraction": 0.5}
    fitted = data(write(tmp_path, "train", texts), **options)
    fitted.setup("fit")
    changed = [*random.Random(0).sample(texts, 400), *(f"more {number}" for number in range(50))]
    later = data(write(tmp_path, "train", changed, "abb"), **options)
    later.setup("fit")
    parts = ("train", "val", "calibration")
    for part in parts:
        assert texts_of(fitted, part) == texts_of(later, part) & texts_of(fitted, *parts)


@pytest.mark.parametrize("split", ["val", "calibration", "test"])
def test_texts_that_training_has_are_left_out_of_other_files(tmp_path, split):
    train = write(tmp_path, "train", WORDS[:40])
    other = write(tmp_path, "other", [word.upper() for word in WORDS[30:]])
    module = data(train, **{f"{split}_file": other})
    with pytest.warns(UserWarning, match="other.csv: 10 of 30 texts are left out: training, v"):
        module.setup("test" if split == "test" else "fit")
    assert texts_of(module, split) == {*map(text_key, WORDS[40:])}
    if split == "val":
        with pytest.raises(ValueError, match="copy.csv: all of its texts are used elsewhere"):
            data(train, val_file=write(tmp_path, "copy", WORDS[:40])).setup("fit")


def test_validation_is_never_left_empty(tmp_path):
    module = data(write(tmp_path, "train", WORDS, "abc"), calibration_fraction=0.99)
    module.setup("fit")
    assert {*module.splits["val"].labels} == {0, 1, 2}


def test_a_calibration_file_is_what_calibrates(tmp_path):
    train = write(tmp_path, "train", WORDS[:40])
    other = write(tmp_path, "other", WORDS[40:], "ba")
    module = data(train, calibration_file=other)
    module.setup("fit")
    assert module.splits["calibration"].texts == WORDS[40:]
    # Neighbours have similar lengths.
    batches = list(module.calibration_dataloader())
    labels, rows = (torch.cat([batch[name] for batch in batches]) for name in ("labels", "row"))
    assert labels[rows.argsort()].tolist() == [1, 0] * 10
    assert data(train).calibration_dataloader() is None
    alone = data(calibration_file=other, class_names=["a", "b"])
    alone.setup("validate")
    assert len(alone.splits["calibration"]) == 20


# ------------------------------------------------------------------ texts without labels


def test_texts_without_labels_are_for_a_teacher_alone(tmp_path):
    train, more = write(tmp_path, "train", WORDS[:40]), tmp_path / "more.txt"
    more.write_text("\n".join([*WORDS, "", "something"]))
    test = write(tmp_path, "test", WORDS[40:45])
    options = {"batch_size": 8, "calibration_fraction": 0.5}
    module = data(train, unlabelled_file=more, test_file=test, **options)
    assert module.needs_teacher
    assert not data(train).needs_teacher
    with pytest.warns(UserWarning, match=r"more\.txt: \d+ of 61 texts are left out: .* val"):
        module.setup("fit")
    texts, labels = module.splits["train"].texts, module.splits["train"].labels
    count = sum(label >= 0 for label in labels)
    assert set(labels[count:]) == {-100}
    assert not texts_of(module, "train") & texts_of(module, "val", "calibration")
    assert set(WORDS[45:]) | {"something"} <= set(texts[count:])
    assert not set(WORDS[40:45]) & set(texts), "test texts"
    counts = [labels[:count].count(label) for label in (0, 1)]
    weights = balanced_weights(module, 2)
    assert weights == pytest.approx([count / 2 / own for own in counts], abs=1e-5)
    module.teacher_probabilities = torch.rand(len(texts), 2)
    assert not module.needs_teacher
    seen = 0
    for batch in module.train_dataloader():
        assert torch.equal(batch["labels"] == -100, batch["row"] >= count)
        torch.testing.assert_close(batch["teacher"], module.teacher_probabilities[batch["row"]])
        seen += len(batch["row"])
    assert seen == len(texts)


# ------------------------------------------------------------------ the data that comes with dact


@pytest.mark.parametrize("max_depth", [0, 2])
def test_generated_splits_share_no_text(max_depth):
    sizes = {"num_train": 1000, "num_val": 500, "num_test": 500, "calibration_fraction": 0.5}
    module = CompositionalSentiment(**sizes, max_depth=max_depth)
    module.setup("fit")
    module.setup("test")
    assert {*module.splits} == {"train", "confidence", "val", "calibration", "test"}
    repeated = CompositionalSentiment(**sizes, max_depth=max_depth)
    repeated.setup("fit")
    assert repeated.splits["train"] == module.splits["train"]
    for one, other in combinations(module.splits, 2):
        assert not texts_of(module, one) & texts_of(module, other)
    counts = Counter(module.splits["test"].labels)
    assert max(counts.values()) - min(counts.values()) < 70
    examples, more = (
        CompositionalSentiment(num_train=number, max_depth=max_depth).examples("train").texts
        for number in (1000, 1100)
    )
    assert more[:1000] == examples
