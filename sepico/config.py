"""Configuration of the method: what is trained, with which losses, on which schedule.

Every field carries its meaning and unit; cross-field checks live in `__post_init__` and name the
fields and the fix. Iterations count at `optimization.reference_batch` images a step (the paper
uses 2): a run with a larger global batch takes fewer, larger steps over the same samples.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

Method = Literal["distcl", "bankcl", "protocl", "source_only"]
BatchNormMode = Literal["sync", "frozen", "local"]


def height_width(key: str, size: str | None) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT`, as a configuration says it, as (height, width). Raises ValueError."""
    if size is None:
        return None
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
        raise ValueError(f"{key} {size!r} must be WIDTHxHEIGHT, such as 1280x720")
    width, height = size.split("x")
    return int(height), int(width)


@dataclass
class ModelConfig:
    """The segmentor.

    Attributes:
        encoder: Encoder name of segmentation-models-pytorch, e.g. "mit_b5", "tu-resnet101c".
        encoder_weights: "imagenet" (downloads), a path to a .safetensors or .pth file in the
            encoder's own key order, or null for random initialisation.
        output_stride: Stride of the encoder's last stage; 16 and 8 replace strides by dilation,
            where the encoder can.
        head: Decode head: "daformer" fuses all four stages on the grid of the first, "deeplabv2"
            reads the last stage only.
        head_channels: Width of the DAFormer head.
        head_dilations: Dilations of the head's ASPP, empty for the published ones (daformer
            1, 6, 12, 18, where 1 is a plain 1x1 convolution; deeplabv2 6, 12, 18, 24).
        dropout: Dropout before the DAFormer head's classifier.
        projection_channels: Width A of the projection head.
        projection_stages: Encoder stages (0 = stride 4 ... 3 = the last) that feed the projection
            head.
        projection_mode: "concat" resizes these stages to the first of them, concatenates and
            projects them together; "per_layer" gives each a projection of its own.
        pixel_mean: Per-channel RGB mean on the 0..255 scale.
        pixel_std: Per-channel RGB standard deviation on the 0..255 scale.
        num_classes: Number of classes; 0 takes it from the source data set.
    """

    encoder: str = "mit_b5"
    encoder_weights: str | None = "imagenet"
    output_stride: Literal[8, 16, 32] = 32
    head: Literal["daformer", "deeplabv2"] = "daformer"
    head_channels: int = 256
    head_dilations: tuple[int, ...] = ()
    dropout: float = 0.1
    projection_channels: int = 512
    projection_stages: tuple[int, ...] = (0, 1, 2, 3)
    projection_mode: Literal["concat", "per_layer"] = "concat"
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    num_classes: int = 0

    def __post_init__(self) -> None:
        if not self.projection_stages or not set(self.projection_stages) <= {0, 1, 2, 3}:
            raise ValueError(
                f"model.projection_stages is {list(self.projection_stages)}: "
                "give one or more of 0, 1, 2, 3"
            )
        for name in ("head_channels", "projection_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: at least 1")
        if min(self.head_dilations, default=1) < 1:
            raise ValueError(f"model.head_dilations is {list(self.head_dilations)}: at least 1")


@dataclass
class ContrastConfig:
    """Semantic-guided pixel contrast.

    Attributes:
        temperature: Temperature tau of the contrast's softmax.
        weight: Weight of the source and the target contrast in the loss.
        regularizer_weight: Weight of the regulariser R, which spreads the mean feature over the
            prototypes.
        start: First iteration with contrast; class statistics accumulate from iteration 0.
        min_ratio: Share of a label window its majority class needs to label one feature pixel.
        bank_length: Class means that BankCL's memory bank holds per class.
        stage_weights: Weight of each stage's loss where every encoder stage has a projection of
            its own; empty weighs each with 1.
    """

    temperature: float = 100.0
    weight: float = 1.0
    regularizer_weight: float = 1.0
    start: int = 3000
    min_ratio: float = 0.75
    bank_length: int = 200
    stage_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"contrast.temperature is {self.temperature}: it must be above 0")
        if self.bank_length < 1:
            raise ValueError(f"contrast.bank_length is {self.bank_length}: at least 1")
        if self.start < 0:
            raise ValueError(f"contrast.start is {self.start}: it must not be negative")


@dataclass
class TeacherConfig:
    """EMA teacher and its pseudo-labels.

    Attributes:
        ema_alpha: Largest decay of the exponential moving average, per reference batch.
        threshold: Probability above which a pseudo-label counts as confident; the share of
            confident pixels weighs the loss on target pixels.
        ignore_top: Rows at the top of a target crop that are not trusted, pixels.
        ignore_bottom: Rows at the bottom of a target crop that are not trusted, pixels.
        crop_tries: Boxes drawn for the class-balanced crop of a target image.
        crop_max_ratio: Largest share one class may hold in a class-balanced crop.
        day_night: Label a night image with the help of the day image of the same place, which
            the target shards hold (Dark Zurich's training set); needs the 19 classes of
            Cityscapes.
        day_ratio: Share of the day image in the scores of static classes, where it is sure, 0..1.
        class_weight_std: Spread around 1 of the weights that favour the source's rare classes in
            the pseudo-labels' scores and in the cross entropies of source and mix; 0 for none.
    """

    ema_alpha: float = 0.999
    threshold: float = 0.968
    ignore_top: int = 15
    ignore_bottom: int = 120
    crop_tries: int = 10
    crop_max_ratio: float = 0.75
    day_night: bool = False
    day_ratio: float = 0.8
    class_weight_std: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_tries < 1:
            raise ValueError(f"teacher.crop_tries is {self.crop_tries}: at least 1")
        if not 0 <= self.day_ratio <= 1:
            raise ValueError(f"teacher.day_ratio is {self.day_ratio}: it must lie in 0..1")
        if self.class_weight_std < 0:
            raise ValueError(
                f"teacher.class_weight_std is {self.class_weight_std}: it must not be negative"
            )


