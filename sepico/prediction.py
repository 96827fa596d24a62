"""From images to labels and confidences: whole or by windows, at several scales, mirrored.

import sepico

prediction = sepico.load("exported/").predict("street.jpg")
prediction.labels      # (H, W) uint8 train ids
prediction.confidence  # (H, W) float32, probability of the label
prediction.overlay()   # (H, W, 3) uint8
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image

from sepico import exported
from sepico.config import height_width
from sepico.import_official import load_official
from sepico.network import Segmentor
from sepico.taxonomies import TAXONOMIES, Taxonomy

OVERLAY_OPACITY = 0.6


@dataclass
class InferenceConfig:
    """How one image is predicted; labels and confidences always have the size of the image.

    Attributes:
        size: WIDTHxHEIGHT in pixels that an image is resized to before it enters the network;
            default: its own. Published results are of 1280x640 (Cityscapes) and 1280x720 (Dark
            Zurich).
        scales: Factors on that size; the probabilities of all scales are averaged.
        flip: Predict the mirrored image too and average.
        window: WIDTHxHEIGHT in pixels of a sliding window; default: the whole image at once.
        stride: WIDTHxHEIGHT in pixels from window to window; default: two thirds of the window.
    """

    size: str | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: str | None = None
    stride: str | None = None

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"inference.scales is {list(self.scales)}: give factors above 0")
        for name in ("size", "window", "stride"):
            height_width(f"inference.{name}", getattr(self, name))
        if self.stride and not self.window:
            raise ValueError("inference.stride is set without inference.window: give both")
        window, stride = self.window_size, self.stride_size
        if window and (stride[0] > window[0] or stride[1] > window[1]):
            raise ValueError(
                f"inference.stride {self.stride} is larger than inference.window {self.window}: "
                "pixels between the windows would have no prediction"
            )

    @property
    def input_size(self) -> tuple[int, int] | None:
        return height_width("inference.size", self.size)

    @property
    def window_size(self) -> tuple[int, int] | None:
        return height_width("inference.window", self.window)

    @property
    def stride_size(self) -> tuple[int, int] | None:
        if self.window and not self.stride:
            height, width = self.window_size
            return max(1, height * 2 // 3), max(1, width * 2 // 3)
        return height_width("inference.stride", self.stride)


@torch.no_grad()
def class_probabilities(network: Segmentor, images: Tensor, config: InferenceConfig) -> Tensor:
    """Images (B, 3, H, W) float32 on the 0..1 scale -> probabilities (B, C, H, W) float32.

    The network is called equally often for every image of one size.
    """
    size = tuple(images.shape[-2:])
    height, width = config.input_size or size
    total = 0.0
    for scale in config.scales:
        scaled = max(1, round(height * scale)), max(1, round(width * scale))
        resized = images if scaled == size else _resize(images, scaled, antialias=True)
        for mirrored in (False, True) if config.flip else (False,):
            view = network.normalize(resized.flip(-1) if mirrored else resized)
            logits = _logits(network, view, config, size)
            total = total + (logits.flip(-1) if mirrored else logits).softmax(1)
    return total / (len(config.scales) * (2 if config.flip else 1))


def _logits(
    network: Segmentor, view: Tensor, config: InferenceConfig, size: tuple[int, int]
) -> Tensor:
    """Logits of a normalised view, in the images' `size`."""
    height, width = view.shape[-2:]
    if config.window_size is None:
        # From the network's grid to the size that is asked for at once.
        return _resize(network(view, projections=False)[0], size)
    window = min(config.window_size[0], height), min(config.window_size[1], width)
    stride = config.stride_size
    total, visits = 0.0, view.new_zeros(1, 1, height, width)
    for y in _starts(height, window[0], stride[0]):
        for x in _starts(width, window[1], stride[1]):
            rows, columns = slice(y, y + window[0]), slice(x, x + window[1])
            part = network(view[..., rows, columns], projections=False)[0]
            if isinstance(total, float):
                total = part.new_zeros(len(view), part.shape[1], height, width)
            total[..., rows, columns] += _resize(part, window)
            visits[..., rows, columns] += 1
    return _resize(total / visits, size)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin, so that they cover `length` and the last one ends at its end."""
    return [*range(0, length - window, stride), length - window]


def _resize(planes: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    if tuple(planes.shape[-2:]) == size:
        return planes
    return nn.functional.interpolate(
        planes, size, mode="bilinear", align_corners=False, antialias=antialias
    )


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    labels: np.ndarray  # (H, W) uint8 train ids
    confidence: np.ndarray  # (H, W) float32, the probability of the label, 0..1
    taxonomy: Taxonomy

    def colored(self) -> np.ndarray:
        """(H, W, 3) uint8 in the colours of the classes."""
        return self.taxonomy.paint(self.labels)

    def overlay(self) -> np.ndarray:
        """(H, W, 3) uint8: the colours laid over the image."""
        mixed = OVERLAY_OPACITY * self.colored() + (1 - OVERLAY_OPACITY) * self.image
        return mixed.round().astype(np.uint8)


class Predictor:
    """A network with its classes, ready to predict."""

    def __init__(
        self, network: Segmentor, taxonomy: Taxonomy, config: InferenceConfig | None = None
    ) -> None:
        self.network, self.taxonomy = network.eval(), taxonomy
        self.config = config or InferenceConfig()

    def to(self, device: str | torch.device) -> "Predictor":
        """The same predictor, its network on a device."""
        self.network.to(device)
        return self

    def predict(self, image: str | Path | np.ndarray | Tensor) -> Prediction:
        """Predict a file (JPEG or PNG, turned as its EXIF says) or (H, W, 3) uint8 RGB.

        Raises ValueError, in one line, for a file that is no 8-bit image.
        """
        if isinstance(image, (str, Path)):
            path = Path(image)
            if not path.is_file():
                raise ValueError(f"no image file {path}")
            planes = decode(path.read_bytes(), str(path))
        else:
            planes = torch.as_tensor(np.asarray(image)).permute(2, 0, 1)
        return self.predict_batch(planes[None])[0]

    @torch.no_grad()
    def predict_batch(self, images: Tensor) -> list[Prediction]:
        """Predict images of one size, (B, 3, H, W) uint8 RGB."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}: uint8 RGB with a last axis "
                "of 3 is needed"
            )
        device = self.network.mean.device
        batch = images.to(device).float() / 255
        confidence, labels = class_probabilities(self.network, batch, self.config).max(1)
        return [
            Prediction(image, label, sure, self.taxonomy)
            for image, label, sure in zip(
                images.permute(0, 2, 3, 1).cpu().numpy(),
                labels.byte().cpu().numpy(),
                confidence.cpu().numpy(),
                strict=True,
            )
        ]


