"""Values to plain JSON and back; floats survive exactly. NaN and the infinities become strings: JSON has no word for them."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable
from enum import Enum
from typing import Any

from lightning_autolr.schedules.base import Schedule


def to_plain(value: Any) -> Any:
    """Turn nested dataclasses, sequences and numbers into dicts with a ``type``, lists and numbers.

    >>> from lightning_autolr.schedules import Rex
    >>> to_plain(Rex(num_steps=10))
    {'type': 'Rex', 'num_steps': 10, 'end': 0.0, 'd': 0.5}
    """
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # NumPy's numbers too: JSON knows only Python's
        if isinstance(value, numbers.Integral):
            return int(value)
        return float(value) if math.isfinite(value) else str(float(value))
    return value


def from_plain(value: Any, kinds: Iterable[type] = ()) -> Any:
    """Rebuild what :func:`to_plain` wrote, out of all schedules known to this process and the classes in ``kinds``.

    Raises:
        ValueError: a type or a field that this version does not know.
    """
    if isinstance(value, dict):
        known = {cls.__name__: cls for cls in (*kinds, *_subclasses(Schedule))}
        if value.get("type") not in known:
            raise ValueError(f"Expected a type out of {sorted(known)}, got {value.get('type')!r}.")
        cls = known[value["type"]]
        given, expected = value.keys() - {"type"}, {f.name for f in dataclasses.fields(cls) if f.init}
        if given - expected:
            raise ValueError(f"Expected fields of {cls.__name__} out of {sorted(expected)}, got {sorted(given)}.")
        return cls(**{name: from_plain(value[name], kinds) for name in given})
    if isinstance(value, (list, tuple)):
        return tuple(from_plain(v, kinds) for v in value)
    return float(value) if value in ("nan", "inf", "-inf") else value


def _subclasses(cls: type) -> Iterable[type]:
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
