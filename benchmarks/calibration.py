"""Time to choose a halting margin, compared with evaluating the halting rule for every setting.

    python benchmarks/calibration.py

4,000 generated examples, 12 layers, 150 classes. The naive search computes every setting's exit
layers from all classes, as `dact.functional.exit_layers` does; both must choose the same setting.
Seconds are processor time on one thread, the best of three."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dact import functional
from dact.calibration import SETTINGS, LayerAnswers, Promise, choose_setting
from dact.calibration.bounds import binomial_upper_bound
from dact.functional import Halting

RESULTS = Path(__file__).parent / "results" / "calibration.json"


def generated(examples: int, layers: int, classes: int) -> LayerAnswers:
    """Return answers whose evidence for the right class grows with the layers."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (examples,), generator=generator)
    noise = torch.randn(examples, layers, classes, generator=generator)
    noise *= 3 * torch.rand(examples, 1, 1, generator=generator)
    rise = torch.linspace(2, 12, layers).view(1, layers, 1)
    y = (noise + rise * torch.nn.functional.one_hot(target, classes).unsqueeze(1)).softmax(dim=2)
    a, p = functional.accumulate(y, (1.2 - y.amax(dim=2)).clamp(0, 1))
    return LayerAnswers(a, p, y, target)


def naive(answers: LayerAnswers, promise: Promise) -> float:
    """Return the last margin before the first that fails, each evaluated separately."""
    chosen, full = 1.0, answers.a[:, -1].argmax(1)
    assert promise.confidence is not None
    for margin in SETTINGS["halting_margin"][1:]:
        early = functional.answer_at(answers.a, answers.exit_layers(Halting(margin=margin))).argmax(
            1
        )
        lost = int(((full == answers.target) & (early != answers.target)).sum())
        if binomial_upper_bound(lost, len(early), promise.confidence) > promise.most:
            break
        chosen = margin
    return chosen


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = work()
        seconds.append(time.process_time() - start)
    return found, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in (("examples", 4000), ("layers", 12), ("classes", 150)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    answers = generated(**arguments)
    promise = Promise(max_accuracy_loss=0.01)
    binomial_upper_bound(0, 1, 0.5)  # imports SciPy, which is not timed
    margin, slow = timed(lambda: naive(answers, promise))
    found, fast = timed(lambda: choose_setting(answers, promise))
    assert found.halting_margin == margin, (found.halting_margin, margin)
    baseline = answers.a[:, -1].argmax(1)
    _, against = timed(lambda: choose_setting(answers, promise, baseline=baseline))
    result = {
        **arguments,
        "margin": margin,
        "mean_exit_layer": found.mean_exit_layer,
        "naive_s": round(slow, 3),
        "choose_setting_s": round(fast, 3),
        "choose_setting_with_baseline_s": round(against, 3),
        "ratio": round(slow / fast, 1),
    }
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