def decode(data: bytes, name: str) -> Tensor:
    """An 8-bit JPEG or PNG -> (3, H, W) uint8 RGB, turned as its EXIF says; errors call it `name`.

    Raises ValueError, in one line.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        raise ValueError(f"{name} is a 16-bit PNG: convert it to 8 bits a channel")
    try:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError):
        raise ValueError(f"{name} does not decode as a JPEG or PNG: replace it") from None


def load(path: str | Path, config: InferenceConfig | None = None) -> Predictor:
    """A predictor from a folder that `jobs.export` wrote, or one of the authors' .pth files.

    Raises ValueError, in one line, for anything else.
    """
    if Path(path).suffix == ".pth":
        network = load_official(path)
        return Predictor(network, taxonomy_of_size(network.num_classes, str(path)), config)
    taxonomy = Taxonomy.from_dict(exported.describe(path)["taxonomy"])
    return Predictor(exported.load(path), taxonomy, config)


def taxonomy_of_size(num_classes: int, name: str) -> Taxonomy:
    """The classes of a checkpoint file that does not name them. Raises ValueError."""
    for taxonomy in TAXONOMIES.values():
        if taxonomy.num_classes == num_classes:
            return taxonomy
    known = ", ".join(str(taxonomy.num_classes) for taxonomy in TAXONOMIES.values())
    raise ValueError(f"{name} has {num_classes} classes, whose names are known for {known} only")
