"""The survey before a run: one model and one datamodule, their checks, their promise, and the first
trials."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning.pytorch import LightningDataModule
from optuna.distributions import CategoricalDistribution
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from dact.agreement import check_classes
from dact.data.base import TextDataModule
from dact.model import DACT
from dact.submodels import SubmodelConfig
from dact.tuning.digests import data_digest, teacher_digest
from dact.tuning.fitting import TAUGHT_STEPS, averages, enough_epochs, seeded
from dact.tuning.recipe import DEFAULT_PROMISE, Recipe
from dact.tuning.run import Winners
from dact.tuning.space import Dimension, Spaces, Starts, complete_spaces, nearest
from dact.tuning.stages import LAMBDA_REG, STAGES, SUBMODELS, TRAINING, Stage, flat

CALIBRATION_SHARE = 0.5  # of the validation examples, kept from the studies if there is a promise
# examples below which none are set aside for an estimate; some 150 can show that a point is kept
FEWEST_ASIDE = 200
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
LAYERS_KEPT = 2 / 3  # of the encoder's layers, in the first trial
EPOCHS_TRIED = (2 / 3, 1, 4 / 3)  # parts of the default number of epochs
HEAD_RATE_FACTOR = 10  # the submodels' rate in the first trial is this multiple of the encoder's …
HEAD_RATE = 1e-3  # … but at most this
OF_NO_MODEL = ("batch_size", "num_epochs")  # settings of data and Trainer


@dataclass(frozen=True)
class Plan:
    """What the studies search, and what they begin with.

    Args:
        spaces: Dimension of each parameter, by stage.
        first_trials: Parameters of the first trials, by stage.
        initial: Settings of trials until a study has chosen others.
        submodels: Parameters of the factory's submodels that differ from those of `SubmodelConfig`;
            a trial replaces those that are searched.
        untuned: Defaults of the factories, and recommended settings, which lie within the bounds
            that the user gave; see `Winners.settings`.
    """

    spaces: Spaces
    first_trials: Starts
    initial: Mapping[str, Any]
    submodels: Mapping[str, Any]
    untuned: tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Surveyed(Plan):
    """A model and a datamodule of the factories, and what all trials of the run have in common.

    Args:
        recipe: Recipe of the run; its promise is one that model and data can keep.
        model: Untrained model.
        data: Datamodule, set up for a fit.
        teacher: Teacher that the data names, or None.
        own_teacher: Whether the training batches carry a teacher's probabilities by themselves, and
            are wanted to.
        identity: Settings that all trials have in common; see `Recipe.identity`.
    """

    recipe: Recipe
    model: DACT
    data: LightningDataModule
    teacher: str | None
    own_teacher: bool
    identity: dict[str, Any]


def survey(
    recipe: Recipe,
    spaces: Spaces,
    bounded: Collection[str] = (),
    *,
    stages: Sequence[Stage] = STAGES,
    measured: bool = False,
) -> Surveyed:
    """Build one model and one datamodule, and check that they fit the run.

    Args:
        recipe: Recipe of the run.
        spaces: Spaces from `build_spaces`.
        bounded: Names of the parameters whose bounds the user gave; see `complete_spaces`.
        stages: Stages whose studies will run.
        measured: Whether the run will measure a final model, which needs a test split.

    Raises:
        ValueError: If classes, promise or search space do not fit model and data.
    """
    with seeded(recipe.seed):
        model = recipe.make_model()
        recipe = resolve_promise(
            recipe, model, _most_layers(spaces[TRAINING.name].get("num_layers"), model)
        )
        data: Any = recipe.make_data()
    if measured:
        recipe.make_data(batch_size=1)  # fails early if the factory takes no batch_size
    teacher = getattr(data, "teacher", None)
    if teacher is not None:
        data.teacher = None  # it runs once, in `prepare`
    digests = _digests(recipe, data, measured)
    if measured and recipe.final_training == "finetune" and not averages(recipe.trainer):
        _check_copy(model)
    check_classes(getattr(data, "class_names", None), recipe.output_dimension)
    if recipe.distillation == 0 and getattr(data, "needs_teacher", False):
        raise ValueError(
            "TuningEngine: texts without labels need a teacher: give a distillation above 0, or leave them out"
        )
    own_teacher = (
        recipe.distillation != 0
        and teacher is None
        and "teacher" in next(iter(data.train_dataloader()))
    )
    size = getattr(data, "batch_size", None)
    identity = recipe.identity(model, digests["train"] + digests["val"], size, teacher)
    identity |= {"own_teacher": teacher_digest(data.train_dataloader())} if own_teacher else {}
    _check_limit(recipe.trainer, spaces[TRAINING.name].get("batch_size"))
    plan = _plan(recipe, spaces, bounded, model, data)
    _check_factory(recipe, plan.spaces, plan.submodels, model, stages, measured)
    return Surveyed(
        **vars(plan),
        recipe=recipe,
        model=model,
        data=data,
        teacher=teacher,
        own_teacher=own_teacher,
        identity=identity,
    )


def _digests(recipe: Recipe, data: Any, measured: bool) -> dict[str, str]:
    """Set a datamodule up, check that its loaders fit the run, and return the digest of each
    split."""
    data.prepare_data()
    data.setup("fit")
    splits = {split: getattr(data, f"{split}_dataloader") for split in ("train", "val")}
    if measured:
        data.setup("test")
        test = data.test_dataloader()
        splits["test"] = data.test_dataloader
        _check_order("test", test)
        if "labels" not in next(iter(test), {}):
            raise ValueError(
                "TuningEngine: the final model is measured on the test split, whose batches have no 'labels'"
            )
    digests = {split: data_digest(loader()) for split, loader in splits.items()}
    if not isinstance(data, TextDataModule):  # which divides its examples by a seed of its own
        _check_division(recipe, digests)
    if recipe.encoder_training == "frozen":
        _check_sampler(data.train_dataloader(), recipe.seed)
    _check_order("validation", data.val_dataloader())
    return digests


def _plan(recipe: Recipe, spaces: Spaces, bounded: Collection[str], model: DACT, data: Any) -> Plan:
    """Return what the studies search and begin with."""
    first_trials = _first_trials(recipe, model, data)
    if "num_epochs" not in bounded:
        enough = enough_epochs(recipe.trainer, data, recipe.epochs, TAUGHT_STEPS)
        for first in first_trials[TRAINING.name]:
            first["num_epochs"] = enough
        choices = sorted({max(1, round(part * enough)) for part in EPOCHS_TRIED})
        epochs = CategoricalDistribution(choices)
        spaces = {**spaces, TRAINING.name: {**spaces[TRAINING.name], "num_epochs": epochs}}
    first_trials = {
        stage: _within(spaces[stage], trials, bounded) for stage, trials in first_trials.items()
    }
    recommended = first_trials[TRAINING.name][0]
    recommended |= TRAINING.parse(recommended)["external_config"]
    differing = ("submodel_learning_rate", "detach_exits", "num_layers", "num_epochs")
    initial = {name: recommended[name] for name in differing}
    usual = flat({"classifier": asdict(SubmodelConfig()), "confidence": asdict(SubmodelConfig())})
    submodels = {
        name: value
        for name, value in first_trials[SUBMODELS.name][-1].items()
        if value != usual[name]
    }
    ends = [
        {stage: trials[end] for stage, trials in first_trials.items() if trials} for end in (-1, 0)
    ]
    spaces, first_trials = complete_spaces(spaces, model.encoder.num_layers, first_trials, bounded)
    untuned = _settings(ends[0], spaces, submodels), _settings(ends[1], spaces, submodels)
    return Plan(spaces, first_trials, initial, submodels, untuned)


def _within(
    space: Mapping[str, Dimension], trials: list[dict[str, Any]], bounded: Collection[str]
) -> list[Any]:
    """Return the first trials of a stage, the first of which lies within the bounds that the user
    gave."""
    if not trials:
        return []
    first = {
        name: nearest(space[name], v) if name in {*bounded} & space.keys() else v
        for name, v in trials[0].items()
    }
    return [first, *(trial for trial in trials[-1:] if trial != first)]


def _settings(
    params: Mapping[str, Any], spaces: Spaces, submodels: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the parameters of the three stages stand for, those that are searched; see
    `Winners.settings`."""
    searched = {
        stage: {n: v for n, v in one.items() if n in spaces[stage]} for stage, one in params.items()
    }
    winners = TRAINING.parse(searched[TRAINING.name]) | SUBMODELS.parse(
        {**submodels, **searched[SUBMODELS.name]}
    )
    return Winners(**winners).settings() | searched.get(LAMBDA_REG.name, {})


