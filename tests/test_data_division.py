"""How examples are divided into splits: by class, by text, and with labels that mean the same in
every file."""

import warnings
from collections import Counter

import hypothesis.strategies as st
import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given

from dact.cli.main import balanced_weights
from dact.data import CompositionalSentiment, TextClassificationData, VaderSentiment, vader
from dact.data.examples import Examples, stratified_split, text_key
from dact.data.tokenizers import word_tokenizer
from tests.tables import write_table

WORDS = [f"word{number}" for number in range(60)]


pytestmark = pytest.mark.filterwarnings("ignore:.*copies|.*training data as well|.*no example")


def data(train=None, **arguments):
    return TextClassificationData(train, tokenizer=word_tokenizer(WORDS), **arguments)


def write(folder, name, texts, labels=None):
    path = folder / f"{name}.csv"
    write_table(path, {"text": list(texts)} | ({} if labels is None else {"label": list(labels)}))
    return str(path)


def texts_of(module, *splits):
    return {text_key(text) for split in splits for text in module.splits[split].texts}


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=200),
    st.sampled_from([0.1, 0.25, 0.5, 0.99]),
    st.integers(0, 3),
)
def test_a_division_is_complete_and_keeps_copies_together(rows, fraction, seed):
    labels, keys = zip(*rows, strict=True)
    kept, aside = stratified_split(labels, fraction, seed, keys)
    assert sorted(kept + aside) == list(range(len(labels)))
    assert not {keys[row] for row in kept} & {keys[row] for row in aside}
    assert (kept, aside) == stratified_split(labels, fraction, seed, keys)
    first = {}  # the class of a text is that of its first copy
    for label, key in rows:
        first.setdefault(key, label)
    for label in set(first.values()):
        texts = {key for key, own in first.items() if own == label}
        for side in (kept, aside):
            assert texts & {keys[row] for row in side} or len(texts) == 1
    allowed = set(list(first)[::2])
    _, aside = stratified_split(labels, fraction, seed, keys, stay=set(first) - allowed)
    assert {keys[row] for row in aside} <= allowed


@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=200),
    st.sampled_from([0.1, 0.25, 0.5]),
    st.integers(0, 3),
)
def test_without_copies_each_class_gives_its_share(labels, fraction, seed):
    _, aside = stratified_split(labels, fraction, seed)
    counts = Counter(labels)
    for label, count in counts.items():
        given_up = sum(labels[row] == label for row in aside)
        assert given_up == 0 if count == 1 else 1 <= given_up < count
        assert abs(given_up - fraction * count) <= len(counts)
    if min(counts.values()) * fraction > 1:
        assert len(aside) == round(fraction * len(labels))


def test_a_file_with_every_text_twice_shares_none_between_training_and_validation(tmp_path):
    texts = [*WORDS, *(f"  {word.upper()} " for word in WORDS)]
    file = write(tmp_path, "train", texts, ["a", "b", "c"] * 40)
    module = data(file, val_fraction=0.25, calibration_fraction=0.5)
    with pytest.warns(
        UserWarning, match=r"train\.csv: 50% of the examples are copies of another one"
    ):
        module.setup("fit")
    assert not texts_of(module, "train") & texts_of(module, "val", "calibration")
    assert not texts_of(module, "val") & texts_of(module, "calibration")
    assert sum(map(len, module.splits.values())) == 120
    assert len(module.splits["val"]) + len(module.splits["calibration"]) == 30


def test_copies_between_given_files_are_counted(tmp_path):
    train = write(tmp_path, "train", WORDS[:40], ["a", "b"] * 20)
    val = write(tmp_path, "val", WORDS[30:50], ["a", "b"] * 10)
    test = write(tmp_path, "test", WORDS[50:], ["a", "b"] * 5)
    module = data(train, val_file=val, test_file=test)
    with pytest.warns(UserWarning, match="50% of the val texts are in the training data as well"):
        module.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.setup("test")
    module = data(train, val_file=test, calibration_file=test, test_file=test)
    with pytest.warns(
        UserWarning, match="100% of the calibration texts are in the validation data as well"
    ):
        module.setup("fit")
    with pytest.warns(
        UserWarning, match="100% of the test texts are in the calibration data as well"
    ):
        module.setup("test")


def test_what_calibrates_is_in_no_training_even_if_the_validation_file_is(tmp_path):
    train = write(tmp_path, "train", WORDS[:40], ["a", "b"] * 20)
    val = write(tmp_path, "val", WORDS[20:60], ["a", "b"] * 20)
    fitted, calibrated = (data(train, val_file=val, calibration_fraction=0.25) for _ in range(2))
    fitted.setup("fit")
    calibrated.setup("validate")
    assert fitted.splits["calibration"] == calibrated.splits["calibration"]
    assert len(fitted.splits["calibration"]) == 10
    assert not texts_of(fitted, "calibration") & texts_of(fitted, "train", "val")
    with pytest.raises(
        ValueError, match=r"calibration_fraction=0.25 of 40 validation examples sets none aside"
    ):
        data(val, val_file=val, calibration_fraction=0.25).setup("fit")


