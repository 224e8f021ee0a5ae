"""Text from files: what is read, how it is batched, and what is refused before training starts."""

import io
import json
import random
import re
from collections import Counter
from itertools import combinations

import datasets
import hypothesis.strategies as st
import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

from dact import DACT
from dact.data import (
    TextClassificationData,
    VaderSentiment,
    compositional,
    vader,
)
from dact.data.batching import LengthGroupedSampler
from dact.data.examples import text_key
from dact.data.files import read_rows, text_fault
from dact.data.tokenizers import word_tokenizer
from dact.encoders import TransformerEncoder
from tests.tables import write_table

ROWS = [
    ("good, really", "pos"),
    ('a "quoted" word', "neg"),
    ("NA", "pos"),
    ("so so\nlines", "neu"),
    ("12", "neg"),
    ("fine", "neu"),
    ("naïve 🙂 עברית", "pos"),
] * 4
TEXT = {"text": "text_column"}


def tokenizer():
    return word_tokenizer(["good", "really", "quoted", "word", "so", "lines", "fine", "a", "na"])


def write(folder, ending, rows=ROWS, columns=("text", "label"), name="data"):
    path = folder / f"{name}.{ending}"
    if ending == "tsv":
        rows = [[str(value).replace("\n", " ") for value in row] for row in rows]
        path.write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]))
    elif ending in ("json", "jsonl"):
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        write_table(path, pd.DataFrame(rows, columns=list(columns)))
    return str(path)


def data(file, **arguments):
    given = {"confidence_fraction": 0.0, **arguments}
    return TextClassificationData(file, tokenizer=tokenizer(), **given)


def fitted(file, **arguments):
    module = data(file, **arguments)
    module.setup("fit")
    return module


def read(module):
    """All texts of training and validation, with the names of their classes."""
    splits = [module.splits[split] for split in ("train", "val")]
    pairs = [pair for split in splits for pair in zip(split.texts, split.labels, strict=True)]
    return Counter((text, module.class_names[label]) for text, label in pairs)


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_reads_the_same(tmp_path, ending):
    module = fitted(write(tmp_path, ending), val_fraction=0.25)
    assert module.class_names == ["neg", "neu", "pos"]
    whole = [(text.replace("\n", " ") if ending == "tsv" else text, label) for text, label in ROWS]
    assert read(module) == Counter(whole)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_separator_is_guessed_or_given(tmp_path, delimiter):
    table = pd.DataFrame(ROWS, columns=["text", "label"])
    table.to_csv(tmp_path / "a.csv", index=False, sep=delimiter, encoding="utf-8-sig")
    if delimiter == "|":
        assert read(fitted(tmp_path / "a.csv", delimiter="|")) == Counter(ROWS)
        return
    with pytest.warns(UserWarning, match=rf"a\.csv: .* separated by {re.escape(repr(delimiter))}"):
        assert read(fitted(tmp_path / "a.csv")) == Counter(ROWS)


