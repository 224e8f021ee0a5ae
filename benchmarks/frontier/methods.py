"""The trainings that are compared, by name: a kind, a number of layers and options."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    "baseline": "fine-tuned without a teacher, one head on the last layer",
    "encoder": "the same, cut to its first layers and taught",
    "multi": "multi-exit, taught: a classifier on every layer, equally weighed",
    "dact": "DACT, taught",
}
OPTIONS = {
    "detached": "DACT: encoder and classifiers learn from the exit loss alone, as the multi-exit",
    "unlabelled": "up to 6,000 more training texts without classes, whose target is the teacher",
    "plenty": "the same with up to 15,000",
    "apart": "baseline of a DACT: without the texts that are set apart for the confidence",
}


@dataclass(frozen=True)
class Method:
    """One training.

    Args:
        kind: One of `KINDS`.
        layers: Number of layers of the encoder that are kept.
        options: Some of `OPTIONS`; stored records may have others.
    """

    kind: str
    layers: int
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.kind, str(self.layers), *self.options])

    @classmethod
    def parse(cls, name: str) -> Method:
        kind, layers, *options = name.split("-")
        if kind not in KINDS or not layers.isdecimal():
            raise ValueError(f"expected one of {', '.join(KINDS)} and its layers, got {name!r}")
        return cls(kind, int(layers), tuple(options))
