"""A fit that keeps its checkpoints: of a candidate, of the final model, or of the defaults."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dact.files import read_checkpoint, read_json, write_json
from dact.model import DACT
from dact.saving import adopt
from dact.tuning.digests import digest
from dact.tuning.fitting import MONITOR, for_states, head_epochs, resumable_fit, seeded
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress

FRESH_SEED = 1000  # added to the seed of the run: far from the seeds of the studies


@dataclass(frozen=True)
class CheckpointedFit:
    """A fit with checkpoints in a folder of its own, which resumes after a kill.

    Its ``made_of.json`` says what it was made of; only this class reads and writes that file.

    Args:
        prepared: Shared inputs of the run's fits.
        folder: Folder of the fit.
        settings: Arguments of model and data; see `Winners.settings`. None stands for the untuned
            defaults of the factories, which do not start from the baseline, and have no teacher
            unless the factories give them one.
    """

    prepared: Prepared
    folder: Path
    settings: Mapping[str, Any] | None

    @property
    def keep_frozen(self) -> bool:
        """Whether the encoder of frozen mode stays frozen."""
        return self.settings is not None and self.prepared.recipe.final_training == "frozen"

    @property
    def monitor(self) -> str | None:
        """Metric whose lowest value chooses the epoch that is kept; None for the last epoch.

        On a frozen encoder it is that of the trials. A fit of the encoder ends at a learning rate
        of 0, and its loss rises before its answers get worse, since they get too sure: on few texts
        the lowest loss may be that of an epoch in which the first layers have not learned yet."""
        return MONITOR if self.keep_frozen else None

    @property
    def finetunes(self) -> bool:
        """Whether this is a tuned fit that trains the encoder, with consistency and the mean of the
        last weights."""
        return self.settings is not None and not self.keep_frozen

    @property
    def learning(self) -> dict[str, Any]:
        """Arguments of its model that no study chooses; see `Prepared`."""
        return {**self.prepared.learning, **self._finetuning}

    @property
    def _finetuning(self) -> dict[str, Any]:
        has_exit_loss = self.settings is not None and self.settings.get("exit_loss_weight") != 0
        return self.prepared.finetuning if self.finetunes and has_exit_loss else {}

    @property
    def identity(self) -> dict[str, Any]:
        """The inputs of the fit, as plain data."""
        # The dial is set after the fit. The promise matters only by the examples that are set aside
        # for it, which calibration_fraction says.
        shared = {
            n: v
            for n, v in self.prepared.identity.items()
            if n not in ("halting_tolerance", "promise")
        }
        kept = {
            "keep_frozen": self.keep_frozen,
            "monitor": self.monitor,
            "finetunes": self.finetunes,
        }
        return {
            "settings": self.settings,
            "setting": digest(shared),
            "learning": self.learning,
            **kept,
        }

    @property
    def seed(self) -> int:
        """The seed of the fit: a fresh one, except for the defaults."""
        return self.prepared.recipe.seed + (0 if self.settings is None else FRESH_SEED)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the epoch that was kept."""
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def history(self) -> list[dict[str, float]]:
        """The logged metrics of every epoch, once the fit is done."""
        return read_json(self.folder / "history.json")

    @property
    def kept(self) -> dict[str, float]:
        """The logged metrics of the epoch that was kept."""
        return (
            self.history[-1]
            if self.monitor is None
            else min(self.history, key=lambda epoch: epoch[MONITOR])
        )

    @property
    def is_done(self) -> bool:
        """Whether an earlier call has finished it."""
        return (
            (self.folder / "history.json").is_file() and self.checkpoint.is_file() and self.is_begun
        )

    @property
    def is_begun(self) -> bool:
        """Whether the folder belongs to a fit of these inputs, finished or not."""
        return self.made_of().get("fit") == self.identity

    def made_of(self) -> dict[str, Any]:
        """Return the content of ``made_of.json``, which `record` wrote; empty if there is none."""
        path = self.folder / "made_of.json"
        return read_json(path) if path.is_file() else {}

    def record(self, **measurement: Any) -> None:
        """Write ``made_of.json``: the identity of the fit and, by name, the inputs of the fit's
        measurement."""
        write_json(self.folder / "made_of.json", {"fit": self.identity, **measurement})

    def __call__(self, what: str, progress: Progress) -> None:
        """Fit and keep one epoch; resume from the last epoch of an earlier call.

        Args:
            what: Name of the fit, for progress and errors.
            progress: Console of the run.

        Raises:
            NonFiniteLoss: If its loss is not finite; the message says what to change.
        """
        last = self.folder / "checkpoints" / "last.ckpt"  # needed only by a fit that is not done
        if self.is_done:
            last.unlink(missing_ok=True)  # a kill may have come just before
            return
        if not self.is_begun:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.record()
        if (self.folder / "history.json").is_file():  # of a fit whose checkpoint is gone
            shutil.rmtree(self.checkpoint.parent, ignore_errors=True)
            (self.folder / "history.json").unlink()
        recipe, chosen = self.prepared.recipe, dict(self.settings or {})
        epochs = chosen.pop("num_epochs", recipe.epochs)
        epochs = head_epochs(epochs) if self.keep_frozen else epochs
        with seeded(self.seed), progress.fit(what, epochs) as bar:
            if self.settings is None:
                model, data = recipe.untuned(self.prepared.own_teacher)
            else:
                model, data = self.prepared.build(
                    {**self._finetuning, **chosen}, unfreeze=not self.keep_frozen
                )
            history = resumable_fit(
                for_states(recipe.trainer) if self.keep_frozen else recipe.trainer,
                model,
                data,
                last.parent,
                bar,
                what=what,
                epochs=epochs,
                log=self.folder,
                keep="best",
                monitor=self.monitor,
                average=self.finetunes,
            )
        write_json(self.folder / "history.json", history.epochs)
        last.unlink()

    def model(self) -> DACT:
        """Return the model of the epoch that was kept, on the device that it should use."""
        recipe, chosen = self.prepared.recipe, self.settings
        if chosen is None:
            model, _ = recipe.untuned(self.prepared.own_teacher)
        else:
            chosen = {
                name: value
                for name, value in chosen.items()
                if name not in ("batch_size", "num_epochs")
            }
            # By the factory: a class or an encoder of the user's own may hold what no checkpoint
            # can rebuild.
            model = recipe.make_model(**self.learning, **chosen)
        checkpoint = read_checkpoint(self.checkpoint)
        adopt(model, checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval().to(recipe.device)
