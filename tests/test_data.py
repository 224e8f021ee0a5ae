"""Text from files: what is read, how it is batched, and what is refused before training starts."""

import json
import random
import warnings
from collections import Counter
from decimal import Decimal
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

from dact.data import (
    CompositionalSentiment,
    TextClassificationData,
    VaderSentiment,
    compositional,
    vader,
)
from dact.data.batching import LengthGroupedSampler, SharedLengthGroupedSampler
from dact.data.examples import text_key
from dact.data.labels import learn_class_names, reading_of, to_classes
from dact.data.tables import read_columns
from dact.data.tokenizers import load_tokenizer, word_tokenizer
from tests.tables import write_table

ROWS = [
    ("good, really", "pos"),
    ('a "quoted" word', "neg"),
    ("NA", "pos"),
    ("so so\nlines", "neu"),
    ("12", "neg"),
] * 8
ROWS += [("fine", "neu"), ("naïve 🙂 עברית", "pos")] * 4


def tokenizer():
    return word_tokenizer(["good", "really", "quoted", "word", "so", "lines", "fine", "a", "na"])


def write(folder, ending, rows=ROWS, columns=("text", "label"), name="data"):
    path = folder / f"{name}.{ending}"
    frame = pd.DataFrame(rows, columns=list(columns))
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "tsv":
        lines = ["\t".join(columns)] + [
            "\t".join(str(v).replace("\n", " ") for v in row) for row in rows
        ]
        path.write_text("\n".join(lines) + "\n")
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        path.write_text(
            "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
        )
    return str(path)


def data(file, **arguments):
    return TextClassificationData(file, tokenizer=tokenizer(), **arguments)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_reads_the_same(tmp_path, ending):
    module = data(write(tmp_path, ending), val_fraction=0.25)
    module.setup("fit")
    assert module.class_names == ["neg", "neu", "pos"]
    splits = [module.splits[split] for split in ("train", "val")]
    read = [pair for split in splits for pair in zip(split.texts, split.labels, strict=True)]
    expected = [
        (text.replace("\n", " ") if ending == "tsv" else text, module.class_names.index(label))
        for text, label in ROWS
    ]
    assert Counter(read) == Counter(expected)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_integer_labels_count_from_zero_and_names_may_replace_them(tmp_path, ending):
    rows = [(text, {"neg": 0, "neu": 1, "pos": 2}[label]) for text, label in ROWS]
    module = data(write(tmp_path, ending, rows))
    module.setup("fit")
    assert module.class_names == ["0", "1", "2"]
    named = data(write(tmp_path, ending, rows), class_names=["bad", "so-so", "good"])
    named.setup("fit")
    assert named.splits["train"].labels == module.splits["train"].labels
    stars = data(
        write(tmp_path, ending, [(text, label + 1) for text, label in rows], name="stars"),
        class_names=["1", "2", "3"],
    )
    stars.setup("fit")
    assert stars.splits["train"].labels == module.splits["train"].labels


def test_text_pairs_and_other_column_names(tmp_path):
    rows = [
        ("good", "word", "yes"),
        ("fine", "so so", "no"),
        ("good", "fine", "yes"),
        ("word", "good", "no"),
    ] * 5
    file = write(tmp_path, "csv", rows, ("one", "two", "same"))
    module = data(file, text_column="one", text_pair_column="two", label_column="same")
    module.setup("fit")
    item = module._encoded["train"][0]
    text = module.tokenizer.decode(item["input_ids"])
    assert (
        text == f"[CLS] {module.splits['train'].texts[0]} [CLS] {module.splits['train'].pairs[0]}"
    )


