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
from typing import Literal

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
    "day": {"person": 7, "car": 4, "tree": 4, "sign": 3, "roofs": (5, 16)},
    "night": {"person": 6, "car": 7, "tree": 2.5, "sign": 3, "roofs": (4, 26)},
}


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
    """Antialiased coverage 0..1 from the distance (m) inside an edge and pixels a metre."""
    return (inside * scale + 0.5).clip(0, 1)


class _Street:
    """Camera and buffers: albedo and emission (3, H, W), depth and labels (H, W)."""

    def __init__(self, domain: Domain, seed: int, height: int, width: int) -> None:
        self.rng = rng = np.random.Generator(np.random.Philox(key=[seed, domain == "night"]))
        self.night, self.town = domain == "night", TOWNS[domain]
        self.focal, self.eye = width * rng.uniform(0.8, 1.0), rng.uniform(1.4, 2.2)
        # Pixel centres, counted from the vanishing point.
        rows, columns = (np.arange(0.5, size, dtype=np.float32) for size in (height, width))
        self.row = rows[:, None] - height * rng.uniform(0.36, 0.52)
        self.column = columns - width * rng.uniform(0.38, 0.62)
        self.albedo, self.emission = np.zeros((2, 3, height, width), np.float32)
        self.depth = np.full((height, width), 1000, np.float32)
        self.labels = np.full((height, width), SKY, np.uint8)
        self.lane, parking = rng.uniform(2.8, 3.8), rng.uniform(0.3, 2.2)
        self.left, self.right = -1.5 * self.lane - parking, 0.5 * self.lane + parking
        self.walls = self.left - rng.uniform(3, 6.5), self.right + rng.uniform(3, 6.5)
        self.lights: list[tuple[float, float, float, np.ndarray]] = []  # x, y, z, colour * power

    def plane(self, x0: float, x1: float, top: float, z0: float, z1: float | None = None):
        """What the image shows of an upright plane: across the street at z0, or along it at x0.

        Returns its rows and columns (h x w), metres across u (1, w) and up v (h, w), pixels a
        metre, z; arrays broadcast to (h, w). u is x across the street and z - z0 along it.
        """
        near, far, rise = self.focal / z0, self.focal / (z1 or z0), self.eye - top
        columns = np.searchsorted(self.column, sorted((x0 * near, x1 * far)))
        rows = np.searchsorted(self.row[:, 0], (min(rise * near, rise * far) - 1, self.eye * near))
        at, column = (slice(*rows), slice(*columns)), self.column[None, slice(*columns)]
        z = z0 if z1 is None else self.focal * x0 / column
        u = column / near if z1 is None else z - z0
        return at, u, self.eye - self.row[at[0]] * (z / self.focal), self.focal / z, z

    def paint(self, plane, cover, color, label=None, emission=0.0) -> None:
        """Lay a colour (3, h, w) over the buffers where `cover` (h, w) is above 0."""
        at, *_, z = plane
        target = self.albedo[(slice(None), *at)]
        target += cover * (color - target)
        if self.night:
            target = self.emission[(slice(None), *at)]
            target += cover * (emission - target)
        if label is not None:
            solid = cover > 0.5
            np.copyto(self.labels[at], label, where=solid, casting="unsafe")
            np.copyto(self.depth[at], z, where=solid, casting="unsafe")

    def stamp(self, plane, label, *shapes, rough=0.1) -> None:
        """Paint shapes (kind, u0, u1, v0, v1, colour[, emission]) in order, with texture."""
        _, u, v, scale, _ = plane
        grain = _noise(u * 14 + self.rng.integers(256), v * 14)
        for kind, u0, u1, v0, v1, color, *emission in shapes:
            du, dv = (u1 - u0) / 2, (v1 - v0) / 2
            across, up = np.abs(u - (u0 + du)), np.abs(v - (v0 + dv))
            if kind == "disc":
                inside = (1 - np.hypot(across / du, up / dv)) * min(du, dv)
            elif kind == "leaves":  # a disc that frays
                inside = du * (1 + 0.25 * grain) - np.hypot(across, up)
            else:  # the top of a "cone" is narrower than that of a "box"
                side = du * (1 - 0.3 * (v - v0) / (v1 - v0)) if kind == "cone" else du
                inside = np.minimum(side - across, dv - up)
            self.paint(plane, _cover(inside, scale), color * (1 + rough * grain), label, *emission)

    def ground(self) -> None:
        """Pavement slabs, the road with its kerbs, and lane marks."""
        rng, top = self.rng, np.searchsorted(self.row[:, 0], 0.5)
        z = self.focal * self.eye / self.row[top:]
        x, scale = self.column * z / self.focal, self.focal / z
        plane = (slice(top, None), slice(None)), x, z, scale, z
        grain = 0.04 * _noise(x * 9, z * 5 + rng.integers(256)) * np.minimum(1, 8 / z)
        joints = np.minimum(np.abs(x / 0.9 % 1 - 0.5), np.abs(z / 0.9 % 1 - 0.5)) < 0.07
        tint = _rgb(*rng.uniform(-0.03, 0.03, 3)) + grain
        slabs = rng.uniform(0.34, 0.62) + tint - 0.08 * (joints & (z < 14))
        self.paint(plane, np.ones_like(x), slabs, PAVEMENT)
        asphalt = rng.uniform(0.28, 0.48) + tint + 0.03 * _noise(x * 2, z)
        inside, dash = np.minimum(x - self.left, self.right - x), rng.uniform(3, 6)
        self.paint(plane, _cover(inside, scale), asphalt, ROAD)
        self.paint(plane, _cover(0.12 - np.abs(inside + 0.1), scale), asphalt + 0.17)
        marks = _cover(0.09 - np.abs(x + self.lane / 2), scale) * (z % (2 * dash) < dash)
        self.paint(plane, 0.85 * marks, 0.78 + grain)

    def house(self, plane, top: float) -> None:
        """A front with windows and perhaps a shop; at night some windows are lit."""
        rng, (_, u, v, scale, _) = self.rng, plane
        tone = rng.uniform(0.25, 0.8) * _rgb(*1 + rng.uniform(-0.35, 0.35, 3) * rng.random())
        tone = tone + 0.05 * _noise(u * 4, v * 4)
        shop, pitch, storey = (v < 3) & (rng.random() < 0.5), rng.uniform(1.8, 3.4), 3.0
        a, b = u / pitch, v / storey
        wide = np.maximum(0.45 * shop, rng.uniform(0.18, 0.38)) - np.abs(a - np.floor(a) - 0.5)
        high = np.maximum(0.38 * shop, rng.uniform(0.2, 0.33)) - np.abs(b - np.floor(b) - 0.5)
        pane = _cover(np.minimum(wide * pitch, high * storey), scale) * (v < top - 0.4)
        lot = _noise(17 * np.floor(a) + rng.integers(256), 29 * np.floor(b))  # one draw a window
        glass = rng.uniform(0.12, 0.5) * _rgb(0.85, 1.0, 1.15) + 0.04 * lot
        warm = _rgb(1, rng.uniform(0.6, 0.85), rng.uniform(0.3, 0.7)) * rng.uniform(0.4, 1.2)
        lit = (lot + shop > rng.uniform(0, 1.6)) * pane * warm if self.night else 0.0
        self.paint(plane, _cover(top - v, scale), tone + pane * (glass - tone), BUILDING, lit)

    def houses(self) -> None:
        """Rows of houses with gaps on both sides, far to near, and often one across the end."""
        rng, (low, high) = self.rng, self.town["roofs"]
        if rng.random() < 0.6:
            self.house(self.plane(-60, 60, 16, rng.uniform(60, 110)), rng.uniform(5, 16))
        for x in self.walls:
            lengths, gaps = rng.uniform(7, 18, 7), rng.uniform(2, 9, 7) * (rng.random(7) < 0.4)
            starts, tops = np.cumsum(lengths + gaps) - lengths + 1, rng.uniform(low, high, 7)
            for z, length, top in zip(starts[::-1], lengths[::-1], tops, strict=True):
                x0, x1 = sorted((x, x + 14 * np.sign(x)))
                wall = rng.uniform(0.25, 0.7) * _rgb(*rng.uniform(0.8, 1.2, 3))
                self.stamp(self.plane(x0, x1, top, z), BUILDING, ("box", x0, x1, -1, top, wall))
                self.house(self.plane(x, x, top, z, z + length), top)

    def car(self, x: float, z: float) -> None:
        rng, black, glass = self.rng, _rgb(0.06, 0.06, 0.07), _rgb(0.15, 0.18, 0.22)
        body = rng.uniform(0.1, 0.8) * _rgb(*1 + rng.uniform(-0.7, 0.7, 3) * rng.random())
        oncoming = x < -self.lane / 2 and x > self.left + 1.6
        lamp = self.night * (_rgb(2.5, 2.3, 1.9) if oncoming else _rgb(1.2, 0.06, 0.04))
        if abs(x) > 1:  # the side towards the camera
            side = x - 0.9 * np.sign(x)
            self.stamp(self.plane(side, side, 1.5, z, z + 4.2), CAR,
                       ("box", 0, 4.2, 0.2, 0.95, 0.8 * body),
                       ("cone", 0, 3.4, 0.9, 1.5, 0.8 * body), ("cone", 0.4, 3, 1, 1.4, glass),
                       ("disc", 0.4, 1.1, 0, 0.65, black),
                       ("disc", 3, 3.7, 0, 0.65, black))  # fmt: skip
        x0, x1 = x - 0.9, x + 0.9
        self.stamp(self.plane(x0, x1, 1.5, z), CAR,
                   ("box", x0, x1, 0, 0.3, black), ("box", x0, x1, 0.22, 0.95, body),
                   ("cone", x0, x1, 0.9, 1.5, body),
                   ("cone", x0 + 0.15, x1 - 0.15, 0.98, 1.4, glass),
                   ("box", x - 0.27, x + 0.27, 0.45, 0.6, _rgb(0.8, 0.8, 0.7)),
                   ("box", x0 + 0.05, x0 + 0.4, 0.6, 0.82, _rgb(0.7, 0.3, 0.3), lamp),
                   ("box", x1 - 0.4, x1 - 0.05, 0.6, 0.82, _rgb(0.7, 0.3, 0.3), lamp))  # fmt: skip
        self.lights.append((x, 0.6, z - 1.5, lamp * (0.7 if oncoming else 0.2)))

    def person(self, x: float, z: float) -> None:
        rng, tall, step = self.rng, self.rng.uniform(1.5, 1.9), self.rng.uniform(0.1, 0.2)
        coat, legs = (b * _rgb(*rng.uniform(0.5, 1.2, 3)) for b in rng.uniform(0.1, 0.7, 2))
        self.stamp(self.plane(x - 0.5, x + 0.5, tall, z), PERSON,
                   ("box", x - step - 0.1, x - step + 0.1, 0, tall / 2, legs),
                   ("box", x + step - 0.1, x + step + 0.1, 0, tall / 2, legs),
                   ("cone", x - 0.36, x + 0.36, tall * 0.42, tall * 0.85, coat),
                   ("disc", x - 0.15, x + 0.15, tall * 0.83, tall,
                    rng.uniform(0.4, 1.1) * _rgb(0.75, 0.55, 0.45)))  # fmt: skip

    def tree(self, x: float, z: float) -> None:
        rng, high, r = self.rng, self.rng.uniform(4.5, 7.5), self.rng.uniform(0.8, 1.4)
        leaf = _rgb(0.28, 0.36, 0.16) * _rgb(*rng.uniform(0.6, 1.5, 3))
        at = rng.uniform((x - r, 0.45 * high), (x + r, 0.85 * high), (6, 2))
        self.stamp(self.plane(x - 4, x + 4, high + 2, z), TREE,
                   ("box", x - 0.18, x + 0.18, 0, high * 0.6, _rgb(0.3, 0.23, 0.17)),
                   *(("leaves", u - r, u + r, v - r, v + r, leaf * (0.6 + 0.5 * v / high))
                     for u, v in at), rough=0.25)  # fmt: skip

    def pole(self, x: float, z: float, high: float) -> None:
        thick = max(0.15, 1.5 * z / self.focal)  # at least 3 pixels wide
        shape = ("box", x - thick, x + thick, 0, high, self.rng.uniform(0.15, 0.4) * _rgb(1, 1, 1))
        self.stamp(self.plane(x - 1, x + 1, high, z), POLE, shape)

    def sign(self, x: float, z: float) -> None:
        rng, r = self.rng, self.rng.uniform(0.5, 0.75)
        kind = rng.choice(["disc", "box", "cone"])
        rim = _rgb(*rng.choice([(0.75, 0.1, 0.1), (0.1, 0.2, 0.65), (0.8, 0.7, 0.1)]))
        face = (rng.choice([0.3, 0.85]) * _rgb(1, 1, 1), 0.6 * r)
        shapes = [(kind, x - s, x + s, 2.6 - s, 2.6 + s, color) for color, s in ((rim, r), face)]
        self.pole(x, z, 2.6)
        self.stamp(self.plane(x - 1, x + 1, 3.4, z), SIGN, *shapes)

    def lamp(self, x: float, z: float) -> None:
        """A post with its head above the road; at night some are out."""
        rng, high, end = self.rng, self.rng.uniform(5, 7), x - 1.4 * np.sign(x)
        power = _rgb(1, *rng.choice([(0.6, 0.25), (0.85, 0.7)])) * (rng.random() < 0.75)
        power, (x0, x1) = power * self.night, sorted((x, end))
        self.pole(x, z, high)
        self.stamp(self.plane(x0 - 0.4, x1 + 0.4, high + 0.2, z), POLE,
                   ("box", x0, x1, high - 0.12, high + 0.12, _rgb(0.35, 0.35, 0.35)),
                   ("box", end - 0.4, end + 0.4, high - 0.25, high, _rgb(0.5, 0.5, 0.5), 3 * power)
                   )  # fmt: skip
        self.lights.append((end, high, z, 2.2 * power))

    def things(self) -> None:
        """Whatever stands in the street, far to near."""
        rng, town, left, right = self.rng, self.town, self.left, self.right
        bays = [(x, z) for x in (-self.lane, 0, left + 1.1, right - 1.1) for z in range(7, 48, 7)]
        todo = [(z, self.car, x) for x, z in rng.permutation(bays)[: rng.poisson(town["car"])]]
        for kind, far in ((self.person, 12), (self.tree, 40), (self.sign, 16)):
            for _ in range(rng.poisson(town[kind.__name__])):
                x = rng.choice([left - rng.uniform(0.3, 2), right + rng.uniform(0.3, 2)])
                if kind == self.person and rng.random() < 0.25:
                    x = rng.uniform(left, right)
                todo.append((rng.uniform(4.5, far), kind, x))
        step, first = rng.uniform(12, 20), rng.uniform(5, 12)
        todo += [(first + step * i, self.lamp, (left - 0.4, right + 0.4)[i % 2]) for i in range(5)]
        for z, painter, x in sorted(todo, key=lambda thing: -thing[0]):
            painter(x + rng.uniform(-0.2, 0.2), z)

    def by_day(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Radiance (3, H, W) of the points x, y, z under sun and sky, with shadow and haze."""
        rng = self.rng
        from_wall = x - self.walls[0] if rng.random() < 0.5 else self.walls[1] - x
        roof, slope = rng.uniform(*self.town["roofs"]), rng.uniform(0.5, 2.5)
        sunny = _cover(y + from_wall * slope - roof, 0.7)
        sky = _rgb(0.5, 0.66, 0.86) + rng.random() * _rgb(0.25, 0.12, -0.06) + 0.003 * self.row
        sky = sky + 0.04 * _blur(
            _noise(self.column * 0.4 + rng.integers(256), self.row * 0.8), 1, 2
        )
        sky, clear = sky * rng.uniform(0.85, 1.1), np.exp(-z / rng.uniform(90, 400))
        lit = self.albedo * (rng.uniform(0.6, 0.95) + rng.uniform(0, 0.7) * sunny)
        return np.where(self.labels == SKY, sky, sky + clear * (lit - sky))

    def by_night(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Radiance (3, H, W) of the points x, y, z under lamps, with a wet road, glow and mist."""
        rng, (height, width) = self.rng, self.labels.shape
        light = rng.uniform(0.1, 0.4) * _rgb(0.6, 0.75, 1.0) * np.ones_like(x)
        for lx, ly, lz, power in self.lights:
            flat = (x - lx) ** 2 + (z - lz) ** 2
            cone = (1.5 * (ly + 1 - y) / np.sqrt(flat + 1)).clip(0, 1)  # lamps shine downwards
            light += power * (cone / (1 + (flat + (y - ly) ** 2) / 14))
        beam = np.exp(-((x / (1 + 0.25 * z)) ** 2) - np.maximum(y - 0.7, 0) ** 2)
        beam /= 1 + (z / 9) ** 2  # the camera's own headlights
        light += rng.uniform(0.3, 1.2) * _rgb(1, 0.95, 0.8) * beam
        sky = rng.uniform(0.02, 0.25) * _rgb(1, 0.7, 0.5) * np.exp(np.minimum(self.row, 0) / 18)
        sky = sky + rng.uniform(0.01, 0.15) * _rgb(0.6, 0.7, 1)
        seen = np.where(self.labels == SKY, sky, self.albedo * light + self.emission)
        # A point at row r of a thing at depth z shows again as far below the thing's foot.
        row = np.round(2 * self.focal * self.eye / z - 2 * self.row + np.arange(height)[:, None])
        hit = (row >= 0) & (row < height) & (self.labels != ROAD) & (self.labels != PAVEMENT)
        target = (row * width + np.arange(width))[hit].astype(np.int64)
        mirror = [np.bincount(target, plane[hit], height * width) for plane in seen]
        mirror = _blur(np.float32(mirror).reshape(seen.shape), 3.5, 0.8)
        puddles = (0.5 + 0.5 * _noise(x * 2, z * 2)).clip(0, 1.3) * (self.labels == ROAD)
        seen += rng.uniform(0.2, 0.9) * puddles * mirror
        glow = 0.5 * _blur(self.emission, 2, 2) + 0.7 * _blur(self.emission, 8, 8)
        mist = (1 - np.exp(-z / rng.uniform(150, 400))) * _rgb(0.05, 0.037, 0.027)
        seen = _blur(seen + rng.uniform(0.3, 0.8) * glow + mist, 0.5, 0.5)
        return 1 - np.exp(-rng.uniform(1, 1.6) * seen)


def render(
    domain: Domain, seed: int, height: int = 96, width: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """One picture (H, W, 3) uint8 and its labels (H, W) uint8; 255 where there is no label."""
    street = _Street(domain, seed, height, width)
    street.ground()
    street.houses()
    street.things()
    rng, metres = street.rng, street.depth / street.focal
    light = street.by_night if street.night else street.by_day
    picture = light(street.column * metres, street.eye - street.row * metres, street.depth)
    sigma = rng.uniform(0.015, 0.04) if street.night else rng.uniform(0.005, 0.02)
    picture += sigma * rng.standard_normal(picture.shape, np.float32)
    # As in real recordings, the bonnet of the camera's car and the frame have no label.
    arch = height * (1 - 0.08 * rng.random() * np.cos(np.linspace(-1.3, 1.3, width)))
    bonnet = np.arange(height)[:, None] > arch
    picture = np.where(bonnet, picture.mean() * (0.3 + 0.3 * rng.random()), picture)
    street.labels[bonnet] = street.labels[:, [0, -1]] = TAXONOMY.ignore_index
    return (picture.clip(0, 1).transpose(1, 2, 0) * 255).astype(np.uint8), street.labels


def write_dataset(
    folder: Path, *, domain: Domain, count: int, seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:  # fmt: skip
    """Write images/NAME.png, labels/NAME.png and classes.json; other seeds give other streets.

    `progress` wraps the iterable over the pictures, as `tqdm.tqdm` does.
    """
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(TAXONOMY.to_dict(), indent=2) + "\n")
    for index in progress(range(count)):
        picture, labels = render(domain, seed * 1_000_000 + index)
        file = f"{domain}_{index:05d}.png"
        write_png(torch.from_numpy(picture).permute(2, 0, 1), str(folder / "images" / file))
        write_png(torch.from_numpy(labels)[None], str(folder / "labels" / file))
