"""Segmentor = encoder + decode head + projection head, one forward."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sepico.config import ModelConfig
from sepico.heads.daformer import DAFormerHead
from sepico.heads.deeplab import DeepLabV2Head
from sepico.heads.projection import PerLayerProjection, ProjectionHead
from sepico.mix_transformer import keep_less

SIZE_ERRORS = (AssertionError, RuntimeError)  # of networks, at images whose size they do not take


class _NoInitialisation(TorchFunctionMode):
    """Weights stay as they lie in memory: drawing them is most of what building a network costs."""

    drawing = ("normal_", "uniform_", "kaiming_uniform_", "erfinv_")
    scaling = ("mul_", "add_", "clamp_")  # what was drawn; of buffers they make what is used

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        of = args[0] if args else kwargs.get("tensor")
        if name in self.drawing or (name in self.scaling and isinstance(of, nn.Parameter)):
            return of
        return function(*args, **kwargs)


class Segmentor(nn.Module):
    """Logits and pixel embeddings of an image from one pass through the encoder.

    `autocast_dtype` runs the forward in that precision over float32 parameters. It is an
    attribute of the module, not a context around the caller: DeepSpeed switches off an autocast
    it finds outside its engine.
    """

    def __init__(self, config: ModelConfig, *, with_projection: bool) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        weights = config.encoder_weights if config.encoder_weights == "imagenet" else None
        # timm takes weights that lack some, and then says nothing.
        whole = config.encoder_weights and not config.encoder.startswith("tu-")
        with _NoInitialisation() if whole else nullcontext():
            self.encoder = smp.encoders.get_encoder(
                config.encoder, weights=weights, output_stride=config.output_stride
            )
        keep_less(self.encoder)
        widths = self.encoder.out_channels[-4:]
        self.head = _decode_head(config, widths)
        self.projection_stages = config.projection_stages
        self.projection = None
        if with_projection:
            kind = {"concat": ProjectionHead, "per_layer": PerLayerProjection}
            self.projection = kind[config.projection_mode](
                [widths[i] for i in config.projection_stages],
                config.projection_channels,
            )
        self.register_buffer("mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), False)
        self.autocast_dtype: torch.dtype | None = None

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 on the 0..1 scale -> what the encoder was trained on."""
        return (images - self.mean / 255) / (self.std / 255)

    def forward(
        self, images: Tensor, *, logits: bool = True, projections: bool = True
    ) -> tuple[Tensor | None, Tensor | list[Tensor] | None]:
        """Normalised images (B, 3, H, W) float32 -> logits (B, C, h, w), embeddings (B, A, h, w).

        Both are float32. Logits lie on the grid of the encoder's stride-4 stage (DAFormer) or its
        last one (DeepLab-v2), embeddings on that of the first projection stage; in per-layer mode
        they are a list, one per stage on its own grid. A part that is not asked for (or a
        projection head that was not built) is None and costs nothing.
        """
        fast = self.autocast_dtype
        with torch.autocast(images.device.type, fast) if fast else nullcontext():
            features = self.encoder(images.contiguous(memory_format=torch.channels_last))[-4:]
            # Some encoders (MiT) answer in another layout; the heads are faster in this one.
            features = [f.contiguous(memory_format=torch.channels_last) for f in features]
            scores = self.head(features).float() if logits else None
            embeddings = None
            if projections and self.projection is not None:
                embeddings = self.projection([features[i] for i in self.projection_stages])
        return scores, embeddings


def _decode_head(config: ModelConfig, widths: list[int]) -> nn.Module:
    if config.head == "deeplabv2":
        dilations = config.head_dilations or DeepLabV2Head.dilations
        return DeepLabV2Head(widths[-1], config.num_classes, dilations)
    dilations = config.head_dilations or DAFormerHead.dilations
    return DAFormerHead(widths, config.head_channels, config.num_classes, dilations, config.dropout)


def build_segmentor(config: ModelConfig, *, with_projection: bool = True) -> Segmentor:
    """Build the network and load the encoder's weights.

    Raises ValueError when the encoder is unknown or has no such output stride, or its weights
    file is missing or lacks keys.
    """
    if config.num_classes < 1:
        raise ValueError("model.num_classes is not set: give it, or train from a labelled set")
    try:
        segmentor = Segmentor(config, with_projection=with_projection)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error)[:100]  # the rest lists every encoder there is
        if isinstance(error, IndexError):
            reason = "it has too few stages"
        raise ValueError(
            f"model.encoder {config.encoder!r} cannot be built with model.output_stride "
            f"{config.output_stride}: {reason}..."
        ) from None
    if config.encoder_weights not in (None, "imagenet"):
        _load_encoder(segmentor.encoder, Path(config.encoder_weights))
    return segmentor


