"""The trainings that are compared, by name: a kind, a number of layers and options, such as
``dact-4-exits``."""

from __future__ import annotations

from dataclasses import dataclass

FULL = 6  # layers of MiniLM
KINDS = {
    "baseline": "fine-tuned without a teacher, one head on the last layer",
    "encoder": "the same, cut to its first layers and taught",
    "multi": "multi-exit, taught: a classifier on every layer, equally weighed",
    "dact": "DACT, taught",
}
OPTIONS = {
    "exits": "DACT: exit_loss_weight 3 instead of 0.3",
    "heavy": "DACT: exit_loss_weight 30, next to which the loss of a_N hardly moves encoder and classifiers",
    "free": "DACT: λ = 0, so that the confidence only weighs the exits",
    "detached": "DACT: encoder and classifiers learn from the exit loss alone, as in the multi-exit; a_N teaches the confidence",
    "weighted": "the exit loss follows where each example leaves (COSEE, arXiv 2412.13236)",
    "long": "twice the epochs",
    "warm": "DACT: starts from all weights of the multi-exit of as many layers",
    "averaged": "the teacher is the mean of the baselines of three seeds",
    "crossfit": "the teacher's answer to a text comes from a baseline that has not seen it (three folds)",
    "stronger": "the teacher is the baseline of all VADER texts, which has up to ten times the labels",
    "live": "the teacher answers in every step, on a view of the text with 10 % of its tokens masked",
    "unlabelled": "up to 6,000 more training texts, without their classes: the teacher alone is their target",
    "plenty": "the same with up to 15,000",
}
DACT_ALONE = ("exits", "heavy", "free", "detached", "warm")


@dataclass(frozen=True)
class Method:
    """One training.

    Args:
        kind: One of `KINDS`.
        layers: Number of layers of the encoder that are kept.
        options: Some of `OPTIONS`.
    """

    kind: str
    layers: int
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [option for option in self.options if option not in OPTIONS]
        if self.kind not in KINDS or unknown:
            raise ValueError(
                f"{self}: expected a kind of {', '.join(KINDS)} and options of {', '.join(OPTIONS)}"
            )
        foreign = [
            option for option in self.options if option in DACT_ALONE and self.kind != "dact"
        ]
        if foreign:
            raise ValueError(f"{self}: {', '.join(foreign)} needs DACT")

    def __str__(self) -> str:
        return "-".join([self.kind, str(self.layers), *self.options])

    @classmethod
    def parse(cls, name: str) -> Method:
        kind, layers, *options = name.split("-")
        return cls(kind, int(layers), tuple(options))

    @property
    def needs(self) -> list[Method]:
        """The trainings of the same seed that this one starts from."""
        if self.kind == "baseline":
            return []
        first = [Method("baseline", FULL)]
        return [*first, Method("multi", self.layers)] if "warm" in self.options else first
