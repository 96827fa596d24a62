"""Procedural street scenes in two domains: a labelled pair of data sets without a download.

`render` is a pure function of (domain, seed, height, width). A street is painted far to near into
albedo, emission, depth and labels, and lit afterwards. At night the light comes from lamps,
headlights and windows, and the wet road mirrors it: the shift differs from pixel to pixel, so
statistics of whole images (batch-norm's) cannot undo it. Axes in metres: x right, y up from the
ground, z ahead of the camera, which stands at x = z = 0.
"""

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torchvision.io import write_png

from sepico.taxonomies import Taxonomy

Domain = Literal["day", "night"]
TAXONOMY = Taxonomy(
    ("road", "pavement", "building", "sky", "tree", "car", "person", "pole", "sign"),
    ((128, 64, 128), (244, 35, 232), (70, 70, 70), (70, 130, 180), (107, 142, 35),
     (0, 0, 142), (220, 20, 60), (190, 153, 153), (220, 220, 0)),
)  # fmt: skip
ROAD, PAVEMENT, BUILDING, SKY, TREE, CAR, PERSON, POLE, SIGN = range(TAXONOMY.num_classes)
# Means of the Poisson counts of what stands in a street, and the range of its roofs in metres.
TOWNS = {
    "day": {"people": 6, "cars": 4, "trees": 4, "signs": 3, "roofs": (5, 16)},
    "night": {"people": 4, "cars": 7, "trees": 2.5, "signs": 3, "roofs": (4, 26)},
}


class _Plane(NamedTuple):
    """The part (h, w) of an image that a plane covers; each array broadcasts to (h, w)."""

    at: tuple[slice, slice]  # rows and columns in the image
    u: np.ndarray  # metres across
    v: np.ndarray  # metres up
    scale: np.ndarray | float  # pixels a metre
    z: np.ndarray | float


@lru_cache
def _tile() -> np.ndarray:
    """Periodic noise of unit variance, as strong in every octave: (256, 256) float32."""
    white = np.random.Generator(np.random.Philox(key=7)).standard_normal((256, 256))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)) + 1e-3
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency)
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Noise at texture coordinates (1, w), (h, 1) or (h, w): (h, w)."""
    return _tile()[np.floor(v).astype(np.int32) & 255, np.floor(u).astype(np.int32) & 255]


@lru_cache
def _gaussian(size: int, sigma: float) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.subtract.outer(np.arange(size), np.arange(size)) / sigma) ** 2)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


def _blur(image: np.ndarray, rows: float, columns: float) -> np.ndarray:
    """Gaussian blur of (..., H, W) with standard deviations in pixels."""
    return _gaussian(image.shape[-2], rows) @ image @ _gaussian(image.shape[-1], columns).T


def _rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None, None]


def _cover(inside: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Antialiased coverage 0..1 from the distance (m) inside an edge."""
    return np.clip(inside * scale + 0.5, 0, 1)


