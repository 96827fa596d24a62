"""What a sweep searches: distributions over keys of the configuration, from a YAML file.

    contrast.temperature: {loguniform: [0.05, 300]}
    method: {choice: [protocl, bankcl, distcl]}
    contrast.bank_length: {choice: [50, 100, 200], when: {method: [bankcl]}}

The distributions are Ray Tune's, by name and arguments. A key with `when` exists only where each of
these keys has one of these values; elsewhere it keeps the value of the sweep's own configuration.
A point of the space is a dictionary of values by key. Every point that can be known to be invalid
is refused before a trial starts: each end and each choice of every key, and all points of a grid.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import yaml
from ray import tune

from cluster.config import TrainConfig
from cluster.run_config import CHANGEABLE

Point = dict[str, Any]
# How a trial computes, and what decides where it is measured and where it leaves the warm-up.
SHARED = CHANGEABLE | {
    "fork", "seed", "contrast.start", "optimization.iterations", "optimization.global_batch",
    "optimization.reference_batch",
}  # fmt: skip
DISTRIBUTIONS = (
    "choice", "uniform", "quniform", "loguniform", "qloguniform",
    "randint", "qrandint", "lograndint", "qlograndint",
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """One key's distribution, and the values of other keys under which it exists."""

    name: str
    distribution: str
    arguments: list[Any]
    when: dict[str, list[Any]]

    def domain(self) -> Any:
        """Ray Tune's object. Raises ValueError where the arguments are not the distribution's."""
        make = getattr(tune, self.distribution)
        arguments = [self.arguments] if self.distribution == "choice" else self.arguments
        try:
            return make(*arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"space: {self.name}: {self.distribution} {self.arguments}: {error}"
            ) from None

    def extremes(self) -> list[Any]:
        """Every choice, else both ends."""
        if self.distribution == "choice":
            return self.arguments
        low, high = self.arguments[:2]
        return [low, high - 1 if "randint" in self.distribution else high]

    def has(self, value: Any) -> bool:
        """Whether it can be drawn."""
        ends = self.extremes()
        return value in ends if self.distribution == "choice" else ends[0] <= value <= ends[1]


@dataclass(frozen=True)
class Space:
    """All keys; those that a `when` names come before those that have it."""

    keys: list[Key]

    def domains(self) -> dict[str, Any]:
        return {key.name: key.domain() for key in self.keys}

    def cut(self, point: Point, base: TrainConfig) -> Point:
        """The point without the keys that do not exist in it, and without the base's own values."""
        cut: Point = {}
        for key in self.keys:
            exists = _exists(key, cut, base)
            if exists and key.name in point and point[key.name] != value_of(base, key.name):
                cut[key.name] = point[key.name]
        return cut

    def whole(self, point: Point, base: TrainConfig) -> Point | None:
        """Values of all keys that `cut` makes this point of; None if the space cannot draw it."""
        whole: Point = {}
        for key in self.keys:
            value = point.get(key.name, value_of(base, key.name))
            if not key.has(value):
                if _exists(key, point, base):
                    return None
                value = key.extremes()[0]  # any: it is cut away
            whole[key.name] = value
        return whole

    def grid(self, base: TrainConfig) -> list[Point]:
        """All combinations of choices. Raises ValueError if a key has a continuous distribution."""
        for key in self.keys:
            if key.distribution != "choice":
                raise ValueError(
                    f"space: {key.name} is {key.distribution}: a grid needs choice for every key"
                )
        combinations = itertools.product(*(key.arguments for key in self.keys))
        names = [key.name for key in self.keys]
        points = (self.cut(dict(zip(names, c, strict=True)), base) for c in combinations)
        return list(_distinct(points))

    def sample(self, count: int, seed: int, base: TrainConfig) -> list[Point]:
        """Up to `count` random points, all different: fewer where the space has no more."""
        draws = np.random.RandomState(seed)
        domains = self.domains()

        def draw() -> Point:
            values = {name: domain.sample(random_state=draws) for name, domain in domains.items()}
            return self.cut(_plain(values), base)

        return list(itertools.islice(_distinct(draw() for _ in range(20 * count)), count))


def _exists(key: Key, point: Point, base: TrainConfig) -> bool:
    known = {name: point.get(name, value_of(base, name)) for name in key.when}
    return all(known[name] in values for name, values in key.when.items())