def build_blank(config: ModelConfig, *, with_projection: bool = True) -> Segmentor:
    """`build_segmentor` for weights that are loaded next: before, they are what lay in memory."""
    with _NoInitialisation():
        return build_segmentor(
            replace(config, encoder_weights=None), with_projection=with_projection
        )


@torch.no_grad()
def check_model(
    config: ModelConfig,
    crop: tuple[int, int],
    *,
    whole: Mapping[str, tuple[int, int]] | None = None,
    with_projection: bool = True,
) -> Segmentor:
    """Raise what building and training on crops (h, w) would, without a download.

    `whole` gives the size (h, w) of images that are not cropped by the URL of their data.

    Returns the network on the meta device: names and shapes without numbers. Raises ValueError for
    what `build_segmentor` refuses, for an encoder that takes no images of these sizes, and for a
    crop that is no whole multiple of the stride of logits or embeddings.
    """
    if config.encoder_weights == "imagenet":
        config = replace(config, encoder_weights=None)
    with _NoInitialisation():
        segmentor = build_segmentor(config, with_projection=with_projection)
    segmentor = segmentor.eval().to("meta")
    height, width = crop
    sizes = {f"{w}x{h} images of {url}": (h, w) for url, (h, w) in (whole or {}).items()}
    # The crop's come last: their grids are looked at below.
    sizes[f"crops of data.crop_height {height} and data.crop_width {width}"] = crop
    for images, size in sizes.items():
        try:
            grids = _grids(segmentor, *size)
        except SIZE_ERRORS as error:
            raise ValueError(
                f"model.encoder {config.encoder!r} takes no {images}: {size_error(error)}"
            ) from None
    # Where the crop does not divide, grids are rounded and hide their strides, which are 1 to 32.
    padded = [-(-size // 32) * 32 for size in crop]
    try:
        large = grids if padded == [height, width] else _grids(segmentor, *padded)
    except SIZE_ERRORS:  # an encoder for images of one size
        padded, large = [height, width], grids
    for (h, w), (_, of_padded) in zip(grids, large, strict=True):
        stride = padded[1] // of_padded
        if crop != (h * stride, w * stride):
            raise ValueError(
                f"data.crop_height {height} and data.crop_width {width} are no multiples of the "
                f"network's stride {stride}: choose multiples of it"
            )
    return segmentor


def _grids(segmentor: Segmentor, height: int, width: int) -> list[tuple[int, int]]:
    """Sizes (h, w) of logits and embeddings of a network on the meta device: no arithmetic."""
    logits, embeddings = segmentor(torch.zeros(1, 3, height, width, device="meta"))
    outputs = [logits, *(embeddings if isinstance(embeddings, list) else [embeddings])]
    # A projection head that was not built answers None.
    return [tuple(output.shape[-2:]) for output in outputs if output is not None]


def size_error(error: Exception) -> str:
    """The reason, in one line, of one of SIZE_ERRORS."""
    return (str(error) or "it asserts another size").splitlines()[0]


def load_weights_file(file: Path | BinaryIO, name: str) -> Any:
    """What a .safetensors file, else a .pth file holds, on the CPU; errors call it `name`.

    Nothing but tensors and plain containers is unpickled. Raises ValueError, in one line.
    """
    try:
        if name.endswith(".safetensors"):
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fails in many ways on what is no pickle
        lines = str(error).splitlines()
        reason = next((line for line in lines if "Unsupported" in line), type(error).__name__)
        raise ValueError(
            f"{name} is no weights file that loads safely: {reason.strip()[:120]}"
        ) from None


def _load_encoder(encoder: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"model.encoder_weights: no file {path}; give a path, 'imagenet' or null")
    weights = load_weights_file(path, str(path))
    target = getattr(encoder, "model", encoder)  # `tu-` encoders wrap the timm model
    try:
        # Files of whole classifiers hold a head that the encoder does not have. The encoders' own
        # `load_state_dict` takes no `strict` (MiT) or returns nothing (ResNet).
        result = nn.Module.load_state_dict(target, weights, strict=False)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"model.encoder_weights {path} does not fit: {error}") from None
    if result.missing_keys:
        raise ValueError(
            f"model.encoder_weights {path} lacks {len(result.missing_keys)} keys of the encoder, "
            f"first {result.missing_keys[0]!r}: is it a file of another encoder?"
        )