class _Street:
    """Camera and buffers: albedo and emission (3, H, W), depth and labels (H, W)."""

    def __init__(self, domain: Domain, seed: int, height: int, width: int) -> None:
        self.rng = rng = np.random.Generator(np.random.Philox(key=[seed, domain == "night"]))
        self.night, self.town = domain == "night", TOWNS[domain]
        self.focal, self.eye = width * rng.uniform(0.8, 1.0), rng.uniform(1.4, 2.2)
        self.row = np.arange(0.5, height, dtype=np.float32)[:, None] - height * rng.uniform(0.36, 0.52)
        self.column = np.arange(0.5, width, dtype=np.float32) - width * rng.uniform(0.38, 0.62)
        self.albedo, self.emission = np.zeros((2, 3, height, width), np.float32)
        self.depth = np.full((height, width), 1000, np.float32)
        self.labels = np.full((height, width), SKY, np.uint8)
        self.lane, parking = rng.uniform(2.8, 3.8), rng.uniform(0.3, 2.2)
        self.kerbs = (-1.5 * self.lane - parking, 0.5 * self.lane + parking)
        self.walls = self.kerbs + rng.uniform(1.8, 4.0, 2) * (-1, 1)
        self.lights: list[tuple[float, float, float, np.ndarray]] = []  # x, y, z, colour * power

    def _window(self, x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice]:
        """Rows and columns between two columns and two rows counted from the vanishing point."""
        rows = np.searchsorted(self.row[:, 0], (y0 - 1, y1))
        return slice(*rows), slice(*np.searchsorted(self.column, sorted((x0, x1))))

    def facing(self, x0: float, x1: float, top: float, z: float) -> _Plane:
        """The plane at depth z from the ground to a height, u = x."""
        s = self.focal / z
        at = self._window(x0 * s - 1, x1 * s + 1, (self.eye - top) * s, self.eye * s)
        return _Plane(at, self.column[None, at[1]] / s, self.eye - self.row[at[0]] / s, s, z)

    def beside(self, x: float, z0: float, z1: float, top: float) -> _Plane:
        """The plane at x along the street, u = z - z0."""
        near, far = self.focal / z0, self.focal / z1
        rise = min((self.eye - top) * near, (self.eye - top) * far)
        at = self._window(x * near, x * far, rise, self.eye * near)
        z = self.focal * x / self.column[None, at[1]]
        return _Plane(at, z - z0, self.eye - self.row[at[0]] * z / self.focal, self.focal / z, z)

    def paint(self, plane, cover, color, label=None, emission=0.0) -> None:
        """Lay a colour (3, h, w) over the buffers where `cover` (h, w) is above 0."""
        for buffer, value in ((self.albedo, color), (self.emission, emission)):
            target = buffer[:, *plane.at]
            target += cover * (value - target)
        if label is not None:
            solid = np.broadcast_to(cover > 0.5, self.labels[plane.at].shape)
            np.copyto(self.labels[plane.at], np.uint8(label), where=solid)
            np.copyto(self.depth[plane.at], plane.z, where=solid, casting="same_kind")

    def stamp(self, plane, label, *shapes, rough=0.1) -> None:
        """Paint shapes (kind, u0, u1, v0, v1, colour[, emission]) in order, with surface texture."""
        grain = _noise(plane.u * 14 + self.rng.integers(256), plane.v * 14)
        for kind, u0, u1, v0, v1, color, *emission in shapes:
            du, dv = (u1 - u0) / 2, (v1 - v0) / 2
            across, up = np.abs(plane.u - u0 - du), np.abs(plane.v - v0 - dv)
            if kind == "disc":
                inside = (1 - np.hypot(across / du, up / dv)) * min(du, dv)
                inside = inside + 0.3 * min(du, dv) * (label == TREE) * grain  # leaves fray the edge
            else:  # the top of a "cone" is narrower than that of a "box"
                side = du * (1 - 0.3 * (kind == "cone") * (plane.v - v0) / (v1 - v0)) - across
                inside = np.minimum(side, dv - up)
            color = color * (1 + rough * grain)
            self.paint(plane, _cover(inside, plane.scale), color, label, *emission)

    def ground(self) -> None:
        """Pavement slabs, the road with its kerbs, and lane marks."""
        rng, top = self.rng, np.searchsorted(self.row[:, 0], 0.5)
        z = self.focal * self.eye / self.row[top:]
        x, scale = self.column * z / self.focal, self.focal / z
        plane = _Plane((slice(top, None), slice(None)), x, z, scale, z)
        grain = _noise(x * 9, z * 5 + rng.integers(256)) * np.minimum(1, 8 / z)
        joints = np.minimum(np.abs(x / 0.9 % 1 - 0.5), np.abs(z / 0.9 % 1 - 0.5)) < 0.07
        tint = rng.uniform(-0.03, 0.03, (3, 1, 1)).astype(np.float32)
        slabs = rng.uniform(0.34, 0.62) + tint + 0.04 * grain - 0.08 * (joints & (z < 14))
        self.paint(plane, np.ones_like(x), slabs, PAVEMENT)
        asphalt = rng.uniform(0.28, 0.48) + tint + 0.035 * grain
        asphalt = asphalt + 0.03 * _noise(x * 2, z)
        inside, dash = np.minimum(x - self.kerbs[0], self.kerbs[1] - x), rng.uniform(3, 6)
        self.paint(plane, _cover(inside, scale), asphalt, ROAD)
        self.paint(plane, _cover(0.12 - np.abs(inside + 0.1), scale), asphalt + 0.17)
        marks = _cover(0.09 - np.abs(x + self.lane / 2), scale) * (z % (2 * dash) < dash)
        self.paint(plane, 0.85 * marks, _rgb(0.8, 0.8, 0.76) + 0.06 * grain)

    def house(self, plane: _Plane, top: float) -> None:
        """A front with courses, windows and perhaps a shop; at night some windows are lit."""
        rng, (_, u, v, scale, _) = self.rng, plane
        tone = rng.uniform(0.25, 0.8) * (1 + rng.uniform(-0.35, 0.35, (3, 1, 1)) * rng.random())
        tone = tone.astype(np.float32) + 0.05 * _noise(u * 4, v * 4)
        tone = tone * (1 - rng.choice([0, 0.14]) * (v / 0.45 % 1 < 0.3))
        shop, pitch, storey = (v < 3) & (rng.random() < 0.5), rng.uniform(1.8, 3.4), 3.0
        wide = np.where(shop, 0.45, rng.uniform(0.18, 0.38)) - np.abs(u / pitch % 1 - 0.5)
        high = np.where(shop, 0.38, rng.uniform(0.2, 0.33)) - np.abs(v / storey % 1 - 0.5)
        pane = _cover(wide * pitch, scale) * _cover(high * storey, scale) * (v < top - 0.4)
        lot = _noise(17 * np.floor(u / pitch) + rng.integers(256), 29 * np.floor(v / storey))
        glass = rng.uniform(0.12, 0.5) * _rgb(0.85, 1.0, 1.15) + 0.04 * lot
        lit = self.night * pane * (lot + shop > rng.uniform(0, 1.6))
        warm = _rgb(1, rng.uniform(0.6, 0.85), rng.uniform(0.3, 0.7)) * rng.uniform(0.4, 1.2)
        self.paint(plane, _cover(top - v, scale), tone + pane * (glass - tone), BUILDING, lit * warm)

    def houses(self) -> None:
        """Rows of houses with gaps on both sides, far to near, and often one across the end."""
        rng = self.rng
        if rng.random() < 0.6:
            self.house(self.facing(-60, 60, 16, rng.uniform(60, 110)), rng.uniform(5, 16))
        for x in self.walls:
            lengths, gaps = rng.uniform(6, 16, 8), rng.uniform(2, 9, 8) * (rng.random(8) < 0.35)
            starts, tops = 1.5 + np.cumsum(lengths + gaps) - lengths, rng.uniform(*self.town["roofs"], 8)
            for z, length, top in zip(starts[::-1], lengths[::-1], tops, strict=True):
                self.house(self.facing(*sorted((x, x + 14 * np.sign(x))), top, z), top)
                self.house(self.beside(x, z, z + length, top), top)

    def car(self, x: float, z: float, oncoming: bool) -> None:
        rng, black, glass = self.rng, _rgb(0.06, 0.06, 0.07), _rgb(0.15, 0.18, 0.22)
        body = rng.uniform(0.1, 0.8) * (1 + rng.uniform(-0.7, 0.7, (3, 1, 1)) * rng.random())
        lamp = self.night * (_rgb(2.5, 2.3, 1.9) if oncoming else _rgb(1.3, 0.06, 0.04))
        if abs(x) > 1:  # the side towards the camera
            plane = self.beside(x - 0.9 * np.sign(x), z, z + 4.2, 1.5)
            self.stamp(plane, CAR, ("box", 0, 4.2, 0.2, 0.95, 0.8 * body),
                       ("cone", 0, 3.4, 0.9, 1.5, 0.8 * body), ("cone", 0.4, 3, 1, 1.4, glass),
                       ("disc", 0.4, 1.1, 0, 0.65, black), ("disc", 3, 3.7, 0, 0.65, black))  # fmt: skip
        self.stamp(self.facing(x - 0.9, x + 0.9, 1.5, z), CAR,
                   ("box", x - 0.85, x + 0.85, 0, 0.3, black), ("box", x - 0.9, x + 0.9, 0.22, 0.95, body),
                   ("cone", x - 0.85, x + 0.85, 0.9, 1.5, body), ("cone", x - 0.7, x + 0.7, 0.98, 1.4, glass),
                   ("box", x - 0.27, x + 0.27, 0.45, 0.6, _rgb(0.8, 0.8, 0.7)),
                   *(("box", x + side - 0.17, x + side + 0.17, 0.6, 0.82, _rgb(0.7, 0.3, 0.3), lamp)
                     for side in (-0.68, 0.68)))  # fmt: skip
        if self.night:
            self.lights.append((x, 0.6, z - 1.5, lamp * 0.8))

    def person(self, x: float, z: float) -> None:
        rng, skin = self.rng, _rgb(0.75, 0.55, 0.45) * self.rng.uniform(0.4, 1.1)
        coat, legs = (rng.uniform(0.05, 0.75, (3, 1, 1)).astype(np.float32) for _ in range(2))
        tall, stride = rng.uniform(1.5, 1.9), rng.uniform(0.05, 0.2)
        self.stamp(self.facing(x - 0.5, x + 0.5, tall, z), PERSON,
                   ("box", x - stride - 0.1, x - stride + 0.1, 0, tall / 2, legs),
                   ("box", x + stride - 0.1, x + stride + 0.1, 0, tall / 2, legs),
                   ("cone", x - 0.32, x + 0.32, tall * 0.42, tall * 0.85, coat),
                   ("disc", x - 0.15, x + 0.15, tall * 0.83, tall, skin))  # fmt: skip

    def tree(self, x: float, z: float) -> None:
        rng, leaf = self.rng, _rgb(0.28, 0.36, 0.16) * self.rng.uniform(0.6, 1.5, (3, 1, 1))
        high, wide = rng.uniform(4.5, 8), rng.uniform(1.0, 1.9)
        at = rng.uniform((-1, 0.45, 0.6), (1, 0.85, 1.2), (6, 3)) * (wide * 0.7, high, wide)
        blobs = [("disc", x + u - r, x + u + r, v - r, v + r, leaf * (0.6 + 0.5 * v / high)) for u, v, r in at]
        self.stamp(self.facing(x - 4, x + 4, high + 2, z), TREE,
                   ("box", x - 0.18, x + 0.18, 0, high * 0.6, _rgb(0.3, 0.23, 0.17)), *blobs, rough=0.3)  # fmt: skip

    def sign(self, x: float, z: float) -> None:
        rng, size = self.rng, self.rng.uniform(0.4, 0.65)
        self.pole(x, z, 2.6)
        rim = _rgb(*rng.permutation([[0.75, 0.1, 0.1], [0.1, 0.2, 0.65], [0.8, 0.7, 0.1]])[0])
        kind = rng.choice(["disc", "box", "cone"])
        self.stamp(self.facing(x - 1, x + 1, 4, z), SIGN, *(
            (kind, x - size * s, x + size * s, 2.6 - size * s, 2.6 + size * s, color)
            for s, color in ((1, rim), (0.6, rng.choice([0.3, 0.85]) * _rgb(1, 1, 1)))))  # fmt: skip

    def pole(self, x: float, z: float, high: float) -> None:
        thick = max(0.09, 0.7 * z / self.focal)  # at least 1.4 pixels wide
        shape = ("box", x - thick, x + thick, 0, high, self.rng.uniform(0.2, 0.6) * _rgb(1, 1, 1))
        self.stamp(self.facing(x - 1, x + 1, high, z), POLE, shape)

    def lamp(self, x: float, z: float) -> None:
        """A post with its head above the road; some are out at night."""
        power = self.night * (self.rng.random() < 0.75) * _rgb(1, *self.rng.choice([(0.6, 0.25), (0.85, 0.7)]))
        high, end = self.rng.uniform(5, 7), x - 1.4 * np.sign(x)
        self.pole(x, z, high)
        self.stamp(self.facing(*sorted((x, end)), high + 0.2, z), POLE,
                   ("box", *sorted((x, end)), high - 0.12, high + 0.12, _rgb(0.35, 0.35, 0.35)),
                   ("box", end - 0.4, end + 0.4, high - 0.25, high, _rgb(0.5, 0.5, 0.5), 3 * power))  # fmt: skip
        self.lights.append((end, high, z, 2.2 * power))

    def things(self) -> None:
        """Whatever stands in the street, far to near."""
        rng, town, (left, right) = self.rng, self.town, self.kerbs
        cells = [(x, z) for x in (-self.lane, 0, left + 1.1, right - 1.1) for z in range(7, 48, 7)]
        todo = [(z + rng.uniform(-1, 1), self.car, x + rng.uniform(-0.3, 0.3), x == -self.lane)
                for x, z in rng.permutation(cells)[: rng.poisson(town["cars"])]]  # fmt: skip
        for painter, name, near, far in ((self.person, "people", 4, 22), (self.tree, "trees", 6, 45),
                                         (self.sign, "signs", 5, 22)):  # fmt: skip
            for _ in range(rng.poisson(town[name])):
                x = rng.choice([left - rng.uniform(0.3, 1.6), right + rng.uniform(0.3, 1.6)])
                if painter == self.person and rng.random() < 0.25:
                    x = rng.uniform(left, right)
                todo.append((rng.uniform(near, far), painter, x))
        step, first = rng.uniform(12, 20), rng.uniform(5, 12)
        todo += [(first + step * i, self.lamp, (left - 0.4, right + 0.4)[i % 2]) for i in range(5)]
        for z, painter, x, *more in sorted(todo, key=lambda thing: -thing[0]):
            painter(x, z, *more)

    def by_day(self) -> np.ndarray:
        """Radiance (3, H, W) under sun and sky, with the shadow of one row of houses and haze."""
        rng, x, y, _ = self.rng, *self.world()
        from_wall = x - self.walls[0] if rng.random() < 0.5 else self.walls[1] - x
        sunny = _cover(y + from_wall * rng.uniform(0.5, 1.8) - rng.uniform(*self.town["roofs"]), 0.7)
        light = rng.uniform(0.55, 0.85) + rng.uniform(0, 0.6) * sunny
        sky = _rgb(0.5, 0.66, 0.86) + rng.random() * _rgb(0.25, 0.12, -0.06)
        sky = sky + 0.05 * _noise(self.column * 0.4 + rng.integers(256), self.row * 0.8)
        sky = (sky + 0.003 * self.row) * rng.uniform(0.85, 1.1)
        clear = np.exp(-self.depth / rng.uniform(90, 400))
        lit = self.albedo * light
        return np.where(self.labels == SKY, sky, sky * (1 - clear) + lit * clear)

    def by_night(self) -> np.ndarray:
        """Radiance (3, H, W) under lamps and headlights, with a wet road, glow and mist."""
        rng, (x, y, z) = self.rng, self.world()
        light = rng.uniform(0.1, 0.2) * _rgb(0.6, 0.75, 1.0) * np.ones_like(x)
        for lx, ly, lz, power in self.lights:
            flat = (x - lx) ** 2 + (z - lz) ** 2
            cone = np.clip(1.5 * (ly + 1 - y) / np.sqrt(flat + 1), 0, 1)  # lamps shine downwards
            light += power * (cone / (1 + (flat + (y - ly) ** 2) / 14))
        beam = np.exp(-((x / (1 + 0.25 * z)) ** 2) - np.maximum(y - 0.7, 0) ** 2) / (1 + (z / 9) ** 2)
        light += rng.uniform(0.3, 1.2) * _rgb(1, 0.95, 0.8) * beam
        town_glow = np.exp(self.row / 18) * rng.uniform(0.02, 0.14) * _rgb(1, 0.7, 0.5)
        sky = town_glow + rng.uniform(0.01, 0.05) * _rgb(0.6, 0.7, 1)
        seen = np.where(self.labels == SKY, sky, self.albedo * light + self.emission)
        # A point at row r on a thing at depth z shows again as far below the thing's foot.
        height, width = self.labels.shape
        row = np.round(2 * self.focal * self.eye / z - 2 * self.row + np.arange(height)[:, None])
        hit = (row >= 0) & (row < height) & (self.labels != ROAD) & (self.labels != PAVEMENT)
        target = (row * width + np.arange(width))[hit].astype(np.int64)
        mirror = [np.bincount(target, plane[hit], height * width) for plane in seen]
        mirror = _blur(np.float32(mirror).reshape(seen.shape), 3.5, 0.8)
        puddles = np.clip(0.5 + 0.5 * _noise(x * 2, z * 2), 0, 1.3)
        wet = rng.uniform(0.2, 0.9) * (self.labels == ROAD) * puddles
        seen += wet * mirror
        glow = 0.5 * _blur(self.emission, 2, 2) + 0.7 * _blur(self.emission, 8, 8)
        mist = 1 - np.exp(-z / rng.uniform(150, 400))
        seen += rng.uniform(0.3, 0.8) * glow + 0.05 * mist * _rgb(1, 0.75, 0.55)
        seen = _blur(seen, *[rng.uniform(0.3, 0.7)] * 2)
        return 1 - np.exp(-rng.uniform(1.3, 2) * seen)

    def world(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates x, y, z of what each pixel shows: three (H, W)."""
        meters = self.depth / self.focal
        return self.column * meters, self.eye - self.row * meters, self.depth


def render(
    domain: Domain, seed: int, height: int = 96, width: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """One picture (H, W, 3) uint8 and its labels (H, W) uint8; the same arguments, the same bytes."""
    street = _Street(domain, seed, height, width)
    street.ground()
    street.houses()
    street.things()
    picture = street.by_night() if street.night else street.by_day()
    rng, labels = street.rng, street.labels
    sigma = np.float32(rng.uniform(0.02, 0.045) if street.night else rng.uniform(0.005, 0.02))
    picture = picture + sigma * rng.standard_normal(picture.shape, np.float32)
    # The bonnet of the car that carries the camera, and the frame, stay unlabelled.
    bonnet = street.row - street.row[-1] + rng.uniform(-2, 0.06) * 0.08 * height
    labels[:, [0, -1]] = TAXONOMY.ignore_index
    return (np.clip(picture, 0, 1).transpose(1, 2, 0) * 255).astype(np.uint8), labels


def write_dataset(
    folder: Path,
    *,
    domain: Domain,
    count: int,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Write `count` pictures: images/*.png, labels/*.png (the same names) and classes.json.

    Sets of one domain with different seeds share no picture. `progress` wraps the iterable over
    the pictures, as `tqdm.tqdm` does.
    """
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(TAXONOMY.to_dict(), indent=2) + "\n")
    for index in progress(range(count)):
        picture, labels = render(domain, seed * 1_000_000 + index)
        name = f"{domain}_{index:05d}.png"
        write_png(torch.from_numpy(picture).permute(2, 0, 1), str(folder / "images" / name))
        write_png(torch.from_numpy(labels)[None], str(folder / "labels" / name))
