"""What test_engine, and test_engine_gpu, run in each process: the same steps under DeepSpeed."""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_grad
from segmentation_models_pytorch.encoders import encoders
from timm.models import register_model
from timm.models.efficientnet import _gen_test_efficientnet
from torch.nn import functional as F

from cluster.activation_checkpointing import checkpoint_activations
from cluster.config import EngineConfig
from sepico.config import (
    AugmentationConfig,
    ContrastConfig,
    MethodConfig,
    MICConfig,
    ModelConfig,
    OptimizationConfig,
    TeacherConfig,
)
from sepico.contrast import PixelContrast
from sepico.network import build_segmentor
from sepico.normalization import set_batch_norm
from sepico.schedule import ema_decay, learning_rate
from sepico.step import AdaptationStep, StepBatch
from sepico.taxonomies import CITYSCAPES_19
from sepico.teacher import Teacher

STEPS, START, BATCH, CLASSES = 4, 2, 4, 5
# Variants that the tests must refuse: what each forgets that workers share, or ZeRO does.
MISTAKES = ("local mean", "local statistics", "local batch-norm", "unpaused projection")
CPU = torch.device("cpu")
CLASS_WEIGHT = torch.linspace(0.9, 1.1, CITYSCAPES_19.num_classes)


@register_model
def half_test_efficientnet(pretrained: bool = False, **options: object) -> torch.nn.Module:
    """timm's `test_efficientnet` at half its width, 27 thousand parameters."""
    return _gen_test_efficientnet("test_efficientnet", 0.5, pretrained=pretrained, **options)


# A block a stage, without drop-path, whose draws depend on how images are spread over workers.
encoders["tiny_mit"] = encoders["mit_b0"] | {
    "params": encoders["mit_b0"]["params"]
    | {
        "out_channels": (3, 0, 8, 16, 16, 32),
        "embed_dims": [8, 16, 16, 32],
        "num_heads": [1, 2, 2, 4],
        "depths": [1, 1, 1, 1],
        "drop_path_rate": 0.0,
    }
}


def method_config(method: str, start: int) -> MethodConfig:
    """A tiny network, a constant rate (a warm-up would hide errors), no dropout.

    "distcl per stage" has a projection, statistics and a loss for each of two encoder stages,
    "distcl masked" the loss of masked target crops besides; "distcl day-night" labels the target
    with the help of reference images; "distcl mit" has a MixTransformer; "distcl micro" takes an
    image at a time, for which batch-norm is frozen and the regulariser off. What a variant changes
    of the engine, see `engine_config`.
    """
    method, _, variant = method.partition(" ")
    stages, day_night, micro = (variant == v for v in ("per stage", "day-night", "micro"))
    return MethodConfig(
        method=method,
        model=ModelConfig(
            encoder="tiny_mit" if variant == "mit" else "tu-half_test_efficientnet",
            encoder_weights=None,
            head_channels=16,
            head_dilations=(1, 2),
            dropout=0.0,
            projection_channels=16,
            projection_stages=(0, 1) if stages else (0, 1, 2, 3),
            projection_mode="per_layer" if stages else "concat",
            num_classes=CITYSCAPES_19.num_classes if day_night else CLASSES,
        ),
        contrast=ContrastConfig(
            temperature=0.5,
            regularizer_weight=0.0 if micro else 0.5,
            start=start,
            stage_weights=(1.0, 0.5) if stages else (),
        ),
        teacher=TeacherConfig(
            ema_alpha=0.9,
            threshold=0.1 if day_night else 0.3,
            ignore_top=4,
            ignore_bottom=0,
            day_night=day_night,
            class_weight_std=0.05 * day_night,
        ),
        augmentation=AugmentationConfig(),
        mic=MICConfig(weight=float(variant == "masked"), block_size=20),
        optimization=OptimizationConfig(
            iterations=100,
            global_batch=BATCH,
            micro_batch=int(micro),
            reference_batch=BATCH,
            lr=3e-5,
            warmup=0,
            power=0,
        ),
    )


def engine_config(stage: int, method: str) -> EngineConfig:
    """Of a method's variant: "offload", "checkpointed", "bf16", "fp16", else float32."""
    variant = method.partition(" ")[2]
    return EngineConfig(
        zero_stage=stage,
        precision=variant if variant in ("bf16", "fp16") else "fp32",
        offload_optimizer=variant == "offload",
        activation_checkpointing=variant == "checkpointed",
    )