def test_a_list_of_records_and_blank_lines_are_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": None}]))
    assert [*read_rows(str(tmp_path / "a.json"), TEXT)] == [["a"], [None]]
    (tmp_path / "a.csv").write_text("text,label\n\ngood,b\nso,b\n\nfine,c\nwell,c\n,\n\n")
    assert read(fitted(tmp_path / "a.csv")).total() == 4


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_texts_to_predict_may_come_one_a_line(tmp_path, monkeypatch, source):
    content = b"\xef\xbb\xbf" + "good so\r\n\nnaïve 🙂\n".encode() + b"\xff fine\nlast"
    (tmp_path / "texts.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    rows = [*read_rows(str(tmp_path / "texts.txt") if source == "file" else "-", TEXT)]
    assert [text for (text,) in rows[:3]] == ["good so", "", "naïve 🙂"]
    faults = [None, "empty text", None, "not valid UTF-8", None]
    assert [text_fault(row) for row in rows] == faults


def test_a_trainer_predicts_the_texts_of_a_file(tmp_path):
    file = write(tmp_path, "csv", [[text] for text, _ in ROWS], ["text"], "new")
    module = data(None, predict_file=file, batch_size=4)
    model = DACT(encoder=TransformerEncoder(14, 2, 8, 2), output_dimension=2).eval()
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    found = torch.cat([batch.probabilities for batch in trainer.predict(model, module)])
    assert len(found) == len(ROWS)
    with torch.no_grad():
        answers = [model.early_exit(batch) for batch in module.predict_dataloader()]
    assert torch.equal(found, torch.cat([answer.probabilities for answer in answers]))


def test_a_data_set_stands_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"text {number}" for number in range(60)]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": texts, "label": [row % 2 for row in range(60)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path / "reviews #1"
    folder.mkdir()
    table.select(range(40)).to_parquet(folder / "train.parquet")
    table.select(range(40, 60)).to_parquet(folder / "test.parquet")
    module = fitted(f"dataset:{folder}#train[:30]", test_file=f"dataset:{folder}#test")
    module.setup("test")
    assert module.class_names == ["no", "yes"]
    assert len(module.splits["train"]) + len(module.splits["val"]) == 30
    assert module.splits["test"].texts == texts[40:]
    assert module.splits["test"].labels == [0, 1] * 10
    with pytest.raises(ValueError, match=r"expected 'dataset:NAME#SPLIT'"):
        data(f"dataset:{folder.parent}/x").setup("fit")
    with pytest.raises(ValueError, match="other"):
        data(f"dataset:{folder}#other").setup("fit")


def test_text_pairs_and_other_column_names(tmp_path):
    rows = [("good", "word", "yes"), ("fine", "so so", "no"), ("a", "so", "yes"), ("a", "a", "no")]
    file = write(tmp_path, "csv", rows * 5, ("one", "two", "same"))
    module = fitted(file, text_column="one", text_pair_column="two", label_column="same")
    (row, *_), split = module._encoded["train"], module.splits["train"]
    text = module.tokenizer.decode(row["input_ids"])
    assert text == f"[CLS] {split.texts[0]} [CLS] {split.pairs[0]}"


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 2, 10], ["1", "2", "10"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        ([1.0, 10.0, 2.0], ["1", "2", "10"]),
        (["b ", " a", "b", "B"], ["B", "a", "b"]),
    ],
)
def test_the_classes_are_the_sorted_distinct_labels(tmp_path, labels, names):
    rows = [(f"text {row}", label) for row, label in enumerate(labels * 4)]
    assert fitted(write(tmp_path, "jsonl", rows)).class_names == names


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["bad", "good"], ["good", "bad", "good"], [1, 0, 1]),
        (["bad", "good"], [1, "0"], [1, 0]),
        (["1", "2", "3"], [3.0, "1.0"], [2, 0]),
        (["1", "2", "3"], [0, 1], None),
    ],
)
def test_labels_are_names_or_positions_of_named_classes(tmp_path, names, labels, classes):
    file = write(tmp_path, "jsonl", [(f"text {row}", label) for row, label in enumerate(labels)])
    module = data(None, test_file=file, class_names=names)
    if classes is not None:
        assert module.examples("test").labels == classes
        return
    with pytest.raises(ValueError, match="rows? 1.*outside the classes.*1, 2, 3"):
        module.examples("test")