def test_batches_are_padded_to_their_longest_and_cut(tmp_path):
    rows = [("good " * n, "ab"[n % 2]) for n in range(1, 41)]
    module = data(write(tmp_path, "csv", rows), batch_size=4, max_length=20)
    module.setup("fit")
    for batch in module.train_dataloader():
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] <= 20
        assert batch["labels"].dtype == torch.int64


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=300), st.integers(1, 17), st.integers(1, 4)
)
def test_processes_share_the_batches_of_one_order(lengths, batch_size, processes):
    samplers = [
        SharedLengthGroupedSampler(lengths, batch_size, 0, processes, rank)
        for rank in range(processes)
    ]
    shares = [list(sampler) for sampler in samplers]
    whole = list(LengthGroupedSampler(lengths, batch_size * processes, 0))
    assert {len(share) for share in shares} == {-(-len(lengths) // processes)}
    assert len(samplers[0]) == len(shares[0])
    dealt = [row for turn in zip(*shares, strict=True) for row in turn]
    assert dealt[: len(whole)] == whole
    assert set(dealt) == set(whole)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=300), st.integers(1, 17), st.integers(0, 5)
)
def test_grouping_by_length_is_a_permutation_that_depends_on_seed_and_epoch_alone(
    lengths, batch_size, seed
):
    sampler = LengthGroupedSampler(lengths, batch_size, seed)
    first = list(sampler)
    assert sorted(first) == list(range(len(lengths)))
    assert list(LengthGroupedSampler(lengths, batch_size, seed)) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(len(lengths)))
    if len(lengths) > 50:
        assert list(sampler) != first


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
    rows = [("good " * generator.randint(1, 100), "ab"[n % 2]) for n in range(600)]
    file = write(tmp_path, "csv", rows)
    orders = []
    for size in (16, 32):
        module = data(file, val_file=str(file), batch_size=size, calibration_fraction=0.0)
        module.setup("fit")
        batches = list(module.val_dataloader())
        orders.append(torch.cat([batch["row"] for batch in batches]).tolist())
        masks = [batch["attention_mask"] for batch in batches]
        assert sum(mask.numel() for mask in masks) < 1.2 * sum(int(mask.sum()) for mask in masks)
        for batch in batches:  # what belongs to a row stays with it
            for row, label, mask in zip(
                batch["row"], batch["labels"], batch["attention_mask"], strict=True
            ):
                assert (module.class_names[label], mask.sum() - 1) == (
                    rows[row][1],
                    len(rows[row][0].split()),
                )
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(600))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_are_read_as_they_were_written(tmp_path, ending):
    columns = {
        "label": ["a", None],
        "score": [0.5, None],
        "exit_layer": [3, None],
        "reason": [None, 'no "text", 🙂'],
    }
    write_table(tmp_path / f"x.{ending}", columns)
    table = read_columns(str(tmp_path / f"x.{ending}"), dict.fromkeys(columns, "text_column"))
    assert list(table) == list(columns)
    assert table["reason"][1] == 'no "text", 🙂'


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [("x", "a")] * 3,
            ("body", "label"),
            "has no column 'text'; it has 'body', 'label': set text_column",
        ),
        (
            [("x", "a")] * 3,
            ("text", "class"),
            "has no column 'label'; it has 'text', 'class': set label_column",
        ),
        (
            [("x", "a"), ("  ", "b"), ("y", "a")],
            ("text", "label"),
            r"row 2 cannot be used .*empty text",
        ),
        (
            [("x", "a"), ("y", "")] * 2,
            ("text", "label"),
            "rows 2, 4 without a label: label or delete them",
        ),
        ([("", "")] * 3, ("text", "label"), "has no rows"),
        (
            [("x", 0), ("y", 0)],
            ("text", "label"),
            "every label is '0': a classifier needs examples of two classes",
        ),
        (
            [("x", "a"), ("y", "a")],
            ("text", "label"),
            "every label is 'a': a classifier needs examples of two classes",
        ),
        (
            [("x", "a"), ("y", "b"), ("z", "A")],
            ("text", "label"),
            "the labels 'A' and 'a' differ only in case",
        ),
        (
            [("x", "0"), ("y", "1"), ("z", "1.0"), ("w", "no")],
            ("text", "label"),
            "the labels '1' and '1.0' are the same number",
        ),
        ([("x", "a"), ("y", "a"), ("z", "b")], ("text", "label"), "class b has one example only"),
        ([("x", "-1"), ("y", "1")] * 3, ("text", "label"), "label outside the classes: '?-1'?"),
        ([("x", "0"), ("y", "2")] * 3, ("text", "label"), "class 1 of 0, 1, 2 has no example"),
        (
            [("x", "7"), ("y", "0")] * 2,
            ("text", "label"),
            "7 means 8 classes, but there are only 4 rows",
        ),
    ],
)
def test_wrong_files_are_refused(tmp_path, ending, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        data(write(tmp_path, ending, rows, columns)).setup("fit")


def test_missing_empty_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.csv"):
        data(str(tmp_path / "absent.csv")).setup("fit")
    with pytest.raises(ValueError, match=r"unknown ending '\.xls', expected one of \.csv"):
        data(str(tmp_path / "x.xls")).setup("fit")
    for name, content in (
        ("a.csv", ""),
        ("b.csv", "text,label\n"),
        ("c.jsonl", ""),
        ("d.parquet", ""),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="has no rows|cannot be read"):
            data(str(tmp_path / name)).setup("fit")
    with pytest.raises(ValueError, match="no train_file was given"):
        data(None).setup("fit")
    with pytest.raises(ValueError, match="no test_file was given"):
        data(write(tmp_path, "csv")).setup("test")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_blank_line_is_no_example(tmp_path, ending):
    rows = (
        [(f"good {n}", "pos") for n in range(8)]
        + [("", "")]
        + [(f"bad {n}", "neg") for n in range(8)]
        + [("", "")]
    )
    module = data(write(tmp_path, ending, rows))
    module.setup("fit")
    assert sum(len(module.splits[split]) for split in ("train", "val")) == 16
    assert module.class_names == ["neg", "pos"]


def test_labels_and_classes_of_other_splits_must_fit(tmp_path):
    train = write(tmp_path, "csv")
    other = write(tmp_path, "csv", [("good", "pos"), ("fine", "mixed")], name="val")
    with pytest.raises(
        ValueError,
        match=r"val\.csv: row 2 with a label outside the classes: 'mixed'.*neg, neu, pos",
    ):
        data(train, val_file=other).setup("fit")
    lacking = write(tmp_path, "csv", [("good", "pos"), ("fine", "neg")], name="val2")
    module = data(train, val_file=lacking)
    with pytest.warns(
        UserWarning,
        match=r"val2\.csv: class neu of neg, neu, pos has no example, so this file says",
    ):
        module.setup("fit")
    assert len(module.splits["val"]) == 2


def test_text_that_is_no_text_is_refused_with_its_rows(tmp_path):
    file = write(
        tmp_path, "jsonl", [("good", "a"), (5, "b"), ("x", "a"), (None, "b"), (["z"], "a")]
    )
    with pytest.raises(ValueError, match=r"rows 2, 4, 5 cannot be used .*not a string: '5'"):
        data(file).setup("fit")
    for ending, content in (
        ("csv", b"text,label\ngood,a\n\xff\xfe,b\n"),
        ("tsv", b"text\tlabel\ngood\ta\n\xff\tb\n"),
        ("jsonl", b'{"text": "good", "label": "a"}\n{"text": "\xff", "label": "b"}\n'),
    ):
        (tmp_path / f"latin.{ending}").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"row 2 cannot be used .*not valid UTF-8\): save the file in UTF-8"
        ):
            data(str(tmp_path / f"latin.{ending}")).setup("fit")


