"""Run the parts of gpu.sh, which describes them, each in its own process and within one time limit.

The results are written after each part, so that an interrupted run keeps what it has measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dact.model import DACT

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.json"


def commands(dry: bool, folder: Path) -> dict[str, list[str]]:
    """Return the commands of the parts by name, the most important first. A part with results
    writes NAME.json into `folder`."""
    speed = [str(HERE / "speed.py"), "shapes", "--results", str(folder / "shapes.json")]
    if dry:
        speed += [
            "--shapes",
            "tiny",
            "--examples",
            "8",
            "--rounds",
            "1",
            "--step_tokens",
            "256",
            "512",
        ]
        trials = ["--workers", "2", "--trials", "1", "--num_train", "64"]
    else:
        steps = [str(2**power) for power in range(13, 19)]  # 8,192 … 262,144
        speed += [
            "--precision",
            "bf16-mixed",
            "--examples",
            "1024",
            "--rounds",
            "3",
            "--step_tokens",
            *steps,
        ]
        trials = ["--workers", "1", "12", "--trials", "2", "--num_train", "10000"]
    return {
        "tests": [
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            str(HERE.parent / "tests" / "test_gpu.py"),
        ],
        "shapes": speed,
        "trials": [__file__, "--part", "trials", "--output", str(folder / "trials.json"), *trials],
    }


def model(num_tokens: int, layers: int = 6, **overrides: Any) -> DACT:
    from dact.encoders import TransformerEncoder
    from dact.model import DACT

    return DACT(
        encoder=TransformerEncoder(num_tokens, layers, 64, 4),
        **{"learning_rate": 2e-3, **overrides},
    )


def trials_per_minute(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the trials per minute of a whole study on generated reviews, by number of workers."""
    from dact import TuningEngine
    from dact.data import CompositionalSentiment

    rates = {}
    data = partial(CompositionalSentiment, num_train=arguments.num_train, num_val=200, num_test=100)
    with tempfile.TemporaryDirectory() as folder:
        for workers in arguments.workers:
            engine = TuningEngine(
                model=partial(model, data().vocab_size),
                data=data,
                trainer={"max_epochs": 1, "num_sanity_val_steps": 0},
                n_trials=workers * arguments.trials,
                workers=workers,
                log_dir=folder,
            )
            start = time.perf_counter()
            engine.joint_tune_study(f"workers-{workers}")
            rates[f"{workers} workers"] = (
                workers * arguments.trials / (time.perf_counter() - start) * 60
            )
    return rates


def run(name: str, command: list[str], seconds: float) -> dict[str, Any]:
    """Run one part and return its exit status, its seconds and the end of what it printed."""
    print(f"== {name}, at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    try:
        result = subprocess.run(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        status, output = result.returncode, result.stdout
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        status, output = None, raw.decode() if isinstance(raw, bytes) else raw
    print(output[-2000:], flush=True)
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "output": output[-2000:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="the smallest sizes, on the CPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of all parts together")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=["trials"], help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 12], help=argparse.SUPPRESS)
    parser.add_argument("--trials", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--num_train", type=int, default=10_000, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        arguments.output.write_text(json.dumps(trials_per_minute(arguments)))
        return
    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit(
            "gpu.sh: there is no GPU here; --dry checks on the CPU whether everything works"
        )
    output = arguments.output or (RESULTS.with_name("gpu-dry.json") if arguments.dry else RESULTS)
    end = time.monotonic() + arguments.seconds
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found: dict[str, Any] = {
        "device": device,
        "dry": arguments.dry,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "lightning": version("lightning"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(arguments.dry, Path(folder)).items():
            found[name] = run(name, command, max(1.0, end - time.monotonic()))
            results = Path(folder) / f"{name}.json"
            if results.is_file():
                found[name]["results"] = json.loads(results.read_text())
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name in ("tests", "shapes", "trials") if found[name]["status"] != 0]
    print(f"{output}: {'all parts ran' if not failed else 'FAILED: ' + ', '.join(failed)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