def parse_space(text: str, base: TrainConfig) -> Space:
    """Read and check a space. Raises ValueError, in one line that names the key and the fix."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"space: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError("space: give keys of the configuration, each with {DISTRIBUTION: [...]}")
    keys = _ordered([_parse_key(str(name), entry, base) for name, entry in found.items()])
    for key in keys:
        key.domain()
        for value, *others in itertools.product(key.extremes(), *key.when.values()):
            try:
                with_values(base, dict(zip(key.when, others, strict=True)) | {key.name: value})
            except ValueError as error:
                raise ValueError(f"space: {key.name} can be {value!r}: {error}") from None
    return Space(keys)


def _ordered(keys: list[Key]) -> list[Key]:
    """Those that a `when` names before those that have it."""
    left, ordered = sorted(keys, key=lambda key: bool(key.when)), []
    while left:
        waiting = {key.name for key in left}
        ready = [key for key in left if not waiting & key.when.keys()]
        if not ready:
            raise ValueError(f"space: {left[0].name}: its `when` depends on itself: leave one out")
        ordered += ready
        left = [key for key in left if key not in ready]
    return ordered


def _parse_key(name: str, entry: Any, base: TrainConfig) -> Key:
    value_of(base, name)
    if any(name == key or name.startswith(f"{key}.") for key in SHARED):
        raise ValueError(
            f"space: {name} is one for all trials: leave it out, and set it by --{name} (further "
            "seeds by --search.seeds)"
        )
    options = dict(entry) if isinstance(entry, dict) else {}
    when = options.pop("when", {})
    if len(options) != 1 or not set(options) <= set(DISTRIBUTIONS):
        raise ValueError(
            f"space: {name}: {entry!r} is no distribution: give one of "
            f"{', '.join(DISTRIBUTIONS)}, as in {{loguniform: [0.05, 300]}}"
        )
    (distribution, arguments), *_ = options.items()
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"space: {name}: {distribution} needs a list, not {arguments!r}")
    texts = [argument for argument in arguments if isinstance(argument, str)]
    if texts and distribution != "choice":
        raise ValueError(
            f"space: {name}: {distribution} takes numbers, {texts[0]!r} is a text: YAML needs the "
            "point in 1.0e-5"
        )
    if not isinstance(when, dict) or [] in when.values():
        raise ValueError(
            f"space: {name}: when is {when!r}: give values of other keys, as in "
            "{method: [bankcl]}"
        )
    lists = {str(k): v if isinstance(v, list) else [v] for k, v in when.items()}
    for other in lists:
        value_of(base, other)
    return Key(name, distribution, arguments, lists)


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key. Raises ValueError, with the nearest key, if there is none."""
    for part in key.split("."):
        if not is_dataclass(config) or not hasattr(config, part):
            known, last = _keys(TrainConfig()), key.rpartition(".")[2]
            near = [name for name in known if name.endswith(f".{last}")]
            near += difflib.get_close_matches(key, known, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"space: the configuration has no key {key!r}{hint}")
        config = getattr(config, part)
    return config


def _keys(config: Any, prefix: str = "") -> list[str]:
    names = []
    for field in fields(config):
        value = getattr(config, field.name)
        inside = is_dataclass(value)
        names += _keys(value, f"{field.name}.") if inside else [field.name]
    return [prefix + name for name in names]


def with_values(config: Any, point: Point) -> Any:
    """The configuration with a point's values. Raises ValueError where it is invalid."""
    changes: dict[str, Any] = {}
    for key, value in point.items():
        section, _, rest = key.partition(".")
        if rest:
            changes.setdefault(section, {})[rest] = value
        else:
            changes[key] = _checked(config, key, value)
    for section, inner in changes.items():
        if is_dataclass(getattr(config, section)):
            changes[section] = with_values(getattr(config, section), inner)
    return replace(config, **changes)


def _checked(config: Any, name: str, value: Any) -> Any:
    """The value as its field's type has it."""
    hint = get_type_hints(type(config))[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, type(int | str)) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(kind, type) and type(value) is kind:
            return value
    allowed = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    if get_origin(hint) is Literal:
        allowed = f"one of {', '.join(map(str, get_args(hint)))}"
    raise ValueError(f"{name} is {value!r}: it must be {allowed}")


def _distinct(points: Iterable[Point]) -> Iterator[Point]:
    found: list[Point] = []
    for point in points:
        if point not in found:
            found.append(point)
            yield point


def _plain(values: dict[str, Any]) -> Point:
    """numpy's scalars as Python's."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