def test_prediction_gives_every_row_its_reason(tmp_path):
    rows = [("good",), (" ",), (5,), ("fine",), (None,)]
    module = data(None, predict_file=write(tmp_path, "jsonl", rows, ("text",)))
    with pytest.warns(UserWarning, match="rows 2, 3, 5 cannot be classified and get no prediction"):
        module.setup("predict")
    assert module.splits["predict"].reasons == [
        None,
        "empty text",
        "not a string: '5'",
        None,
        "no text",
    ]
    assert [item["row"] for item in module._encoded["predict"]] == [0, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"max_length": 1}, "max_length must be 3 or more, got 1"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \(0, 1\), got 1.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data("x.csv", **arguments)


def test_a_missing_tokenizer_is_one_clear_error():
    with pytest.raises(ValueError, match="no tokenizer at 'nobody/nothing'.*network"):
        load_tokenizer("nobody/nothing")


# ------------------------------------------------------------------ embedded data


def naive_label(text):
    """The class of a review, read from its words alone."""
    words = text.removesuffix(" .").split()
    clauses = " ".join(words)
    if clauses.split()[0] == "although" or " although " in clauses or " but " in clauses:
        left, right = clauses.split(" , ", 1) if " , " in clauses else (clauses, "")
        main = right if "although" in left.split() or right.startswith("but ") else left
    else:
        main = clauses
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
    text, label, depth = compositional.generate_review(random.Random(seed), max_depth)
    assert label == naive_label(text)
    assert 0 <= depth <= max_depth


def test_order_matters():
    grade = 2
    one = compositional.modify(compositional.modify(grade, "ironically"), "modestly")
    other = compositional.modify(compositional.modify(grade, "modestly"), "ironically")
    assert one != other