def global_batch(step: int, slots: range, device: torch.device = CPU) -> StepBatch:
    """The slots of a step, made from the step's number alone: blocks of one colour a class."""
    generator = torch.Generator().manual_seed(step)
    palette = torch.rand(CLASSES, 3, generator=torch.Generator().manual_seed(99))

    def scene(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.randint(0, CLASSES, (BATCH, 1, rows, columns), generator=generator)
        label = torch.kron(label, torch.ones(24, 24, dtype=torch.int64))
        image = palette[label[:, 0]].permute(0, 3, 1, 2)
        return (image + 0.2 * torch.randn(image.shape, generator=generator)).clamp(0, 1), label

    source, label = scene(4, 4)
    label[1, :, :24] = 255  # so that ranks differ in the number of their pixels
    target, _ = scene(5, 6)
    reference, _ = scene(5, 6)
    mine = list(slots)
    return StepBatch(
        [100 * step + slot for slot in mine],
        source[mine].to(device),
        label[mine].to(device),
        target[mine].to(device),
        target_reference=reference[mine].to(device),
    )


def build(
    config: MethodConfig,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    precision: str = "fp32",
) -> tuple[torch.nn.Module, Teacher | None, PixelContrast | None]:
    from cluster.hardware import autocast_dtype

    torch.manual_seed(0)
    adapts = config.method != "source_only"
    network = build_segmentor(config.model, with_projection=adapts).to(device)
    network.autocast_dtype = autocast_dtype(precision)
    teacher = Teacher(copy.deepcopy(network)) if adapts else None
    return network, teacher, PixelContrast(config, device=device, group=group) if adapts else None


class _ExactBatchNorm:
    """Mixed into the batch-norms of a process that is alone, PyTorch's own.

    On the CPU its float32 mean of a channels-last image is off by 2e-7 of the mean, which is
    plenty where a channel hardly varies: gradients are 1e-3 off, the synchronised ones 2e-6.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        running = self.running_mean.double(), self.running_var.double()
        affine = self.weight.double(), self.bias.double()
        y = F.batch_norm(x.double(), *running, *affine, True, self.momentum, self.eps).to(x.dtype)
        self.running_mean.copy_(running[0])
        self.running_var.copy_(running[1])
        return self.act(self.drop(y)) if hasattr(self, "act") else y


def use_batch_norm(network: torch.nn.Module, config: MethodConfig) -> None:
    """Synchronised batch-norm, exact where a process is alone; frozen where a step has passes."""
    if config.optimization.micro_batch:
        set_batch_norm(network, "frozen")
        return
    set_batch_norm(network, "sync")
    if dist.is_initialized() and dist.get_world_size() > 1:
        return
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            cls = type(module)
            module.__class__ = type(f"Exact{cls.__name__}", (_ExactBatchNorm, cls), {})


def full_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of whole weights and buffers, of a sharded network too."""
    with GatheredParameters(list(network.parameters())):
        return {name: value.detach().clone() for name, value in network.state_dict().items()}


def result(network: torch.nn.Module, teacher: Teacher | None, contrast: PixelContrast | None):
    """Tensors by "kind name": weights and buffers apart, since buffers would hide the weights."""

    def kind(name: str) -> str:
        return "buffer" if "running_" in name or "num_batches" in name else "weight"

    state = {f"student {kind(name)} {name}": value for name, value in full_state(network).items()}
    if teacher is not None:
        averaged = full_state(teacher.network)
        state |= {f"teacher {kind(name)} {name}": value for name, value in averaged.items()}
        state |= contrast.state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


def plain_pytorch(method: str, device: torch.device = CPU) -> tuple[dict, dict]:
    """Initial state, and the final state, of plain PyTorch over the whole batch."""
    precision = engine_config(1, method).precision
    _, gradients = _plain_run(method_config(method, start=0), 1, precision, device)
    initial, final = _plain_run(method_config(method, START), STEPS, precision, device)
    return initial, final | _named("gradient", gradients)


def _named(kind: str, tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(kind)}


def _plain_run(
    config: MethodConfig, steps: int, precision: str, device: torch.device
) -> tuple[dict, dict]:
    from sepico.optimizer import parameter_groups

    network, teacher, contrast = build(config, device=device, precision=precision)
    use_batch_norm(network, config)
    if teacher is not None:
        use_batch_norm(teacher.network, config)
    initial = result(network, teacher, contrast)
    groups = parameter_groups(network, config.optimization)
    optimizer = torch.optim.AdamW(groups, lr=3e-5, betas=config.optimization.betas)
    whole = replace(config, optimization=replace(config.optimization, micro_batch=0))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    weight = CLASS_WEIGHT.to(device)
    step_terms = AdaptationStep(whole, network.normalize, teacher, contrast, weight)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optimization) * group["multiplier"]
        optimizer.zero_grad()
        batch = global_batch(step, range(BATCH), device)
        for term in step_terms.terms(network.train(), batch, step):
            scaler.scale(term).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if teacher is not None:
            decay = ema_decay(step, config.optimization, config.teacher.ema_alpha)
            teacher.update((p.detach() for p in network.parameters()), decay)
    gradients = {f"gradient {name}": p.grad.clone() for name, p in network.named_parameters()}
    return initial, result(network, teacher, contrast) | gradients