def _most_layers(searched: Dimension | None, model: DACT) -> int:
    """Return the most layers that a model of the run keeps: those of the default settings, or of a
    trial."""
    if searched is None:
        return model.encoder.num_layers
    if isinstance(searched, CategoricalDistribution):
        high: Any = max(searched.choices)  # type: ignore[type-var]
    else:
        high = searched.high
    return max(model.num_layers, min(int(high), model.encoder.num_layers))


def _check_order(split: str, loader: DataLoader[Any]) -> None:
    """Raise a ``ValueError`` if a loader does not give all examples in one order, by which models
    are compared."""
    batches = getattr(loader, "batch_sampler", None)
    drops = getattr(loader, "drop_last", False) or getattr(batches, "drop_last", False)
    samplers = getattr(loader, "sampler", None), getattr(batches, "sampler", None)
    if drops or any(isinstance(sampler, RANDOM) for sampler in samplers):
        how = "drops the last examples (drop_last)" if drops else "shuffles"
        raise ValueError(
            f"TuningEngine: models are compared example by example, but the {split} loader {how}: leave that out"
        )


def _check_division(recipe: Recipe, digests: Mapping[str, str]) -> None:
    """Raise a ``ValueError`` if another datamodule of the factory has other examples: each fit gets
    one of its own."""
    with seeded(recipe.seed + 1):  # as other fits
        again: Any = recipe.make_data()
        again.prepare_data()
        again.setup("fit")
        if "test" in digests:
            again.setup("test")
        found = {split: data_digest(getattr(again, f"{split}_dataloader")()) for split in digests}
    if other := [split for split in digests if found[split] != digests[split]]:
        raise ValueError(
            f"TuningEngine: data made two datamodules with other examples for {', '.join(other)}, but each fit gets "
            "one of its own, and would train on what others are measured on: divide the examples in the same way each "
            "time, as by random_split(…, generator=torch.Generator().manual_seed(0))"
        )