def test_embedded_data_is_the_same_everywhere_and_its_splits_differ():
    one, other = (
        CompositionalSentiment(num_train=300, num_val=50, num_test=50, seed=4) for _ in range(2)
    )
    for module in (one, other):
        module.setup("fit")
        module.setup("test")
    for split in ("train", "val", "test"):
        assert one.splits[split] == other.splits[split]
    assert one.splits["val"].texts[:50] != one.splits["test"].texts
    assert one.vocab_size == 42
    unknown = one.tokenizer.unk_token_id
    assert all(unknown not in item["input_ids"] for item in one._encoded["train"])
    assert {"depth", "labels", "input_ids", "attention_mask", "row"} == set(
        next(iter(one.val_dataloader()))
    )
    counts = Counter(one.splits["train"].labels)
    assert min(counts.values()) > 70


def test_wrong_sizes_of_embedded_data_are_refused():
    with pytest.raises(ValueError, match="num_train must be 3 or more, got 0"):
        CompositionalSentiment(num_train=0)
    with pytest.raises(ValueError, match="max_depth must be 0 or more, got -1"):
        CompositionalSentiment(max_depth=-1)


# ------------------------------------------------------------------ VADER


def test_without_the_archive_and_a_network_there_is_a_clear_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        ConnectionError, match=r"could not be fetched .*put the source distribution at"
    ):
        VaderSentiment(root=str(tmp_path)).setup("fit")
    assert list(tmp_path.iterdir()) == []


def test_another_archive_is_refused(tmp_path):
    module = VaderSentiment(root=str(tmp_path))
    module.archive.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"expected {vader.SHA256}: delete it"):
        module.setup("fit")


@pytest.mark.slow
def test_vader_is_fetched_read_and_split():
    module = VaderSentiment()
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    sizes = {split: len(examples) for split, examples in module.splits.items()}
    assert sizes == {"train": 17777, "val": 2963, "test": 2963}
    train, val, test = (
        {text_key(text) for text in module.splits[split].texts}
        for split in ("train", "val", "test")
    )
    assert not train & val | train & test | val & test
    tweets = VaderSentiment(corpora=["tweets"])
    tweets.setup("fit")
    assert tweets.splits["val"].texts == module.splits["val"].texts[: len(tweets.splits["val"])]
    small = VaderSentiment(num_train=2000)
    small.setup("fit")
    assert abs(len(small.splits["train"]) - 2000) <= 2
    assert small.splits["val"] == module.splits["val"]
    with pytest.raises(ValueError, match="num_train must be in 3 … 17776, got 17777"):
        VaderSentiment(num_train=17777).setup("fit")


def test_blanks_around_labels_do_not_count(tmp_path):
    rows = [
        (text, f" {label}" if number % 3 else f"{label} ")
        for number, (text, label) in enumerate(ROWS)
    ]
    module = data(write(tmp_path, "csv", rows), val_fraction=0.25)
    module.setup("fit")
    assert module.class_names == ["neg", "neu", "pos"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_file_without_rows_says_so(tmp_path, ending):
    with pytest.raises(ValueError, match="has no rows"):
        read_columns(str(write(tmp_path, ending, rows=[])), {"text": "text_column"})


def test_a_file_may_be_a_path(tmp_path):
    module = data(
        Path(write(tmp_path, "csv")), val_fraction=0.25, test_file=Path(write(tmp_path, "jsonl"))
    )
    module.setup("fit")
    module.setup("test")
    assert len(module.splits["test"]) == len(ROWS)


def test_without_a_training_file_the_classes_may_be_named(tmp_path):
    file = write(tmp_path, "csv")
    with pytest.raises(ValueError, match=r"no train_file was given, .* \(or class_names"):
        data(None, test_file=file).setup("test")
    data(None, test_file=file, class_names=["neg", "neu", "pos"]).setup("test")


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["1.0", "2.0", "3.0"], [1, 2, 3], [0, 1, 2]),
        (["01", "02", "03"], ["1", "3"], [0, 2]),
        (["3", "4", "5"], [4.0, 5.0], [1, 2]),
        (["3.5", "4.0"], [4.0, 4.0], [1, 1]),
        (["no", "yes"], [0.0, 1.0], [0, 1]),
        (["no", "yes"], ["0.0", "1.0"], [0, 1]),
        (["0", "1"], [Decimal(0), Decimal(1)], [0, 1]),
        (["0", "1"], [np.int64(1), np.int64(0)], [1, 0]),
        (["9007199254740992", "a"], ["9007199254740992"], [0]),
    ],
)
def test_a_label_is_the_class_of_its_number_however_it_is_written(names, labels, classes):
    assert to_classes(labels, names, reading_of(labels, names, "f"), "f") == classes


