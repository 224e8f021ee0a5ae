"""The server, over real HTTP against the real process: answers, refusals, load, and an orderly
end."""

import contextlib
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from dact import TextClassifier
from dact.data import CompositionalSentiment
from dact.exporting import export
from dact.server import serve
from tests.commands import environment
from tests.conftest import free_port, tiny_model

START = 240  # seconds: imports take several, and machines are busy
KEY = {"X-API-Key": "secret"}
JSON = {"Content-Type": "application/json", **KEY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model whose examples leave at several layers."""
    torch.manual_seed(0)
    data = CompositionalSentiment(num_train=10, num_val=10, num_test=10)
    options = {"vocab": data.vocab_size, "class_names": data.class_names, "halting_margin": 0.6}
    model = tiny_model(layers=3, **options)
    folder = tmp_path_factory.mktemp("fitted") / "model"
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return folder


class Server:
    """A server in a process of its own, with a key and an empty working folder."""

    def __init__(self, model, where, port=None):
        self.port = port or free_port()
        self.where, self.log = where, where.with_suffix(".log")
        where.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "dact", "serve", "--model", model, "--port", self.port]
        self.process = subprocess.Popen(
            [*map(str, command)],
            cwd=where,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment(OMP_NUM_THREADS="1", LIT_SERVER_API_KEY=KEY["X-API-Key"]),
        )

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(self, method, path, body=None, headers=JSON, connection=None):
        """(status, content) of one request."""
        connection = connection or self.connection()
        body = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read().decode()
        return response.status, json.loads(content) if content.startswith(("{", "[")) else content

    def predict(self, body, **arguments):
        return self.ask("POST", "/predict", body, **arguments)

    def answers(self, texts, **arguments):
        status, content = self.predict({"texts": texts}, **arguments)
        assert status == 200
        return content["predictions"]

    def wait(self):
        end = time.monotonic() + START
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/health")[0] == 200:
                    return self
            time.sleep(0.2)
        raise AssertionError(f"not ready after {START} s: {self.log.read_text()}")

    def stop(self):
        """SIGTERM, the exit status, and no process left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert "resource_tracker" not in self.log.read_text(), "of a semaphore that is freed"
        return status

    def kill(self):
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def servers():
    """All servers of this module, of which the last may still run."""
    servers = []
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def server(folder, servers, tmp_path_factory):
    """The last server, since a start takes seconds, or a new one where a test has ended that."""
    if not servers or servers[-1].process.poll() is not None:
        servers.append(Server(folder, tmp_path_factory.mktemp("server") / "cwd"))
        servers[-1].wait()
    return servers[-1]


@pytest.fixture(scope="module")
def offline(folder):
    return TextClassifier.from_pretrained(folder)


def reviews(number, seed=1):
    """Distinct texts: each ends in four words of its own."""
    data = CompositionalSentiment(num_train=3, num_val=3, num_test=number, seed=seed)
    words = ("the", "screen", "sound", "price", "battery", "camera", "display", "phone")
    ends = itertools.product(words, repeat=4)
    return [f"{text} {' '.join(next(ends))}" for text in data.examples("test").texts]


def same(got, expected):
    """Whether answers of the server are those of TextClassifier; scores may differ in rounding, by
    the batch."""
    return len(got) == len(expected) and all(
        (one["label"], one["exit_layer"]) == (other.label, other.exit_layer)
        and abs(one["score"] - other.score) < 1e-5
        for one, other in zip(got, expected, strict=True)
    )


def test_answers_are_those_of_the_text_classifier(server, offline):
    texts = reviews(50)
    expected = offline(texts)
    assert len({one.exit_layer for one in expected}) > 1
    assert same(server.answers(texts), expected)
    status, content = server.predict({"text": texts[7]})
    assert status == 200
    assert same(content["predictions"], expected[7:8])
    answers = server.answers(["good", ["good", "bad"], " \n", "bad"])
    nothing = dict.fromkeys(["label", "score", "exit_layer", "labels"])
    assert answers.pop(2) == {**nothing, "reason": "empty text"}
    assert same(answers, offline(["good", ("good", "bad"), "bad"]))


def test_health_and_info_say_what_is_served(server):
    assert server.ask("GET", "/health") == (200, "ok")
    status, info = server.ask("GET", "/info")
    assert status == 200
    assert info["model"]["classes"] == ["negative", "neutral", "positive"]
    assert (info["model"]["layers"], info["model"]["promise"]) == (3, None)
    assert info["model"]["dial"] == {"halting_tolerance": 0.0, "halting_margin": 0.6}


def test_requests_without_the_key_are_refused(server):
    for path in ("/health", "/info"):
        assert server.ask("GET", path, headers={})[0] in (401, 403)
    without = {name: value for name, value in JSON.items() if name not in KEY}
    assert server.predict({"text": "good"}, headers=without)[0] in (401, 403)
    assert server.predict({"text": "good"}, headers={**JSON, "X-API-Key": "wrong"})[0] == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 422),
        (b"[" * 300_000, 400),
        (b'{"text": "half of a character: \\ud800"}', 422),
        ({}, 422),
        ({"texts": []}, 422),
        ({"texts": ["good", None]}, 422),
        ({"text": "good", "texts": ["good"]}, 422),
        ({"txt": "good"}, 422),
        ({"texts": ["good", "a" * 100_001]}, 422),
        ({"texts": ["a"] * 10_001}, 422),
        ({"text": "a" * 1_000_000}, 413),
        ({"text": "." * 100_000}, 200),
        ({"text": "good\u0000\u202e😀"}, 200),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_answered_gets_a_status_that_says_so(server, body, status):
    got, content = server.predict(body)
    assert got == status
    if status != 200:
        assert len(str(content)) < 2000  # and does not repeat what came
    if status == 422:
        assert '{"texts": ["…"]}' in content["expected"]
    assert server.predict({"text": "good"})[0] == 200


