"""Should the exits be detached in a fit that trains the encoder? Trials on frozen states cannot
tell.

    python benchmarks/tuned.py reviews tweets newspaper --seeds 0    # leaves the runs, unless they
    are there python benchmarks/detached.py reviews-0 tweets-0 newspaper-0

The settings of a run's final model are fitted twice as the final fit is, from the baseline, which
is their teacher: with and without `detach_exits`. Both leave by the margins that take 1.5, 2, 2.5
and 3 layers on the validation texts of the run, and are compared there. The test texts are not
asked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from tuned import MEASURED_BATCH, ROOT, Setting, turned_down

from dact.calibration.answers import layer_answers, mean_and_error
from dact.cli.quiet import quiet
from dact.factories import ModelFactory
from dact.files import write_json
from dact.tuning.fitting import make_trainer, seeded

RESULTS = Path(__file__).parent / "results" / "detached.json"
BUDGETS = (1.5, 2.0, 2.5, 3.0)


def run_one(folder: Path) -> dict[str, Any]:
    setting = Setting.of(folder, int(folder.name.rsplit("-", 1)[1]))
    attached, detached = (right_at(setting, detach) for detach in (False, True))
    gains = [mean_and_error(one - other) for one, other in zip(detached, attached, strict=True)]
    return {
        "texts": len(detached[0]),
        "attached": [right.mean().item() for right in attached],
        "detached": [right.mean().item() for right in detached],
        "gain": gains,
    }


def right_at(setting: Setting, detach: bool) -> list[Tensor]:
    """Fit the final settings, and return which validation texts are right at each budget of
    layers."""
    with seeded(setting.final["seed_everything"]):
        model = ModelFactory(setting.final["model"])(detach_exits=detach)
        model = setting.fit(
            "detached" if detach else "attached", model, setting.final, setting.taught(model)
        )
    batches = setting.data(setting.config["data"], batch_size=MEASURED_BATCH).val_dataloader()
    with make_trainer(
        setting.trainer, enable_checkpointing=False
    ).precision_plugin.forward_context():
        answers = layer_answers(model, batches)
    return [turned_down(model, answers, answers, layers=budget)[0] for budget in BUDGETS]


def table(runs: dict[str, dict[str, Any]]) -> str:
    head = " | ".join(f"{budget:g} layers" for budget in BUDGETS)
    lines = [f"| run | texts | {head} |", "|---" * (2 + len(BUDGETS)) + "|"]
    for name, run in sorted(runs.items()):
        cells = [
            f"{100 * before:.1f} → {100 * after:.1f} ({100 * gain:+.1f} ± {100 * error:.1f})"
            for before, after, (gain, error) in zip(
                run["attached"], run["detached"], run["gain"], strict=True
            )
        ]
        lines.append(f"| {name} | {run['texts']} | {' | '.join(cells)} |")
    return "\n".join(["validation accuracy, %, attached → detached exits", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="folder names of finished runs of tuned.py"
    )
    parser.add_argument("--log_dir", type=Path, default=ROOT / "lightning_logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    arguments = parser.parse_args()
    quiet()
    runs = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    for name in arguments.runs:
        folder = arguments.log_dir / name
        if not (folder / "whole_config.yaml").is_file():
            parser.error(
                f"{folder} is no finished run of tuned.py: run that first, or give its --log_dir"
            )
        if name not in runs:
            runs[name] = run_one(folder)
            write_json(arguments.results, runs)
    print(table(runs) if runs else f"no results in {arguments.results}")


if __name__ == "__main__":
    main()
