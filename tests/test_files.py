"""Files that are whole or not there, and that hold data alone."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dact import DACT
from dact.files import (
    read_checkpoint,
    read_json,
    read_tensors,
    replacing,
    replacing_folder,
    write_json,
    write_tensors,
)
from tests.conftest import tiny_model


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_an_error_leaves_the_old_file_or_folder(tmp_path):
    write_json(tmp_path / "a.json", {"x": np.int64(1)})
    with pytest.raises(UnicodeEncodeError), replacing(tmp_path / "a.json") as partial:
        partial.write_text("half \ud800")
    assert read_json(tmp_path / "a.json") == {"x": 1}
    for content in ("one", "two"):
        with replacing_folder(tmp_path / "folder") as partial:
            (partial / content).write_text(content)
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "folder") as partial:
        (partial / "three").touch() or (partial / "nowhere" / "four").touch()
    assert names(tmp_path) == ["a.json", "folder", "two"]


def test_tensors_come_back(tmp_path):
    shared = torch.arange(6).view(2, 3).bfloat16()
    tensors = {"a": shared, "b": shared.t(), "empty": torch.zeros(0, 3), "scalar": shared[0, 0]}
    tensors["whole"] = torch.arange(3)
    write_tensors(tmp_path / "x.safetensors", tensors, {"origin": "here"})
    found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"origin": "here"}
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_processes_that_write_to_one_file_have_temporary_files_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "answers.csv"
    with replacing(path) as first:
        first.write_text("first")
        monkeypatch.setattr(os, "getpid", lambda: 1)  # as in another process
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["answers.csv"]


def test_corrupted_files_are_refused_by_name(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"x\.safetensors is corrupted"):
        read_tensors(tmp_path / "x.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")


class Evil:
    """A pickle of it touches the file of its name."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("place", ["hyper_parameters", "callbacks"])
def test_a_checkpoint_cannot_run_code(tmp_path, place):
    path, evil = tmp_path / "evil.ckpt", Evil(tmp_path / "was_here")
    torch.save({"hyper_parameters": tiny_model().config(), "state_dict": {}, place: evil}, path)
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read"):
        DACT.load_from_checkpoint(path)
    assert not evil.marker.exists()