def run_rank(
    rank: int, world_size: int, folder: str, cases: list[tuple[int, str]], on_gpus: bool = False
) -> None:
    """Train each case (ZeRO stage, method); rank 0 writes FOLDER/WORLD-STAGE-METHOD.pt."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if on_gpus else CPU
    if on_gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"
    )
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{folder}/rendezvous-{world_size}",
        rank=rank, world_size=world_size,
    )  # fmt: skip
    from cluster.engine import adopt_process_group

    adopt_process_group()
    group = dist.new_group()
    for stage, method in cases:
        engine = engine_config(stage, method)
        mistake = method.partition(" ")[2]
        state = {}
        if mistake != "unpaused projection":
            state = _train(engine, method_config(method, start=0), 1, group, device, mistake)
        if mistake not in MISTAKES[:3]:  # the first gradient shows these
            gradients = _named("gradient", state)
            config = method_config(method, START)
            state = _train(engine, config, STEPS, group, device, mistake) | gradients
        if rank == 0:
            torch.save(state, Path(folder) / f"{world_size}-{stage}-{method}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _train(
    engine_settings: EngineConfig,
    config: MethodConfig,
    steps: int,
    group: dist.ProcessGroup,
    device: torch.device,
    mistake: str,
) -> dict:
    from cluster.engine import Engine, shard_teacher

    network, teacher, contrast = build(config, group, device, engine_settings.precision)
    if mistake != "local batch-norm":
        for part in (network, *([teacher.network] if teacher else [])):
            use_batch_norm(part, config)
    if mistake == "local statistics":
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        contrast.group = groups[dist.get_rank()]
    if mistake == "local mean":
        _forget_the_others(contrast)
    if device.type == "cuda":
        network.encoder.register_forward_hook(_check_encoder(network.autocast_dtype))
    if engine_settings.activation_checkpointing:
        checkpoint_activations(network.encoder)
    engine = Engine(
        network,
        engine_settings,
        config.optimization,
        projection_start=0 if mistake == "unpaused projection" else config.contrast.start,
    )
    if teacher is not None and engine_settings.zero_stage == 3:
        shard_teacher(teacher)
    gradients = {}
    optimizer_step = engine.module.step

    def record_gradients() -> None:
        # ZeRO divides by the loss scale later, in its step.
        scale = engine.loss_scale.value if engine.loss_scale and engine.stage else 1.0
        for name, parameter in network.named_parameters():
            gradients[f"gradient {name}"] = safe_get_full_grad(parameter) / scale
        optimizer_step()

    engine.module.step = record_gradients
    weight = CLASS_WEIGHT.to(device)
    terms = AdaptationStep(config, network.normalize, teacher, contrast, weight)
    slots = range(dist.get_rank(), BATCH, dist.get_world_size())
    for step in range(steps):
        network.train()
        engine.step(terms.terms(engine, global_batch(step, slots, device), step), step)
        if teacher is not None:
            decay = ema_decay(step, config.optimization, config.teacher.ema_alpha)
            engine.update_teacher(teacher, decay)
    return result(network, teacher, contrast) | gradients


def _check_encoder(dtype: torch.dtype | None) -> Callable[..., None]:
    """A hook: images lie on the GPU pixel by pixel, and are computed with in `dtype`."""

    def check(_: torch.nn.Module, images: tuple[torch.Tensor], features: list[torch.Tensor]):
        assert images[0].is_cuda and features[-1].dtype == (dtype or torch.float32)
        assert images[0].is_contiguous(memory_format=torch.channels_last)

    return check


def _forget_the_others(contrast: PixelContrast) -> None:
    """Have the contrast average over the pixels of this rank."""
    of_counts, world_size = contrast.loss, dist.get_world_size()
    contrast.loss = lambda projections, labels, _: of_counts(
        projections, labels, world_size * contrast.kept(projections, labels)
    )
