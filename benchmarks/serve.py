"""What a server gains from early exit: throughput and latency of ``dact serve`` at three loads,
compared with ``halting: never``.

    python benchmarks/serve.py --model DIR                             # a folder of `dact export`
    python benchmarks/serve.py --model DIR --clients 1 4 --seconds 2   # whether it works

Two servers of the same model run, one unchanged and one with ``halting: never``. They take turns
under each load: a number of clients, each of which requests one test text of VADER after another
over an open connection. Clients and servers share the processor, which lowers the throughput. The
machine should be idle otherwise."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dact import DACT, TextClassifier
from dact.data import VaderSentiment

RESULTS = Path(__file__).parent / "results" / "serve.json"
START = 240  # seconds, at most, until a server is ready


@contextlib.contextmanager
def server(model: Path, arguments: argparse.Namespace) -> Iterator[int]:
    """Start a server in its own process, and yield its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"port={port}, max_batch={arguments.max_batch}, max_wait={arguments.max_wait}"
    code = f"from dact.server import serve; serve({str(model)!r}, {options})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    )
    try:
        end = time.monotonic() + START
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server of {model} did not become ready")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def load(port: int, texts: list[str], clients: int, seconds: float) -> dict[str, float]:
    """Return the requests per second, and the latencies in milliseconds, with `clients` clients."""
    milliseconds: list[float] = []
    failures: list[int] = []
    begin = threading.Barrier(clients)
    finished: list[float] = []

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        begin.wait()
        end = time.perf_counter() + seconds
        row = first
        while time.perf_counter() < end:
            start = time.perf_counter()
            body = json.dumps({"text": texts[row % len(texts)]})
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            milliseconds.append(1000 * (time.perf_counter() - start))
            if response.status != 200:
                failures.append(response.status)
            row += clients
        finished.append(time.perf_counter() - end + seconds)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered = sorted(milliseconds)
    percentiles = {
        f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in (50, 95, 99)
    }
    return {"requests/s": len(ordered) / max(finished), **percentiles, "failures": len(failures)}


def without_halting(model: Path, folder: Path) -> Path:
    """Copy a model's folder with ``halting: never``, and return the copy."""
    DACT.from_pretrained(model, halting="never").save_pretrained(folder)
    TextClassifier.from_pretrained(model).tokenizer.save_pretrained(folder)
    return folder


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    classifier = TextClassifier.from_pretrained(arguments.model)
    data = VaderSentiment(tokenizer=classifier.tokenizer)
    data.setup("test")
    texts = data.splits["test"].texts
    layers = [one.exit_layer for one in classifier(texts[:1000])]
    found: dict[str, Any] = {
        "model": arguments.model.name,
        "layers": classifier.model.encoder.num_layers,
        "mean exit layer": statistics.mean(layers),
        "max_batch": arguments.max_batch,
        "max_wait": arguments.max_wait,
    }
    with tempfile.TemporaryDirectory() as folder:
        never = without_halting(arguments.model, Path(folder) / "never")
        with (
            server(arguments.model, arguments) as early_port,
            server(never, arguments) as never_port,
        ):
            ports = {"early exit": early_port, "halting never": never_port}
            for port in ports.values():
                load(port, texts, 8, 1.0)  # to warm up
            for clients in arguments.clients:
                rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
                for _ in range(arguments.rounds):
                    for name, port in ports.items():
                        rounds[name].append(load(port, texts, clients, arguments.seconds))
                found[f"{clients} clients"] = {
                    name: {key: statistics.median(one[key] for one in many) for key in many[0]}
                    for name, many in rounds.items()
                }
                print(row(clients, found[f"{clients} clients"]), flush=True)
    return found


def row(clients: int, sides: dict[str, dict[str, float]]) -> str:
    cells = [
        f"{one['requests/s']:.0f} | {one['p50']:.1f} / {one['p95']:.1f} / {one['p99']:.1f}"
        for one in sides.values()
    ]
    failures = sum(one["failures"] for one in sides.values())
    gain = sides["early exit"]["requests/s"] / sides["halting never"]["requests/s"]
    return f"| {clients} | {' | '.join(cells)} | {gain:.2f} |" + (
        f" {failures:g} FAILURES" if failures else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="model folder, in PyTorch or exported"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="client counts")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each load")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each load")
    parser.add_argument("--max_batch", type=int, default=64)
    parser.add_argument("--max_wait", type=float, default=0.002)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    heading = "requests/s | p50 / p95 / p99, ms"
    print(f"| clients | early exit: {heading} | halting never: {heading} | times the requests/s |")
    print("|---|---|---|---|---|---|")
    found = measure(arguments)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
