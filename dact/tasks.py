"""The tasks, one class per example or several labels: targets, decisions, leads and proofs.

An *answer* has one probability per class, or per label. Its *outcomes* are the events whose
likelihood is trained: the classes, or the presence and the absence of each label. Its *decision* is
what users get: a class, or a set of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dact.checks import check_probabilities, check_range

HaltingRule = Literal["exact", "paper", "never"]
TaskName = Literal["multiclass", "multilabel"]

# Smaller probabilities count as this one in the task loss: 1 / a stays finite in float32.
SMALLEST_PROBABILITY = 1e-30
UNLABELLED = -100  # the label of an example that only a teacher labels


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a float64 tensor unchanged and any other in float32, so that half precision is never
    summed over layers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Task:
    """One class per example: an answer is a probability vector, a decision its most probable class,
    int64 ``[…]``, and labels are int64 ``[batch]``. Other tasks derive from this one.

    Answers y and a are ``[…, classes]``. Of the class attributes, `fewest` is the smallest number
    of classes, and the others are texts for users.

    Args:
        thresholds: Thresholds of `Multilabel`; None here.
    """

    thresholds: tuple[float, ...] | None = None

    name: ClassVar[TaskName] = "multiclass"
    nouns: ClassVar[str] = "classes"
    fewest: ClassVar[int] = 2
    answered: ClassVar[str] = "Each prediction has the label, its score and the exit layer."
    explained: ClassVar[str] = "confused: a true class as the answer, the two most frequent"
    leaves: ClassVar[str] = (
        "A text leaves when its class is proven to end at most the tolerance behind the winner of "
        "all layers, or when a layer's own first class leads by more than the margin (1 for never)."
    )

    def answers(self, logits: Tensor) -> Tensor:
        """Return the answers from a classifier's output."""
        return logits.softmax(dim=-1)

    def likelihoods(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the outcomes, ``[…, outcomes]``, none rounded to 0 or 1."""
        return self.answers(logits)

    def log_likelihoods(self, logits: Tensor) -> Tensor:
        """Return the logarithms of `likelihoods`."""
        return logits.log_softmax(dim=-1)

    def outcomes(self, a: Tensor) -> Tensor:
        """Return the probabilities of the outcomes of answers, ``[…, outcomes]``."""
        return a

    def weights(self, class_weights: Tensor | None) -> Tensor | None:
        """Return the weight of each outcome, from one weight per class."""
        return class_weights

    def targets(
        self, labels: Tensor, classes: int, teacher: Tensor | None = None, share: float = 0.0
    ) -> Tensor:
        """Return the target of each outcome, ``[batch, outcomes]``; a row of zeros for none.

        Args:
            labels: Labels of a batch.
            classes: Number of classes.
            teacher: Answers of a teacher, ``[batch, classes]``; the only target at labels of -100.
            share: Share of the teacher in the other targets, in [0, 1].

        Raises:
            ValueError: If labels belong to another task or are out of range, or a teacher's answer
                holds no probabilities.
        """
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"labels must be integers of the shape [batch], got {labels.dtype} "
                f"{[*labels.shape]}: several labels per example take task='multilabel', and "
                "numbers as targets are not supported"
            )
        unknown = labels == UNLABELLED
        wrong = labels[~unknown & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(
                f"labels must be in 0 … {classes - 1} (or -100 for none), got {wrong[0].item()}: "
                "set output_dimension to the number of classes"
            )
        # [batch, classes]; -100 matches no class, so its row stays zero.
        target = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).float()
        if teacher is None or (share == 0 and not unknown.any()):
            return target
        t = check_probabilities("teacher", at_least_float32(teacher))
        shares = unknown.float().clamp_min(share).unsqueeze(1)  # [batch, 1]
        return (1 - shares) * target + shares * t

    def decide(self, a: Tensor) -> Tensor:
        """Return the decision of each answer."""
        return a.argmax(dim=-1)

    def same(self, first: Tensor, second: Tensor) -> Tensor:
        """Return where two decisions, or a decision and the labels, are the same, bool ``[…]``."""
        return first == second

    def members(self, decisions: Tensor, classes: int) -> Tensor:
        """Return which classes belong to a decision, or to the labels, bool ``[…, classes]``."""
        return torch.nn.functional.one_hot(decisions.long(), classes).bool()

    def set_scores(self, counts: Tensor, examples: int | Tensor) -> dict[str, Tensor]:
        """Return the metrics of label sets, from the counts of `dact.metrics.count_classes`, int64
        ``[3, labels]``; empty for one class per example."""
        return {}

    def scores(self, a: Tensor, decisions: Tensor) -> Tensor:
        """Return the probability of each part of a decision."""
        return a.gather(-1, decisions.unsqueeze(-1)).squeeze(-1)

    def named(self, decision: Any, score: Any, probabilities: dict[str, float]) -> dict[str, Any]:
        """Return the fields of a `dact.text_classifier.Prediction` for a decision and its score, as
        plain values; `probabilities` has the class names in their order."""
        return {"label": [*probabilities][decision], "score": score}

    def temper(self, a: Tensor, temperatures: Tensor) -> Tensor:
        """Return answers ``[batch, classes]`` at temperatures ``[batch]``."""
        log = at_least_float32(a).clamp_min(SMALLEST_PROBABILITY).log()
        return (log / temperatures.unsqueeze(1)).softmax(dim=1)

    def lead(self, y: Tensor) -> Tensor:
        """Return the lead of each answer, in [0, 1], ``[…]``; the margin is compared with it."""
        first, second = at_least_float32(y).topk(2, dim=-1).values.unbind(dim=-1)
        return first - second

    def proof(self, a: Tensor, p: Tensor, remaining: int | Tensor, rule: HaltingRule) -> Tensor:
        """Return a lower bound on the lead of a_n's decision after all layers, float64 ``[…]``:
        below 0 the decision may change; see `dact.functional.can_halt`."""
        best, runner_up = a.topk(2, dim=-1).values.double().unbind(dim=-1)
        p = p.double()
        kept = (1 - p) ** remaining
        proof = torch.addcmul(kept, kept, best - runner_up) - 1
        if rule == "paper":  # never above the exact bound, which the minimum ensures under rounding
            proof = torch.minimum(proof, best * kept - runner_up - p * remaining)
        return proof

    def contenders(self, a: Tensor) -> Tensor:
        """Return the part of answers that `lead` and `proof` need."""
        return a.topk(2, dim=-1).values

    def hardest(self, y: Tensor) -> Tensor:
        """Return the probability vectors ``[…, 2 or more]`` that the confidence reads."""
        return y


@dataclass(frozen=True)
class Multilabel(Task):
    """Any number of labels per example: an answer has a probability for each label, a decision the
    labels above their thresholds, bool ``[…, labels]``, and labels are int64 ``[batch, labels]`` of
    0 and 1, or -100 for unknown.

    Args:
        thresholds: One per label, each in (0, 1); 0.5 if left out.
    """

    name = "multilabel"
    nouns = "labels"
    fewest = 1
    explained = "accuracy: share of the texts that get exactly their labels"
    answered = "Each prediction has the labels with their probabilities, and the exit layer."
    leaves = (
        "A text leaves when each of its labels is proven to end at most the tolerance beyond its "
        "threshold, or when each is farther from it than the margin (1 for never)."
    )

    def answers(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def likelihoods(self, logits: Tensor) -> Tensor:
        return torch.cat([logits, -logits], dim=-1).sigmoid()

    def log_likelihoods(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(torch.cat([logits, -logits], dim=-1))

    def outcomes(self, a: Tensor) -> Tensor:
        least = torch.finfo(a.dtype).eps / 2  # 1 - a is 0 or at least this
        return torch.cat([a, 1 - a], dim=-1).clamp_min(least)

    def weights(self, class_weights: Tensor | None) -> Tensor | None:
        if class_weights is None:
            return None
        return torch.cat([class_weights, torch.ones_like(class_weights)])

    def targets(
        self, labels: Tensor, classes: int, teacher: Tensor | None = None, share: float = 0.0
    ) -> Tensor:
        if labels.dim() != 2 or labels.shape[1] != classes:
            raise ValueError(
                f"labels must be 0 or 1, of the shape [batch, {classes}], got {[*labels.shape]}: "
                "set output_dimension to the number of labels; one class per example takes "
                "task='multiclass'"
            )
        unknown = labels == UNLABELLED
        wrong = labels[~unknown & (labels != 0) & (labels != 1)]
        if len(wrong):
            raise ValueError(f"labels must be 0 or 1 (or -100 for none), got {wrong[0].item()}")
        present, known = (labels == 1).float(), (~unknown).float()
        if teacher is not None and (share or unknown.any()):
            t = at_least_float32(teacher)
            if not ((t >= 0) & (t <= 1)).all():
                raise ValueError("teacher must hold probabilities, each in [0, 1]")
            shares = (1 - known).clamp_min(share)
            present, known = (1 - shares) * present + shares * t, torch.ones_like(t)
        return torch.cat([known * present, known * (1 - present)], dim=-1)

    def decide(self, a: Tensor) -> Tensor:
        return a > self._thresholds(a)

    def same(self, first: Tensor, second: Tensor) -> Tensor:
        return (first == second).all(dim=-1)

    def members(self, decisions: Tensor, classes: int) -> Tensor:
        return decisions == 1

    def set_scores(self, counts: Tensor, examples: int | Tensor) -> dict[str, Tensor]:
        both, hits = counts[:2].sum(), counts[2].sum()
        wrong = (both - 2 * hits) / (examples * counts.shape[1])
        return {"micro_f1": 2 * hits / both.clamp_min(1), "hamming_loss": wrong}

    def scores(self, a: Tensor, decisions: Tensor) -> Tensor:
        return torch.where(decisions, a, 1 - a)

    def named(self, decision: Any, score: Any, probabilities: dict[str, float]) -> dict[str, Any]:
        pairs = zip(decision, probabilities.items(), strict=True)
        present = {name: probability for is_present, (name, probability) in pairs if is_present}
        return {"label": None, "score": min(score), "labels": present}

    def temper(self, a: Tensor, temperatures: Tensor) -> Tensor:
        a = at_least_float32(a)
        return (a.logit(torch.finfo(a.dtype).eps) / temperatures.unsqueeze(1)).sigmoid()

    def lead(self, y: Tensor) -> Tensor:
        y = at_least_float32(y)
        t = self._thresholds(y)
        return torch.maximum((y - t) / (1 - t), (t - y) / t).amin(dim=-1)

    def proof(self, a: Tensor, p: Tensor, remaining: int | Tensor, rule: HaltingRule) -> Tensor:
        is_present, a, p = self.decide(a), a.double(), p.double().unsqueeze(-1)
        d = remaining.unsqueeze(-1) if isinstance(remaining, Tensor) else remaining
        t, kept = self._thresholds(a), (1 - p) ** d
        present, absent = kept * a - t, kept * (1 - a) - (1 - t)
        if rule == "paper":
            absent = torch.minimum(absent, t - a - p * d)
        return torch.where(is_present, present, absent).amin(dim=-1)

    def contenders(self, a: Tensor) -> Tensor:
        return a

    def hardest(self, y: Tensor) -> Tensor:
        surest = torch.maximum(y, 1 - y).amin(dim=-1)
        return torch.stack([surest, 1 - surest], dim=-1)

    def _thresholds(self, like: Tensor) -> Tensor:
        return like.new_tensor(0.5 if self.thresholds is None else self.thresholds)


MULTICLASS = Task()
MULTILABEL = Multilabel()


def task_of(name: TaskName, thresholds: Sequence[float] | None = None) -> Task:
    """Return the task of this name; only ``"multilabel"`` takes thresholds."""
    if thresholds is None:
        return MULTILABEL if name == "multilabel" else MULTICLASS
    if name != "multilabel":
        raise ValueError("thresholds go with task='multilabel'")
    for threshold in thresholds:
        check_range("each of the thresholds", threshold, "(0, 1)")
    return Multilabel(tuple(map(float, thresholds)))