def test_numbers_that_may_be_names_or_positions_are_never_guessed():
    for names in (["1.0", "2.0", "3.0"], ["01", "02", "03"], ["1", "2", "3"]):
        with pytest.raises(
            ValueError, match="the labels 1, 2 may be names or positions of the classes"
        ):
            reading_of([1, 2], names, "f")
    for labels in (["1", "2"], ["1.0", "2.0"], ["1", "2", "1.0"]):
        assert to_classes(labels, ["1", "2", "3"], "positions", "f")[:2] == [1, 2], (
            "as integer_labels says"
        )
    for label, names in (
        ("001", ["1", "01"]),
        ("9007199254740993", ["9007199254740992", "9007199254740994"]),
    ):
        with pytest.raises(ValueError, match="outside the classes"):
            to_classes([label], names, "names", "f")
    assert learn_class_names([1.0, 2.0, 10.0], "f") == ["1.0", "2.0", "10.0"], (
        "integers count from 0"
    )
    with pytest.raises(ValueError, match="may be names or positions"):
        reading_of(["0", "1", "2"], ["02", "1", "0"], "f")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (float("nan"), "row 3 without a label"),
        (
            ["a", "b"],
            r"row 3 with a label that is neither a string nor a number: \['a', 'b'\]. Each text has exactly one",
        ),
        ({"a": 1}, "row 3 with a label that is neither a string nor a number"),
    ],
)
def test_what_is_no_label_is_no_class(tmp_path, label, message):
    with pytest.raises(ValueError, match=message):
        data(write(tmp_path, "jsonl", [("good", "pos"), ("so", "neg"), ("fine", label)])).setup(
            "fit"
        )


def test_classes_in_another_encoding_are_refused_and_not_merged(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        "text,label\ngood,positif\nso,négatif\nfine,nègatif\n".encode("latin-1")
    )
    with pytest.raises(
        ValueError,
        match="a.csv: rows 2, 3 with a label that is not valid UTF-8: save the file in UTF-8",
    ):
        data(str(tmp_path / "a.csv")).setup("fit")


def test_errors_count_the_rows_of_the_file(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n\n\n\ngood,pos\nfine,\nso,neg\n")
    with pytest.raises(ValueError, match="a.csv: row 5 without a label"):
        data(str(tmp_path / "a.csv")).setup("fit")
    (tmp_path / "a.jsonl").write_text('{"text": "good", "label": "pos"}\n' * 9 + "{\n")
    with pytest.raises(ValueError, match="a.jsonl: line 10 is no JSON"):
        data(str(tmp_path / "a.jsonl")).setup("fit")
    (tmp_path / "b.csv").write_bytes("text,label\ngood,pos\n".encode("utf-16"))
    with pytest.raises(ValueError, match="b.csv is in UTF-16: save it in UTF-8"):
        data(str(tmp_path / "b.csv")).setup("fit")


def test_labels_that_may_be_mistyped_columns_that_occur_twice_and_other_separators_are_said(
    tmp_path,
):
    def data(name, text):
        (tmp_path / name).write_text(text)
        return TextClassificationData(tmp_path / name, tokenizer=word_tokenizer(["a b c"]))

    rows = "".join(f"text {n} ,{label}\n" for n in range(60) for label in ("good", "bad"))
    made = data("typo.csv", f"text,label\n{rows}x,goood\ny,goood\n")
    with pytest.warns(
        UserWarning,
        match=r"typo\.csv: class goood has very few examples. If that is a mistyped label",
    ):
        made.setup("fit")
    assert made.describe_classes().startswith("3 classes: bad 54, good 54, goood")
    named = TextClassificationData(
        tmp_path / "typo.csv", tokenizer=word_tokenizer(["a"]), class_names=["good", "goood", "bad"]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*very few examples")
        named.setup("fit")
    with pytest.raises(ValueError, match=r"the column 'text' occurs 2 times: rename the others"):
        data("twice.csv", "text,label,text\na,good,b\n").setup("fit")
    with pytest.raises(
        ValueError, match=r"has no column 'text'; it has 'text;label': save it with commas between"
    ):
        data("semi.csv", "text;label\na;good\n").setup("fit")
    with pytest.raises(
        ValueError,
        match=r"it has ' Text', 'label': set text_column \(.*--data.text_column ' Text'\)",
    ):
        data("blank.csv", " Text,label\na,good\n").setup("fit")
    with pytest.raises(
        ValueError, match=r"class ugly of .* has no example. Add examples of it, or leave it out"
    ):
        TextClassificationData(
            tmp_path / "typo.csv",
            tokenizer=word_tokenizer(["a"]),
            class_names=["good", "goood", "bad", "ugly"],
        ).setup("fit")