def test_validation_is_never_left_empty(tmp_path):
    train = write(tmp_path, "train", WORDS, ["a", "b", "c"] * 20)
    module = data(train, val_fraction=0.1, calibration_fraction=0.99)
    module.setup("fit")
    assert Counter(module.splits["val"].labels) == {0: 1, 1: 1, 2: 1}
    with pytest.raises(
        ValueError, match="no class has two distinct texts, so no example is left for validation"
    ):
        data(write(tmp_path, "same", ["word1", "word2"] * 9, ["a", "b"] * 9)).setup("fit")
    with pytest.raises(ValueError, match=r"calibration_fraction must be in \[0, 1\), got 1"):
        data(train, calibration_fraction=1)


def test_a_class_of_one_copied_text_stays_in_training(tmp_path):
    file = write(
        tmp_path, "train", [*WORDS[:20], "same", "same", "same"], ["a", "b"] * 10 + ["c"] * 3
    )
    module = data(file)
    with pytest.warns(
        UserWarning, match="class c has copies of one text only, which stay in training"
    ):
        module.setup("fit")
    assert Counter(module.splits["train"].labels)[2] == 3


def test_a_calibration_file_is_what_calibrates(tmp_path):
    train = write(tmp_path, "train", WORDS[:40], ["a", "b"] * 20)
    other = write(tmp_path, "other", WORDS[40:], ["b", "a"] * 10)
    module = data(train, calibration_file=other)
    for stage in ("fit", "validate"):
        module.setup(stage)
        assert module.splits["calibration"].texts == WORDS[40:]
        batches = list(module.calibration_dataloader())  # neighbours have similar lengths
        labels, rows = (torch.cat([batch[name] for batch in batches]) for name in ("labels", "row"))
        assert labels[rows.argsort()].tolist() == [1, 0] * 10
    assert data(train).calibration_dataloader() is None
    with pytest.raises(
        ValueError, match="give a calibration_file or a calibration_fraction, not both"
    ):
        data(train, calibration_file=other, calibration_fraction=0.5)
    absent = data(train, calibration_file=str(tmp_path / "absent.csv"))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.csv"):
        absent.setup("fit")


# ------------------------------------------------------------------ labels


def test_integer_labels_mean_in_every_file_what_they_mean_in_training(tmp_path):
    """Classes "1", "2", "3": labels 1 and 2 of a test file are positions where the training file
    counts from 0."""
    counted = write(tmp_path, "counted", WORDS, ["0", "1", "2"] * 20)
    named = write(tmp_path, "named", WORDS, ["1", "2", "3"] * 20)
    test = write(tmp_path, "test", WORDS[:2], ["1", "2"])
    for file, expected in ((counted, [1, 2]), (named, [0, 1])):
        module = data(file, test_file=test, class_names=["1", "2", "3"])
        module.setup("test")
        assert module.splits["test"].labels == expected
        module.setup("fit")
        assert Counter(module.splits["train"].labels) == {0: 18, 1: 18, 2: 18}


def test_integer_labels_that_may_be_names_or_positions_are_refused(tmp_path):
    test = write(tmp_path, "test", WORDS[:2], ["1", "2"])
    with pytest.raises(
        ValueError,
        match=r"labels 1, 2 may be names or positions of the classes 1, 2, 3: say which by",
    ):
        data(test_file=test, class_names=["1", "2", "3"]).setup("test")
    with pytest.raises(ValueError, match="labels 0, 1 may be names or positions"):
        data(write(tmp_path, "train", WORDS, ["0", "1"] * 30), class_names=["1", "0"]).setup("fit")
    for reading, expected in (("names", [0, 1]), ("positions", [1, 2])):
        module = data(test_file=test, class_names=["1", "2", "3"], integer_labels=reading)
        module.setup("test")
        assert module.splits["test"].labels == expected
    with pytest.raises(
        ValueError, match="integer_labels must be one of 'names', 'positions', got 'yes'"
    ):
        data(integer_labels="yes")


def test_where_strings_are_learned_integers_are_no_labels(tmp_path):
    train = write(tmp_path, "train", WORDS, ["good", "bad"] * 30)
    module = data(train, test_file=write(tmp_path, "test", WORDS[:2], ["0", "1"]))
    with pytest.raises(
        ValueError,
        match=r"test\.csv: rows 1, 2 with a label outside the classes: '0'.* are bad, good",
    ):
        module.setup("test")