def test_without_a_training_file_the_classes_must_be_named(tmp_path):
    with pytest.raises(ValueError, match="no train_file was given, or class_names"):
        data(None, test_file=write(tmp_path, "csv")).setup("test")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("x", "a")], ("body", "label"), "no column 'text'; it has 'body', 'label': set text_col"),
        ([("x", "a")], ("text", "Lable"), "no column 'label'.* set label_column, perhaps 'Lable'"),
        (
            [("x", "a"), (" ", "b"), ("y", "")] * 9,
            None,
            r"rows 3, 6, .*empty text.* 4, 7, .*no lab",
        ),
        ([], None, "has no rows"),
        ([("x", 0), ("y", 0)], None, "every label is '0': a classifier needs two classes"),
        ([("x", "a"), ("z", "b"), ("y", "b")], None, "class a has one text only"),
    ],
)
def test_wrong_files_are_refused(tmp_path, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        data(write(tmp_path, "csv", rows, columns or ("text", "label"))).setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xls", b"", r"unknown ending '\.xls', expected one of \.csv"),
        ("a.txt", b"one\ntwo\n", "a.txt has one text a line, and no columns text, label"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b'{"text": "good", "label": "pos"}\n{\n', "line 2 is not valid JSON"),
        ("a.parquet", b"nothing", "Parquet"),
        ("a.csv", b"text,label\ngood, a film,pos\n", "row 2: 3 values are too many for 2 columns"),
        ("a.csv", b'text,label\na,b\n"good,pos\nso,neg\n', "row 3: unexpected end of data"),
        ("a.csv", b"text,label\ngood,\xe4", "rows 2 .*UTF-8.* save the file in UTF-8"),
        ("a.jsonl", b'{"text": 5, "label": 1}\n', "rows 1 .not a text but int"),
    ],
)
def test_files_that_cannot_be_read_are_one_line_with_the_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data(str(tmp_path / name)).setup("fit")
    assert "\n" not in str(caught.value)


def test_absent_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        data(write(tmp_path, "csv"), test_file=tmp_path / "absent.csv").setup("fit")
    with pytest.raises(ValueError, match="no test_file was given"):
        data(write(tmp_path, "csv")).setup("test")


def test_unusable_rows_are_left_out_if_that_is_asked_for(tmp_path):
    rows = [*ROWS, (" ", "pos"), ("without a label", None), (None, "neg")] * 30
    module = data(write(tmp_path, "jsonl", rows), drop_unusable=True)
    with pytest.warns(UserWarning, match=r"90 unusable rows .*rows 29, .* and 10 more \(empty"):
        module.setup("fit")
    assert read(module) == Counter(ROWS * 30)
    # In another encoding, the rows with an accent are not unusable: the file is.
    (tmp_path / "latin.csv").write_bytes("text,label\ngood,pos\nnaïve,neg\n".encode("cp1252") * 9)
    with pytest.raises(ValueError, match=r"latin\.csv .*rows 3, .*save the file in UTF-8"):
        data(str(tmp_path / "latin.csv"), drop_unusable=True).setup("fit")


def test_other_files_have_the_classes_of_training(tmp_path):
    train, other = write(tmp_path, "csv"), [("good", "pos"), ("well", "mixed")]
    with pytest.raises(ValueError, match=r"val\.csv: row 3 .*outside.*'mixed'.*neg, neu, pos"):
        data(train, val_file=write(tmp_path, "csv", other, name="val")).setup("fit")
    lacking = write(tmp_path, "csv", [("good", "pos"), ("well", "neg")], name="val")
    assert len(fitted(train, val_file=lacking).splits["val"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \(0, 1\), got 1.0"),
        ({"calibration_fraction": 0.5, "calibration_file": "x.csv"}, "not both"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data("x.csv", **arguments)


# ------------------------------------------------------------------ batches


LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=300)


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 17), st.integers(1, 4))
def test_processes_share_the_batches_of_one_order(lengths, size, processes):
    ranks = range(processes)
    shares = [list(LengthGroupedSampler(lengths, size, 0, processes, rank)) for rank in ranks]
    whole = list(LengthGroupedSampler(lengths, size * processes, 0))
    assert {len(share) for share in shares} == {-(-len(lengths) // processes)}
    dealt = [row for turn in zip(*shares, strict=True) for row in turn]
    assert dealt[: len(whole)] == whole
    assert set(dealt) == set(whole)


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 17), st.integers(0, 5))
def test_grouping_by_length_is_a_permutation_by_seed_and_epoch(lengths, batch_size, seed):
    sampler = LengthGroupedSampler(lengths, batch_size, seed)
    first = list(sampler)
    assert list(LengthGroupedSampler(lengths, batch_size, seed)) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first) == list(range(len(lengths)))
    assert list(sampler) != first or len(lengths) <= 50