def _check_sampler(loader: DataLoader[Any], seed: int) -> None:
    """Raise a ``ValueError`` unless the loader gives each example of its data set once, or drops
    the last batch."""
    if loader.batch_sampler is None:  # the data set makes the batches
        return
    with seeded(seed):
        batches = [[*batch] for batch in loader.batch_sampler]
    rows, examples = [row for batch in batches for row in batch], len(loader.dataset)  # type: ignore[arg-type]
    if len({*rows}) < len(rows) or examples - len(rows) >= max(map(len, batches), default=1):
        raise ValueError(
            "TuningEngine: frozen mode learns from each example of the training data once per epoch, but the sampler "
            f"of the train loader gives {len({*rows})} of {examples}, {len(rows)} in all: make a data set of those "
            "examples (torch.utils.data.Subset), or use encoder_training='finetune'"
        )


def _check_copy(model: DACT) -> None:
    """Raise a ``ValueError`` if a model has no copy, in which fits after the studies take the mean
    of its weights."""
    try:
        copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            "TuningEngine: the mean of the weights over the last steps needs a copy of the model, but copy.deepcopy "
            f"fails on it ({type(error).__name__}: {error}): give the encoder a __deepcopy__, a callback of yours that "
            "averages weights, or final_training='frozen'"
        ) from error


