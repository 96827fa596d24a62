"""Reads the checkpoints that SePiCo's authors publish into our segmentor.

Their files hold `state_dict`: the student under `model.`, which their results are of, and
possibly the teacher under `ema_model.`, which is left out here. The file alone says which of the
two published networks it holds (DeepLab-v2 on ResNet-101-v1c, DAFormer on MiT-B5) and its widths.
"""

from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from sepico.config import ModelConfig
from sepico.network import Segmentor, build_blank, load_weights_file

STUDENT, TEACHER = "model.", "ema_model."


def load_official(path: str | Path) -> Segmentor:
    """The segmentor of an authors' .pth file, float32, in eval mode.

    It takes RGB images normalised by its `normalize` (ImageNet's mean and std), as any of ours.
    Nothing but tensors and plain containers is unpickled (`weights_only`).
    Raises ValueError, in one line, when there is no such file, it is no checkpoint of theirs, or
    keys are missing, extra or of another shape: the line names them.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint file {path}: give one of the authors' .pth files")
    with Path(path).open("rb") as file:
        return read_official(file, str(path))


def read_official(file: BinaryIO, name: str) -> Segmentor:
    """`load_official` of an open file; errors call it `name`."""
    weights = _student_weights(load_weights_file(file, name), name)
    config = _model_config(weights)
    segmentor = build_blank(config)
    ours = segmentor.state_dict()
    names = {_official_name(key, _PREFIXES[config.head]): key for key in ours}
    _check_keys(weights, {theirs: ours[key] for theirs, key in names.items()}, name)
    segmentor.load_state_dict(
        {key: weights[theirs].reshape(ours[key].shape) for theirs, key in names.items()}
    )
    return segmentor.eval()


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _student_weights(checkpoint: Any, name: str) -> dict[str, Tensor]:
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(map(_is_weight, state.items())):
        raise ValueError(
            f"{name} is no checkpoint of the authors: it has no `state_dict` of tensors"
        )
    weights = {key: value for key, value in state.items() if not key.startswith(TEACHER)}
    if not any(key.startswith(f"{STUDENT}backbone.") for key in weights):
        raise ValueError(f"{name} is no checkpoint of the authors: no key starts with 'model.'")
    return weights


def _model_config(weights: dict[str, Tensor]) -> ModelConfig:
    """The published network that the keys name, as wide as its tensors are."""
    channels = _width(weights, "model.auxiliary_head.convs.1.", 512)
    if any(key.startswith(f"{STUDENT}backbone.block") for key in weights):
        return ModelConfig(
            encoder="mit_b5",
            encoder_weights=None,
            projection_channels=channels,
            num_classes=_width(weights, "model.decode_head.conv_seg.", 19),
        )
    return ModelConfig(
        encoder="tu-resnet101c",
        encoder_weights=None,
        output_stride=8,
        head="deeplabv2",
        projection_channels=channels,
        projection_stages=(3,),
        num_classes=_width(weights, "model.decode_head.aspp_modules.", 19),
    )


def _width(weights: dict[str, Tensor], prefix: str, published: int) -> int:
    """Output channels that a layer's tensors agree on, else the published number."""
    widths = {len(value) for key, value in weights.items() if key.startswith(prefix) and value.ndim}
    return widths.pop() if len(widths) == 1 else published


def _conv_norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.0.": f"{theirs}.conv.", f"{ours}.1.": f"{theirs}.bn."}


# Prefixes of our names -> theirs; the first that fits counts.
_PROJECTION = {
    "projection.reduce.": "auxiliary_head.convs.0.conv.",
    "projection.layers.0.": "auxiliary_head.convs.0.bn.",
    **_conv_norm("projection.layers.2", "auxiliary_head.convs.1"),
}
_DEEPLAB = {
    "encoder.model.conv1.": "backbone.stem.",
    "encoder.model.bn1.": "backbone.stem.7.",
    "encoder.model.": "backbone.",
    **{f"head.branches.{i}.": f"decode_head.aspp_modules.{i}.conv." for i in range(4)},
    **_PROJECTION,
}
_FUSION = "decode_head.fuse_layer"
_DAFORMER = {
    "encoder.": "backbone.",
    **{f"head.embeddings.{i}.": f"decode_head.embed_layers.{i}.proj." for i in range(4)},
    **_conv_norm("head.fusion.branches.0", f"{_FUSION}.aspp_modules.0"),
    **{
        ours: theirs
        for i in range(1, 4)
        for j, part in enumerate(("depthwise_conv", "pointwise_conv"))
        for ours, theirs in _conv_norm(
            f"head.fusion.branches.{i}.{j}", f"{_FUSION}.aspp_modules.{i}.{part}"
        ).items()
    },
    **_conv_norm("head.fusion.bottleneck", f"{_FUSION}.bottleneck"),
    "head.classifier.": "decode_head.conv_seg.",
    **_PROJECTION,
}
_PREFIXES = {"deeplabv2": _DEEPLAB, "daformer": _DAFORMER}


def _official_name(key: str, prefixes: dict[str, str]) -> str:
    """The authors' name of one of our keys."""
    ours = next(prefix for prefix in prefixes if key.startswith(prefix))
    return STUDENT + prefixes[ours] + key.removeprefix(ours)


def _official_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Theirs embed with linear layers where ours are 1x1 convolutions."""
    return tuple(tensor.shape[:2] if ".embed_layers." in name else tensor.shape)


def _check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    shapes = {key: _official_shape(key, tensor) for key, tensor in expected.items()}
    problems = {
        "missing": [key for key in shapes if key not in weights],
        "extra": [key for key in weights if key not in shapes],
        "misshapen": [
            f"{key} {tuple(weights[key].shape)} for {shape}"
            for key, shape in shapes.items()
            if key in weights and tuple(weights[key].shape) != shape
        ],
    }
    found = [f"{kind} {_some(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{name} does not fit the authors' network: {'; '.join(found)}")


def _some(keys: list[str], limit: int = 5) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