@dataclass
class AugmentationConfig:
    """Strong augmentation of the student's images, drawn per slot of the global batch.

    Attributes:
        jitter_strength: Range of brightness, contrast, saturation and hue changes.
        jitter_probability: Probability that a slot is jittered.
        blur_probability: Probability that a slot is blurred.
        blur_sigma: Range of the Gaussian blur's sigma, pixels.
    """

    jitter_strength: float = 0.2
    jitter_probability: float = 0.8
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.15, 1.15)


@dataclass
class MICConfig:
    """Masked image consistency: the student predicts the pseudo-label of a masked target crop.

    Hoyer et al., MIC: Masked Image Consistency for Context-Enhanced Domain Adaptation (CVPR 2023).

    Attributes:
        weight: Weight of the masked crop's cross entropy in the loss; 0 makes no such pass.
        mask_ratio: Probability that a block is masked, drawn per slot of the global batch.
        block_size: Side of a square block, pixels of the target crop.
    """

    weight: float = 0.0
    mask_ratio: float = 0.7
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"mic.weight is {self.weight}: it must be 0 (off) or above")
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mic.mask_ratio is {self.mask_ratio}: give a probability, 0..1")
        if self.block_size < 1:
            raise ValueError(f"mic.block_size is {self.block_size}: at least 1")


@dataclass
class OptimizationConfig:
    """Batch, schedule and AdamW.

    Attributes:
        iterations: Length of the run, in steps of `reference_batch` images.
        global_batch: Images of each domain in one optimiser step, over all workers.
        micro_batch: Images of each domain in one pass of a worker; 0 for all of its share. More
            passes cost time in place of memory, and batch-norm sees one pass of all workers at a
            time: unless it is frozen, its numbers depend on micro_batch times workers.
        reference_batch: Images a step at which iterations, warm-up and EMA decay are counted.
        scale_lr: How the rate follows global_batch / reference_batch.
        lr: Peak learning rate of the encoder.
        head_lr_multiplier: Factor on the rate of decode and projection head.
        weight_decay: AdamW weight decay (none on normalisation layers and position embeddings).
        betas: AdamW betas.
        warmup: Linear warm-up, iterations.
        warmup_ratio: Share of the rate at iteration 0.
        power: Power of the polynomial decay.
    """

    iterations: int = 40000
    global_batch: int = 2
    micro_batch: int = 0
    reference_batch: int = 2
    scale_lr: Literal["none", "sqrt", "linear"] = "none"
    lr: float = 6e-5
    head_lr_multiplier: float = 10.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 1500
    warmup_ratio: float = 1e-6
    power: float = 1.0

    def __post_init__(self) -> None:
        for name in ("iterations", "global_batch", "reference_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"optimization.{name} is {getattr(self, name)}: at least 1")
        if self.micro_batch < 0:
            raise ValueError(f"optimization.micro_batch is {self.micro_batch}: at least 0")

    def passes(self, workers: int) -> int:
        """Passes of a step, equally many on all workers, whatever their shares of the batch."""
        largest, smallest = math.ceil(self.global_batch / workers), self.global_batch // workers
        return min(math.ceil(largest / (self.micro_batch or largest)), max(smallest, 1))

    @property
    def batch_ratio(self) -> float:
        """Reference iterations that one step stands for."""
        return self.global_batch / self.reference_batch

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(1, round(self.iterations / self.batch_ratio))


@dataclass
class MethodConfig:
    """Everything the method needs to know, without data, cluster or storage."""

    method: Method = "distcl"
    model: ModelConfig = field(default_factory=ModelConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    mic: MICConfig = field(default_factory=MICConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)

    def __post_init__(self) -> None:
        weights, stages = self.contrast.stage_weights, self.model.projection_stages
        if weights and (self.model.projection_mode == "concat" or len(weights) != len(stages)):
            raise ValueError(
                f"contrast.stage_weights has {len(weights)} weights: it needs "
                "model.projection_mode per_layer and one weight for each of "
                f"model.projection_stages {list(stages)}"
            )

    def check_passes(self, workers: int) -> None:
        """Raise ValueError for a loss that several passes of a step would not add up to."""
        passes = self.optimization.passes(workers)
        if passes > 1 and self.contrast.regularizer_weight and self.method != "source_only":
            raise ValueError(
                f"optimization.micro_batch {self.optimization.micro_batch} makes {passes} passes a "
                "step, over which the regulariser is not a sum: set contrast.regularizer_weight "
                "to 0, or micro_batch to 0"
            )

    @property
    def contrast_stage_weights(self) -> tuple[float, ...]:
        """Weight of each projection's loss, one a stage in per-layer mode."""
        if self.model.projection_mode == "concat":
            return (1.0,)
        return self.contrast.stage_weights or (1.0,) * len(self.model.projection_stages)