def test_what_cannot_be_served_is_an_error_before_anything_starts(folder, dact_here, tmp_path):
    with pytest.raises(ValueError, match="host must be one of '127.0.0.1'"):
        serve(folder, host="example.org")
    with pytest.raises(FileNotFoundError):
        serve(tmp_path / "nothing")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, text = dact_here("serve", "--model", folder, "--port", port, cwd=tmp_path)
    assert status != 0
    assert str(port) in text
    assert "already in use" in text


@pytest.mark.slow
def test_a_thousand_requests_from_sixty_four_clients_get_the_answers_of_their_texts(
    server, offline
):
    number, clients = 1_000, 64
    texts = reviews(number)
    assert len(set(texts)) == number
    expected = offline(texts)
    end = time.monotonic() + 200

    def client(first):
        connection = server.connection()
        for row in range(first, number, clients):
            assert time.monotonic() < end, "the server is too slow"
            answers = server.answers([texts[row]], connection=connection)
            assert same(answers, expected[row : row + 1])

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


@pytest.mark.slow
def test_sigterm_answers_what_was_taken_and_a_restart_serves_the_same_clients(
    server, servers, folder, offline, tmp_path_factory
):
    """Under load; what is started on the port afterwards is the same model on ONNX Runtime."""
    # Requests that take a while are under way when the signal comes.
    texts = reviews(2000)
    expected = offline(texts)
    starts = range(0, 1000, 100)
    sent = threading.Barrier(len(starts) + 1)

    def ask(start):
        connection = server.connection()
        body = json.dumps({"texts": texts[start : start + 1000]})
        connection.request("POST", "/predict", body, JSON)
        sent.wait()
        response = connection.getresponse()
        assert response.status == 200
        answers = json.loads(response.read())["predictions"]
        return same(answers, expected[start : start + 1000])

    with ThreadPoolExecutor(len(starts)) as pool:
        answers = [pool.submit(ask, start) for start in starts]
        sent.wait()
        time.sleep(0.3)
        assert not all(answer.done() for answer in answers)
        assert server.stop() == 0
        assert all(answer.result() for answer in answers)
    leaves_nothing(server)

    # Clients that try again while nobody listens are served by the next process on the same port.
    where = tmp_path_factory.mktemp("onnx")
    export(folder, where / "model")
    expected = TextClassifier.from_pretrained(where / "model")(texts[:100])
    servers.append(Server(where / "model", where / "cwd", server.port))
    end = time.monotonic() + START

    def persist(row):
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return same(servers[-1].answers([texts[row]]), expected[row : row + 1])
            time.sleep(0.2)
        return False

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(persist, range(100)))
    leaves_nothing(servers[-1])


def leaves_nothing(server):
    """Neither files, nor faults or words of its clients in what it prints."""
    assert not list(server.where.iterdir())
    log = server.log.read_text()
    assert "Traceback" not in log
    assert not [word for word in ("screen", "battery") if word in log]


def test_a_body_of_few_characters_and_very_many_tokens_is_answered(server):
    assert server.predict({"text": "." * 100_000})[0] == 200
