"""A schedule as a table of segments: what a search found, or what gradient norms refined."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_autolr.schedules.base import Constant, Schedule, as_count, check_number, replace_field
from lightning_autolr.schedules.compose import join_momenta
from lightning_autolr.schedules.plain import from_plain, to_plain


@dataclass(frozen=True)
class Segment:
    """A piece of a table: ``num_steps`` optimizer steps at ``lr * shape(step)``, steps counted within the segment.

    Args:
        num_steps: optimizer steps, >= 0; without any it is left out of a training, unless it is the last one and the run goes
            on past the end.
        lr: learning rate (or factor) that the shape multiplies, >= 0; at 0 the weights stand still.
        shape: any schedule of factors; one with an open number of steps is stretched over the segment.
        undone: the steps were trained and then taken back. They count as steps all the same.
        back_to: before this segment, the state from before the segment with this index was restored; None: none was.
        momentum: momentum (SGD) or first beta (Adam family) at each step, or None to leave it alone.
        leaps: before this segment the run took up the end of a private probe (as beam search with several states does), which
            is not in the table: a replay has the same learning rates from here on, and other weights.
        goes_on: it goes on with the training before it, cut into pieces by a ratchet: what the module's own schedulers do
            (``on_scheduler="multiply"``) is counted from where that began.
        diverged: it was cut short by a divergence, and the run went on with the next segment at once, not when the next batch
            began; None: nobody knows, as in tables of older versions.
        as_left: that segment had begun by going back itself, and the restored state is the one that it went away from.
    """

    num_steps: int
    lr: float
    shape: Schedule = field(default=Constant())
    undone: bool = False
    back_to: int | None = None
    momentum: Schedule | None = None
    leaps: bool = False
    goes_on: bool = False
    diverged: bool | None = None
    as_left: bool = False

    def __post_init__(self) -> None:
        replace_field(self, "num_steps", as_count("num_steps", self.num_steps))
        check_number("lr", self.lr, low=0.0)
        if self.shape.absolute and self.lr != 1.0:
            raise ValueError(
                f"Expected a shape of factors, or lr=1 with one of learning rates, got lr={self.lr!r}, {self.shape}."
            )
        if not self.shape.is_resolved:
            replace_field(self, "shape", self.shape.stretched(self.num_steps))

    def __call__(self, step: float) -> float:
        # This product and no other: the run that found the segment computed it, and a replay has to get the same bits.
        return self.lr * self.shape(step)

    def stretched(self, num_steps: int) -> Segment:
        """The same segment over another number of steps, its shape in proportion; over none it is its own end."""
        if num_steps == self.num_steps or self.num_steps == 0:
            return dataclasses.replace(self, num_steps=num_steps)

        def in_proportion(schedule: Schedule) -> Schedule:
            if num_steps == 0:
                return Constant(schedule(self.num_steps))
            length = schedule.length
            return schedule if length is None else schedule.stretched(round(length * num_steps / self.num_steps))

        momentum = None if self.momentum is None else in_proportion(self.momentum)
        return dataclasses.replace(self, num_steps=num_steps, shape=in_proportion(self.shape), momentum=momentum)


def goes_back(value: Any) -> bool:
    """Whether a schedule has segments that were undone, at any depth: its values alone do not say how to repeat it.

    >>> from lightning_autolr.schedules import Scaled
    >>> table = Tabulated((Segment(2, 0.2, undone=True), Segment(2, 0.1, back_to=0)))
    >>> goes_back(Scaled(table, 0.5)), goes_back(Scaled(table.kept(), 0.5))
    (True, False)
    """
    if isinstance(value, Segment) and (value.undone or value.back_to is not None):
        return True
    if isinstance(value, tuple):
        return any(map(goes_back, value))
    return dataclasses.is_dataclass(value) and any(goes_back(getattr(value, f.name)) for f in dataclasses.fields(value))


@dataclass(frozen=True)
class Tabulated(Schedule):
    """Segments one after another: the record of a found schedule, exactly replayable.

    The value at a step is ``lr * shape(step within the segment)``, computed as in the run that found it, and written to
    disk without losing a bit, so a replay without any search trains the same weights (unless a segment leaps). Past the end
    the last segment goes on: its shape is held at its own end.

    Args:
        segments: at least one :class:`Segment`.
        absolute: True: values are learning rates (what a search found); False: factors (a refined schedule).

    Stretching scales all segments in proportion.

    >>> table = Tabulated((Segment(2, 0.1), Segment(4, 0.4, Constant(0.5))))
    >>> [table(step) for step in range(4)]
    [0.1, 0.1, 0.2, 0.2]
    >>> table.length
    6

    In YAML, read one from a file with the function as ``class_path``::

        schedule:
          class_path: lightning_autolr.schedules.Tabulated.from_file
          init_args: {path: schedule.json, num_steps: 5000}  # without num_steps: as it was found
    """

    segments: tuple[Segment, ...]
    absolute: bool = True

    def __post_init__(self) -> None:
        replace_field(self, "segments", tuple(self.segments))
        if not self.segments:
            raise ValueError("Expected at least one segment, got none.")
        for index, segment in enumerate(self.segments):
            if segment.back_to is not None and not 0 <= segment.back_to < index:
                raise ValueError(f"Expected segment {index} to go back to an earlier one, got {segment.back_to=}.")

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate((segment.num_steps for segment in self.segments[:-1]), initial=0))

    @property
    def length(self) -> int:
        return self._starts[-1] + self.segments[-1].num_steps

    def stretched(self, num_steps: int) -> Tabulated:
        total = self.length
        if num_steps == total or total == 0:
            return self
        ends = [round(end * num_steps / total) for end in (*self._starts, total)]
        pairs = zip(self.segments, itertools.pairwise(ends), strict=True)
        return dataclasses.replace(self, segments=tuple(s.stretched(stop - start) for s, (start, stop) in pairs))

    def __call__(self, step: float) -> float:
        index = max(bisect.bisect_right(self._starts, step) - 1, 0)
        return self.segments[index](step - self._starts[index])

    def without_empty(self) -> Tabulated:
        """The table without segments of zero steps; the last one stays, since the table goes on with it past its end."""
        kept: list[Segment] = []
        places: list[int] = []  # the state before each segment is the one before the kept segment of this index
        back_to, leaps, goes_on = None, False, True  # of the empty segments right before
        for index, segment in enumerate(self.segments):
            back_to = back_to if segment.back_to is None else places[segment.back_to]
            back_to = None if back_to == len(kept) else back_to  # nothing was trained since
            leaps, goes_on = leaps or segment.leaps, goes_on and segment.goes_on
            stays = segment.num_steps > 0 or index == len(self.segments) - 1
            places.append(len(kept) if stays or back_to is None else back_to)
            if stays:
                kept.append(dataclasses.replace(segment, back_to=back_to, leaps=leaps, goes_on=goes_on))
                back_to, leaps, goes_on = None, False, True
        return dataclasses.replace(self, segments=tuple(kept))

    def kept(self) -> Tabulated:
        """The table without the segments that were undone: the way to the final weights, without any going back.

        Raises:
            ValueError: all were undone.
        """
        kept = tuple(dataclasses.replace(s, back_to=None, as_left=False) for s in self.segments if not s.undone)
        return dataclasses.replace(self, segments=kept)

    def momentum_schedule(self) -> Schedule | None:
        return join_momenta([segment.momentum for segment in self.segments], self._starts)

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write ``schedule.json``; a reader sees the old file or the new one, never half of one."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(to_plain(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(target)

    @staticmethod
    def from_file(path: str | os.PathLike[str], num_steps: int | None = None) -> Tabulated:
        """Read what :meth:`to_file` wrote.

        Args:
            path: the file, ``schedule.json`` by custom.
            num_steps: for a run of another length: what was kept, stretched over so many steps. None: all, as it was found.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it does not hold a table.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"Expected a schedule written by Tabulated.to_file in {path}, got no such file.")
        try:
            value = from_plain(json.loads(Path(path).read_text(encoding="utf-8")), (Segment,))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected a schedule written by Tabulated.to_file in {path}, got: {error}") from error
        if not isinstance(value, Tabulated):
            raise ValueError(f"Expected a schedule written by Tabulated.to_file in {path}, got {value!r:.200}.")
        return value if num_steps is None else value.kept().stretched(as_count("num_steps", num_steps, low=1))
