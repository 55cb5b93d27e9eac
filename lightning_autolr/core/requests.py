"""What a search may ask for, and what it is told.

A search is a generator: it yields a request (:class:`Probe`, :class:`LineProbe` or :class:`Train`) and receives the answer.
Requests and answers hold ids and plain numbers, never tensors, so the list of (request, answer) pairs *is* the state of a
search: it is what is written to disk, saved in checkpoints, replayed on resume and drawn in figures.

Requests are equal when they ask for the same work. What only describes it, for people (``label``, ``reason``) or for figures
and tables (``kind``, ``forecast_horizon``, ``estimator``, ``rule``), is not compared: a run can be resumed by a version that
words it otherwise, or describes more. Figures and tables never depend on the wording.

All losses are means over ranks. A step is one optimizer step (one batch under manual optimization).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any, Literal

from lightning_autolr.schedules import Constant, Schedule, Segment, from_plain

__all__ = [
    "Answer",
    "Evaluation",
    "LineProbe",
    "LineResult",
    "Probe",
    "ProbeResult",
    "Request",
    "Requests",
    "Run",
    "Status",
    "Train",
    "TrainResult",
    "decode",
    "diverged",
    "private_steps",
]


class Status(str, Enum):
    """How a piece of training ended. A bad end is an answer, never an exception."""

    OK = "ok"
    DIVERGED = "diverged"  # see :func:`diverged`; the steps after that loss were not made


def diverged(loss: float, stop_above: float | None) -> bool:
    """Whether a training loss ends a probe or a piece of training: not finite, or above the limit, if there is one.

    >>> [diverged(x, stop_above=None) for x in (1e9, math.inf, math.nan)]
    [False, True, True]
    >>> [diverged(x, stop_above=2.0) for x in (2.0, 2.1)]
    [False, True]
    """
    return not math.isfinite(loss) or (stop_above is not None and loss > stop_above)


@dataclass(frozen=True)
class Run:
    """What a search may know of the run before it starts.

    Args:
        total_steps: optimizer steps the run will make, or None when nobody knows.
        lr: the largest learning rate among the optimizer's parameter groups, as the user configured it.
        has_validation: whether ``evaluate="validation"`` can be asked for.
        steps_per_epoch: optimizer steps in one epoch, or None when nobody knows.
        count_search: whether ``total_steps`` is for search and training together. The run then ends with the search.
    """

    total_steps: int | None = None
    lr: float = 1e-3
    has_validation: bool = True
    steps_per_epoch: int | None = None
    count_search: bool = False


@dataclass(frozen=True)
class Probe:
    """Train privately, evaluate, and put everything back.

    From state ``start``, make ``num_steps`` optimizer steps at ``lr * shape(step)``, then evaluate. With ``num_steps=0`` it
    only evaluates.

    Args:
        lr: learning rate of the group with the largest one, > 0; the others follow in their own ratio.
        num_steps: optimizer steps, >= 0.
        draw: number of the draw of batches. Probes of one draw see the same batches in the same order with the same random
            numbers, so that their difference is the learning rate's; another draw brings other batches.
        offset: the first step's position in the draw (a probe made in two parts continues at its own offset).
        shape: factor on ``lr`` at step ``0 ... num_steps - 1`` of this probe.
        start: id of a kept state; None is the state of the real run.
        keep_end: keep the state at the end and answer with its id.
        evaluate: what scores it at the end: the validation batches, training batches held out from the draw ("holdout"), the
            training losses of the second half of its own steps ("train"), which cost nothing, or nothing.
        evaluate_every: evaluate also after every so many steps; not with "train".
        update_bn: evaluate with running statistics of batch normalisation that are taken anew from the evaluation batches, in
            one more pass over them; the ones from training lag behind at a high learning rate. What is kept has the latter.
        permuted: begin with the weights' entries in another order: a network that has learnt nothing.
        stop_above: a training loss above this counts as diverged.
        stage: number of the stage, for the trace, figures and progress.
        label: what the user reads in the progress bar.
        kind: its part in the search, for figures and tables: a "candidate", a "coarse" one for the order of magnitude, a child
            in a "beam", a piece of a climb of a "range test", or a "look" at the loss of the weights as they are.
        forecast_horizon: steps after which the loss is forecast, >= 1, where a forecast is the score; None elsewhere.
        estimator: of that forecast, see :func:`~lightning_autolr.core.forecast.forecast`; None without one.
        rule: of a range test, see :class:`~lightning_autolr.search.range_test.RangeTest`; None elsewhere.
        release: ids of kept states which are not needed after this request.
    """

    lr: float
    num_steps: int
    draw: int = 0
    offset: int = 0
    shape: Schedule = field(default=Constant())
    start: str | None = None
    keep_end: bool = False
    evaluate: Literal["validation", "holdout", "train", "none"] = "validation"
    evaluate_every: int | None = None
    update_bn: bool = False
    permuted: bool = False
    stop_above: float | None = None
    stage: int = 0
    label: str = field(default="", compare=False)
    kind: Literal["candidate", "coarse", "beam", "range test", "look"] = field(default="candidate", compare=False)
    forecast_horizon: int | None = field(default=None, compare=False)
    estimator: Literal["bounded", "reference"] | None = field(default=None, compare=False)
    rule: Literal["steepest", "valley", "minimum", "edge"] | None = field(default=None, compare=False)
    release: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        if self.num_steps < 0 or self.offset < 0 or self.draw < 0:
            raise ValueError(
                f"Expected num_steps, offset and draw >= 0, got "
                f"num_steps={self.num_steps!r}, offset={self.offset!r} and draw={self.draw!r}."
            )
        _resolve_shape(self)
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ValueError(f"Expected evaluate_every >= 1 or None, got evaluate_every={self.evaluate_every!r}.")
        if self.evaluate == "train" and (self.num_steps < 2 or self.evaluate_every is not None):
            raise ValueError(  # the loss before the first step knows nothing of the learning rate
                f"Expected two steps or more, and no evaluate_every, with evaluate='train', got "
                f"num_steps={self.num_steps!r} and "
                f"evaluate_every={self.evaluate_every!r}."
            )
        if (self.forecast_horizon is None) != (self.estimator is None):
            raise ValueError(
                f"Expected both or neither, got forecast_horizon={self.forecast_horizon!r} and estimator={self.estimator!r}."
            )


@dataclass(frozen=True)
class LineProbe:
    """One update direction, and the loss at several distances along it; forward passes only.

    Args:
        lr: learning rate at factor 1, > 0.
        factors: multiples of the update to evaluate, each >= 0.
        draw: number of the draw of batches; the direction comes from its first ``horizon`` steps.
        horizon: optimizer steps that make the direction, >= 1.
        evaluate_on: the batch of the direction's last step, the batch after it, or the validation batches.
        exact: make the steps anew at each ``lr * factor`` instead of moving along one direction (any optimizer, slower).
        start: id of a kept state; None is the state of the real run.
        stage: see :class:`Probe`.
        label: see :class:`Probe`.
    """

    lr: float
    factors: tuple[float, ...]
    draw: int = 0
    horizon: int = 1
    evaluate_on: Literal["same", "next", "validation"] = "next"
    exact: bool = False
    start: str | None = None
    stage: int = 0
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        if not self.factors or not all(math.isfinite(f) and f >= 0 for f in self.factors):
            raise ValueError(f"Expected at least one factor, all finite and >= 0, got factors={self.factors!r}.")
        if self.horizon < 1:
            raise ValueError(f"Expected horizon >= 1, got horizon={self.horizon!r}.")


@dataclass(frozen=True)
class Train:
    """Train for real, through the Trainer's own loop.

    Args:
        lr: learning rate of the group with the largest one, > 0; the others follow in their own ratio.
        num_steps: optimizer steps, >= 1; None is "until the run ends".
        shape: factor on ``lr`` at step ``0 ...`` of this segment.
        momentum: momentum (SGD) or first beta (Adam family) at each step, or None to leave it alone.
        start: id of a kept state to go back to first; None goes on from here.
        keep_start: keep the state before the first step and answer with its id, so that the segment can be undone.
        stop_above: a training loss above this ends the segment as diverged.
        diverges: whether its last step ends it as diverged, where that is known beforehand, as in a replay; None: its losses
            tell, where a state is kept or a limit given.
        grad_norm: record the gradient norm of each step, "l2" or "l1".
        stage: number of the stage.
        goes_on: whether it goes on with the training before it, cut into pieces: what the module's own schedulers do is
            counted from where that began.
        label: what the user reads.
        reason: one sentence: why this learning rate.
        kind: for figures: "climb" is AutoWU's warm-up until its minimum is passed, "training" is all the rest.
        release: ids of kept states which are not needed after ``start`` has been restored.
    """

    lr: float
    num_steps: int | None
    shape: Schedule = field(default=Constant())
    momentum: Schedule | None = None
    start: str | None = None
    keep_start: bool = False
    stop_above: float | None = None
    diverges: bool | None = None
    grad_norm: Literal["l1", "l2"] | None = None
    goes_on: bool = False
    stage: int = 0
    label: str = field(default="", compare=False)
    reason: str = field(default="", compare=False)
    kind: Literal["training", "climb"] = field(default="training", compare=False)
    release: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"Expected num_steps >= 1 or None, got num_steps={self.num_steps!r}.")
        _resolve_shape(self)


@dataclass(frozen=True)
class Evaluation:
    """The losses of the evaluation batches, one each, after ``step`` steps of the probe; or those of its later steps.

    ``name`` says what they are where it is not "val_loss" or a training loss: the monitored value, and "-val_acc" where more of
    it is better.
    """

    step: int
    losses: tuple[float, ...]
    name: str = field(default="", compare=False)

    @property
    def mean(self) -> float:
        return math.fsum(self.losses) / len(self.losses) if self.losses else math.nan

    @classmethod
    def of_training(cls, losses: Sequence[float]) -> Evaluation:
        """The training losses of the second half of the steps: ``evaluate="train"``.

        Raises:
            ValueError: there are none.

        >>> Evaluation.of_training([4.0, 3.0, 2.0, 1.0])
        Evaluation(step=4, losses=(2.0, 1.0), name='')
        """
        if not losses:
            raise ValueError(
                "Expected training losses to score a candidate by, got none: `training_step` neither returns a loss nor logs "
                "one. Do either, or use `objective='validation'`."
            )
        return cls(len(losses), tuple(losses[len(losses) // 2 :]))


@dataclass(frozen=True)
class ProbeResult:
    """Answer to a :class:`Probe`: ``losses`` has one training loss per step, before that step, up to a divergence.

    ``skipped`` are the steps, counted from 0, that gave no loss: ``training_step`` returned None, and nothing was learnt.
    ``steps_made`` is given where more steps were made than both: losses are read now and then, so a divergence is noticed late.
    """

    losses: tuple[float, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    status: Status = Status.OK
    end: str | None = None
    steps_made: int | None = None
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))  # comes as text from a file

    @property
    def num_steps(self) -> int:
        """Steps made: what the probe cost."""
        return len(self.losses) + len(self.skipped) if self.steps_made is None else self.steps_made

    @property
    def loss_steps(self) -> list[int]:
        """The step of each training loss, counted from 0."""
        skipped = set(self.skipped)
        steps = (step for step in range(len(self.losses) + len(skipped)) if step not in skipped)
        return list(islice(steps, len(self.losses)))

    @property
    def loss(self) -> float:
        """Mean loss of the last evaluation; inf when the probe diverged or the loss is not finite."""
        value = self.evaluations[-1].mean if self.evaluations and self.status is Status.OK else math.inf
        return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class LineResult:
    """Answer to a :class:`LineProbe`: one loss per factor.

    ``base`` is the training loss before the direction's first step, which comes with it at no cost; NaN when there is none.
    It is the loss at factor 0 where ``evaluate_on`` is "same" and the horizon 1, and a loss on another batch elsewhere: ask for
    factor 0 to compare with no step at all.
    """

    base: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class TrainResult:
    """Answer to a :class:`Train`: ``losses`` has one training loss per step made; ``start`` is the kept state's id.

    ``skipped`` are the steps, counted from 0, that gave no loss, see :class:`ProbeResult`; they count as steps all the same.
    ``steps_left`` is how many steps the run has left, where its length is not known beforehand but its end is: an estimate
    from ``Trainer(max_time=...)``, or what the user said; None when nobody knows.
    """

    losses: tuple[float, ...] = ()
    status: Status = Status.OK
    start: str | None = None
    grad_norms: tuple[float, ...] = ()
    steps_left: int | None = None
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))

    @property
    def num_steps(self) -> int:
        """Steps made."""
        return len(self.losses) + len(self.skipped)


Request = Probe | LineProbe | Train
Answer = ProbeResult | LineResult | TrainResult
Requests = Generator[Request, Any, None]


def private_steps(request: Request, answer: Answer) -> int:
    """Private steps that a request took; 0 for real training."""
    if isinstance(request, LineProbe):
        return request.horizon * (sum(factor > 0 for factor in request.factors) if request.exact else 1)
    return answer.num_steps if isinstance(answer, ProbeResult) else 0


def _check_lr(lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"Expected a finite learning rate > 0, got {lr=}.")


def _resolve_shape(request: Probe | Train) -> None:
    """An open shape is stretched over the request's own steps."""
    if not request.shape.is_resolved and request.num_steps:
        object.__setattr__(request, "shape", request.shape.stretched(request.num_steps))


def decode(value: Any) -> Any:
    """Rebuild requests, answers and schedules of which :func:`~lightning_autolr.schedules.to_plain` has made plain values.

    Lists come back as tuples; fields that an older version did not write, as defaults.

    >>> from lightning_autolr.schedules import to_plain
    >>> decode(to_plain(Probe(lr=0.1, num_steps=5))) == Probe(lr=0.1, num_steps=5)
    True

    Raises:
        ValueError: a ``type`` or a field that this version does not know.
    """
    kinds = (Segment, Probe, LineProbe, Train, Evaluation, ProbeResult, LineResult, TrainResult)
    return from_plain(value, kinds)