def _check_factory(
    recipe: Recipe,
    spaces: Spaces,
    submodels: Mapping[str, Any],
    first: DACT,
    stages: Sequence[Stage],
    finetunes: bool,
) -> None:
    """Raise a ``ValueError`` if the models of the factory are not what the trials ask for, or share
    weights.

    Args:
        recipe: Recipe of the run.
        spaces: Complete spaces.
        submodels: See `Surveyed`.
        first: Another model of the factory.
        stages: Stages whose trials will ask.
        finetunes: Whether a final fit will ask as well.
    """
    winners: dict[str, Any] = {}
    for stage in stages:
        params = {name: nearest(dimension, 0) for name, dimension in spaces[stage.name].items()}
        winners |= stage.parse({**submodels, **params} if stage is SUBMODELS else params)
    asked = {
        name: value
        for name, value in Winners(**winners).settings().items()
        if name not in OF_NO_MODEL
    }
    if finetunes:
        asked |= recipe.finetuning(first)
    try:
        with seeded(recipe.seed):
            model = recipe.make_model(**asked)
    except TypeError as error:
        raise ValueError(
            f"TuningEngine: model must take {', '.join(asked)} and give them to DACT: {error}"
        ) from error
    except ValueError:
        return  # this combination is refused, and so would be its trial
    if set(map(id, model.parameters())) & set(map(id, first.parameters())):
        raise ValueError(
            "TuningEngine: model made two models that share weights, but each fit must change its own: build or load "
            "the encoder within the function"
        )
    for name, value in recipe.overrides(asked).items():
        found = getattr(model, name)
        found = getattr(found, "config", found)
        if found != value:
            raise ValueError(
                f"TuningEngine: model was asked for {name}={value} and made one with {found}: it must give what it is "
                "asked for to DACT"
            )


def _check_limit(trainer: Mapping[str, Any], batch_size: Dimension | None) -> None:
    """Raise a ``ValueError`` if the Trainer never trains or validates, or on batches while trials
    differ in size."""
    for part in ("limit_train_batches", "limit_val_batches"):
        if trainer.get(part) == 0:
            raise ValueError(
                f"TuningEngine: {part}=0 leaves fits without data, and every fit is validated: leave it out"
            )
    name = "overfit_batches" if trainer.get("overfit_batches") else "limit_val_batches"
    limit = trainer.get(name)
    all_batches = limit is None or (isinstance(limit, float) and limit == 1)
    if all_batches or batch_size is None:
        return
    choices: Any = getattr(batch_size, "choices", None) or [
        getattr(batch_size, end) for end in ("low", "high")
    ]
    if len({*choices}) > 1:
        raise ValueError(
            f"TuningEngine: {name}={limit} counts batches, and the trials try several batch_size, so that they would "
            f"be compared on different examples: leave {name} out, or give one size in "
            f"search_space: {{batch_size: {{choices: [{choices[0]}]}}}}"
        )