def test_labels_that_count_from_elsewhere_say_how_to_name_the_classes(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"outside the classes: '-1'.* 0, 1. Correct the labels; or, for other classes, give them",
    ):
        data(write(tmp_path, "train", WORDS, ["-1", "1"] * 30)).setup("fit")
    named = data(write(tmp_path, "train", WORDS, ["-1", "1"] * 30), class_names=["-1", "1"])
    named.setup("fit")
    with pytest.raises(ValueError, match="class_names must be distinct, got bad, bad"):
        data(class_names=["bad", "bad"])


@pytest.mark.parametrize(
    ("ending", "mark", "what"), [("csv", ",", "commas"), ("tsv", "\t", "tabs")]
)
def test_rows_with_more_values_than_columns_are_refused(tmp_path, ending, mark, what):
    path = tmp_path / f"train.{ending}"
    path.write_text(
        f"text{mark}label\n"
        + f"good{mark} a nice film{mark}pos\nbad{mark} an awful film{mark}neg\n" * 20
    )
    with pytest.raises(
        ValueError,
        match=f"row 1 has 3 values, and the header has 2 columns: put texts that hold {what}",
    ):
        data(str(path)).setup("fit")


# ------------------------------------------------------------------ texts without labels


def test_texts_without_labels_are_for_a_teacher_alone(tmp_path):
    train = write(tmp_path, "train", WORDS[:40], ["a", "b"] * 20)
    (tmp_path / "more.txt").write_text("\n".join([*WORDS[30:], "", "something"]))
    module = data(
        train, unlabelled_file=str(tmp_path / "more.txt"), batch_size=8, calibration_fraction=0.5
    )
    assert module.needs_teacher
    assert not data(train).needs_teacher
    with pytest.warns(
        UserWarning, match=r"more\.txt: 1 of 32 texts cannot be used, and \d are in validation"
    ):
        module.setup("fit")
    texts, labels = module.splits["train"].texts, module.splits["train"].labels
    count = sum(label >= 0 for label in labels)
    assert count == 36
    assert set(labels[count:]) == {-100}
    assert not texts_of(module, "train") & texts_of(module, "val", "calibration")
    assert set(WORDS[40:]) | {"something"} <= set(texts[count:])
    assert balanced_weights(module, 2) == [1.0, 1.0]
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
    module = CompositionalSentiment(num_train=2000, num_val=500, num_test=500, max_depth=max_depth)
    module.setup("fit")
    module.setup("test")
    train, val, test = (set(module.splits[split].texts) for split in ("train", "val", "test"))
    assert not train & test
    assert not train & val
    assert not val & test
    counts = Counter(module.splits["test"].labels)
    assert max(counts.values()) - min(counts.values()) < 70
    larger = CompositionalSentiment(num_train=2100, max_depth=max_depth)
    assert larger.examples("train").texts[:2000] == module.splits["train"].texts


def corpora():
    """Four small corpora; the second and the third have a text of the first."""
    made = {}
    for number, corpus in enumerate(vader.CORPORA):
        texts = [f"{corpus} {row // 2}" for row in range(80)] + ["tweets 3"] * (number in (1, 2))
        made[corpus] = Examples(texts, labels=[row // 2 % 3 for row in range(len(texts))])
    return made


def test_each_corpus_has_a_division_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(vader, "read_archive", lambda archive: corpora())
    monkeypatch.setattr(vader, "fetch", lambda archive: None)

    def splits(**arguments):
        module = VaderSentiment(word_tokenizer(WORDS), root=str(tmp_path), **arguments)
        module.setup("fit")
        module.setup("test")
        return {split: module.splits[split].texts for split in ("train", "val", "test")}

    whole, parts = splits(), [splits(corpora=[corpus]) for corpus in vader.CORPORA]
    for split, texts in whole.items():
        assert texts == [text for part in parts for text in part[split]]
    assert sum(map(len, whole.values())) == 322
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(whole[one]) & set(whole[other])
    for split, share in (("train", 0.75), ("val", 0.125), ("test", 0.125)):
        assert len(whole[split]) / 322 == pytest.approx(share, abs=0.03)
    assert splits(split=0, seed=5) == whole == splits(seed=0)
    assert splits(split=1) == splits(seed=1) != whole
    with pytest.raises(
        ValueError, match=r"must be some of tweets, film, product, newspaper, got \[\]"
    ):
        VaderSentiment(corpora=[])


def test_a_fit_reads_calibration_examples_that_it_never_sees():
    class Seen(pl.LightningModule):
        def training_step(self, batch, index):
            rows.update(batch["row"].tolist())
            return torch.zeros(1, requires_grad=True).sum()

        def configure_optimizers(self):
            return None

    rows = set()
    module = CompositionalSentiment(num_train=50, num_val=60, num_test=10, calibration_fraction=0.5)
    pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
        Seen(), module
    )
    assert rows == set(range(50))
    assert len(module.splits["val"]) == len(module.splits["calibration"]) == 30
    assert not texts_of(module, "calibration") & texts_of(module, "train", "val")