def test_grouping_by_length_saves_padding():
    generator = random.Random(0)
    lengths = [generator.randint(1, 100) for _ in range(2000)]

    def padded(order):
        batches = [order[i : i + 16] for i in range(0, len(order), 16)]
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    grouped = padded(list(LengthGroupedSampler(lengths, 16, 0)))
    assert grouped < 1.1 * sum(lengths) < 0.7 * padded(list(range(2000)))


def test_validation_needs_little_padding_and_has_one_order_whatever_the_batch_size(tmp_path):
    generator = random.Random(0)
    rows = [(f"{n} " + "good " * generator.randint(1, 100), "ab"[n % 2]) for n in range(600)]
    file = write(tmp_path, "csv", rows)
    train = write(tmp_path, "csv", name="train", rows=[("so", "a"), ("word", "b")])
    orders = []
    for size in (16, 32):
        module = fitted(train, val_file=file, batch_size=size)
        batches = list(module.val_dataloader())
        orders.append(torch.cat([batch["row"] for batch in batches]).tolist())
        masks = [batch["attention_mask"] for batch in batches]
        assert sum(mask.numel() for mask in masks) < 1.2 * sum(int(mask.sum()) for mask in masks)
        for batch in batches:
            # What belongs to a row stays with it.
            columns = (batch[name] for name in ("row", "labels", "attention_mask"))
            for row, label, mask in zip(*columns, strict=True):
                assert module.class_names[label] == rows[row][1]
                assert mask.sum() - 1 == len(rows[row][0].split())
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(600))


# ------------------------------------------------------------------ embedded data


def naive_label(text):
    """The class of a review, read from its words alone."""
    main = text.removesuffix(" .")
    if main.startswith("although ") or " although " in main or " but " in main:
        left, _, right = main.partition(" , ")
        main = right if "although" in left.split() or right.startswith("but ") else left
    tokens = main.split()
    adjectives = {word: grade for grade, words in enumerate(compositional.GRADES) for word in words}
    place = next(i for i, word in enumerate(tokens) if word in adjectives)
    grade = adjectives[tokens[place]]
    for word in reversed(tokens[:place]):
        if word in compositional.MODIFIERS:
            grade = compositional.modify(grade, word)
    return grade


@given(st.integers(0, 10**6), st.integers(0, 6))
def test_the_class_of_a_review_can_be_read_from_its_words(seed, max_depth):
    text, label = compositional.generate_review(random.Random(seed), max_depth)
    assert label == naive_label(text)


# ------------------------------------------------------------------ VADER


def test_without_the_archive_and_a_network_there_is_a_clear_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    message = r"could not be fetched .*put the source distribution at"
    with pytest.raises(ConnectionError, match=message):
        VaderSentiment(root=str(tmp_path)).setup("fit")
    assert list(tmp_path.iterdir()) == []


def test_another_archive_is_refused(tmp_path):
    module = VaderSentiment(root=str(tmp_path))
    module.archive.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"SHA-256 {vader.SHA256}: delete it"):
        module.setup("fit")


@pytest.mark.slow
def test_vader_is_fetched_read_and_split():
    module = VaderSentiment()
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    sizes = {split: len(examples) for split, examples in module.splits.items()}
    assert sizes == {"train": 16907, "confidence": 870, "val": 2963, "test": 2963}
    keys = {split: {*map(text_key, part.texts)} for split, part in module.splits.items()}
    for one, other in combinations(keys, 2):
        assert not keys[one] & keys[other]
    tweets = VaderSentiment(corpora=["tweets"])
    tweets.setup("fit")
    assert tweets.splits["val"].texts == module.splits["val"].texts[: len(tweets.splits["val"])]
    small = VaderSentiment(num_train=2000)
    small.setup("fit")
    assert abs(len(small.splits["train"]) + len(small.splits["confidence"]) - 2000) <= 2
    assert small.splits["val"] == module.splits["val"]