def resolve_promise(given: Recipe, model: DACT, layers: int) -> Recipe:
    """Return the recipe with a promise that model and data can keep.

    A promise that the user gave must be kept with its confidence. The default promise becomes an
    estimate if the data cannot set enough examples aside, and is dropped if the model has a halting
    rule without its dial.

    Args:
        given: Recipe of the user.
        model: A model of the factory.
        layers: Most layers that a model of the run keeps.

    Raises:
        ValueError: If a promise that the user gave cannot be kept.
    """
    promise = given.promise
    if promise is None:
        return given
    asked_for = promise != DEFAULT_PROMISE
    try:
        promise.check(model.exit_rule, layers)
    except ValueError:
        if asked_for:
            raise
        note = "the model's own halting settings leave no dial to set: there is no promise about its margin"
        return replace(given, promise=None, note=note)
    recipe, aside = _setting_aside(given)
    # A few examples that no study sees are still better than those that choose the checkpoint.
    for_estimate = recipe if aside >= FEWEST_ASIDE or promise.max_layers is not None else given
    needed = promise.examples_needed(layers)
    if promise.confidence is None:
        return for_estimate
    if aside and (needed is None or aside >= needed):
        return recipe
    data = given.data()
    kind = type(data).__name__
    why = f"it takes {needed or 'one or more'} examples that no study sees, and {kind} sets {aside} aside"
    if asked_for:
        raise ValueError(
            f"TuningEngine: the promise cannot be kept: {why}. Give the data more validation examples or a "
            "calibration_dataloader, promise less, or ask for an estimate (confidence: null)"
        )
    on = "on all validation examples, " if for_estimate is given and recipe is not given else ""
    remedy = (
        "More validation examples change"
        if hasattr(data, "calibration_fraction")
        else "A calibration_dataloader changes"
    )
    note = f"the margin will be set by an estimate, {on}not by a promise: {why}. {remedy} that"
    return replace(for_estimate, promise=replace(promise, confidence=None), note=note)


def _setting_aside(given: Recipe) -> tuple[Recipe, int]:
    """Return the recipe with examples set aside, if the data can do so, and the number of these
    examples."""
    recipe, data = given, given.data()
    has_own = getattr(data, "calibration_file", None) or getattr(data, "calibration_fraction", None)
    if not has_own and hasattr(data, "calibration_fraction"):
        recipe = replace(given, calibration_fraction=CALIBRATION_SHARE)
        data = recipe.make_data()
    if not hasattr(data, "calibration_dataloader"):
        return given, 0
    data.prepare_data()
    try:
        data.setup("validate")
        loader = data.calibration_dataloader()
    except (
        ValueError
    ):  # too few examples to divide, unless the data as it was given has the same fault
        as_given = given.data()
        as_given.prepare_data()
        as_given.setup("validate")
        return given, 0
    if loader is None:
        return recipe, 0
    dataset = getattr(loader, "dataset", None)
    return recipe, sum(len(batch["labels"]) for batch in loader) if dataset is None else len(
        dataset
    )


def _first_trials(
    recipe: Recipe, model: DACT, data: LightningDataModule
) -> dict[str, list[dict[str, Any]]]:
    """Return the parameters of the first trials, by stage: recommended ones, and the factories'
    defaults."""
    submodels = flat(
        {
            "classifier": asdict(model.classifier.config),
            "confidence": asdict(model.confidence.config),
        }
    )
    rate = model.learning_rate
    defaults = {
        "batch_size": getattr(data, "batch_size", None),
        "learning_rate": rate,
        "submodel_learning_rate": model.submodel_learning_rate or rate,
        "num_epochs": recipe.epochs,
        "exit_loss_weight": model.exit_loss_weight,
        "detach_exits": model.detach_exits,
        "weight_decay": model.weight_decay,
        "warmup_fraction": model.warmup_fraction,
        "num_layers": model.num_layers,
    }
    defaults = {name: value for name, value in defaults.items() if value is not None}
    recommended = {
        **defaults,
        "submodel_learning_rate": model.submodel_learning_rate
        or max(rate, min(HEAD_RATE_FACTOR * rate, HEAD_RATE)),
        "detach_exits": model.exit_loss_weight > 0,
        "num_layers": min(model.num_layers, max(1, round(LAYERS_KEPT * model.encoder.num_layers))),
    }
    price = [{"lambda_reg": model.lambda_reg}] if model.lambda_reg > 0 else []
    return {"submodels": [submodels], "training": [recommended, defaults], "lambda_reg": price}
