"""Backbones: what they state is what they give, at any image size; freezing; the ViT pyramid; weights of a whole model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from queryvision.errors import CheckpointError, ConfigError
from queryvision.model.backbone import Backbone, make_backbone
from queryvision.model.folding import FoldedConv, FoldedFrozenNorm, FoldedNorm, fold
from queryvision.model.timm_body import body_maps
from queryvision.model.vit import SimplePyramid, near_strides
from queryvision.structures import ImageBatch
from queryvision.weights.sources import load_backbone

HEIGHT, WIDTH = 70, 101
LEVELS = (8, 16, 32)
ARCHITECTURES = {  # name: strides, channels, parts that no level needs
    "resnet18": (LEVELS, (128, 256, 512), "fc"),
    "resnet18d": (LEVELS, (128, 256, 512), "fc"),
    "convnext_atto": (LEVELS, (80, 160, 320), "head"),
    "efficientnet_b0": ((8, 16), (40, 112), "bn2, classifier, conv_head, blocks.5, blocks.6"),
    "tf_efficientnet_lite0": (LEVELS, (40, 112, 320), "bn2, classifier, conv_head"),
    "mobilenetv3_small_100": (LEVELS, (24, 48, 576), "classifier, conv_head"),
    "mobilevitv2_050": (LEVELS, (128, 192, 256), "head"),  # images must be filled up to multiples of 64
    "hgnetv2_b0": (LEVELS, (256, 512, 1024), "head"),
    "fastvit_t8": (LEVELS, (96, 192, 384), "head, final_conv"),  # narrow strided 1x1 convolutions
    "hrnet_w18_small": (LEVELS, (256, 512, 1024), "classifier, downsamp_modules, final_layer"),  # a fusion that is not needed
    "swin_tiny_patch4_window7_224": (LEVELS, (192, 384, 768), "head, norm"),
    "vit_tiny_patch16_224": (LEVELS, (256, 256, 256), "head, norm"),
    "deit_tiny_distilled_patch16_224": ((4, 16), (256, 256), "head, head_dist, norm"),
    "eva02_tiny_patch14_224": ((7, 14, 28), (256, 256, 256), "fc_norm"),
    "vit_tiny_patch16_dinov3_qkvb": (LEVELS, (256, 256, 256), "norm"),
}


def images(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> ImageBatch:
    """Two normalised images, the first one 40 pixels narrower."""
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[0, :, max(width - 40, 1) :] = True
    sizes = torch.tensor([[height, max(width - 40, 1)], [height, width]])
    return ImageBatch(pixels.masked_fill(padding[:, None], 0.0), padding, True, sizes)


def shaken(backbone: Backbone) -> Backbone:
    """Moves every parameter a little: what starts at zero (gates, last norms) would hide parameters without a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return backbone


def norms(module: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)}


def untrained(backbone: Backbone) -> set[str]:
    """The first two words of what is not trained."""
    return {".".join(k.split(".")[1:3]) for k, p in backbone.named_parameters() if not p.requires_grad}


# ---------------------------------------------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_stated_is_given_and_all_of_it_learns(name: str, tmp_path: Path) -> None:
    strides, channels, unused = ARCHITECTURES[name]
    torch.manual_seed(0)
    backbone = make_backbone(name, strides, frozen_norm=False, freeze=0)
    assert (backbone.name, backbone.strides, backbone.channels) == (name, strides, channels)
    assert len(backbone.mean) == len(backbone.std) == 3
    assert not any(norm.num_batches_tracked for norm in norms(backbone).values()), "trying it out moved no statistics"

    features = shaken(backbone).train()(images())
    for level, padding, stride, width in zip(features.maps, features.paddings, strides, channels, strict=True):
        assert level.shape == (2, width, -(-HEIGHT // stride), -(-WIDTH // stride)) and level.isfinite().all()
        assert padding.shape == (2, *level.shape[-2:]) and padding.any()
    sum((level * torch.randn_like(level)).sum() for level in features.maps).backward()
    trained = {k: p.grad for k, p in backbone.named_parameters() if p.requires_grad}
    assert [k for k, gradient in trained.items() if gradient is None or not gradient.any()] == []
    assert len(trained) == len(list(backbone.parameters())) or name.startswith("hrnet"), "which holds what cannot be cut off"

    file = tmp_path / "weights.pth"
    make = torchvision.models.get_model if name == "resnet18" else timm.create_model
    state = make(name).state_dict()
    torch.save(state, file)
    line = load_backbone(backbone, str(file))
    assert set(line.split("not used: ")[1].split(", ")) == set(unused.split(", "))
    assert all(torch.equal(value, state[k]) for k, value in backbone.get_submodule("body").state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_cells_lie_where_their_stride_says(name: str) -> None:
    """A change of the image moves the cells around it most, also far from the origin; on coarser levels all cells see it."""
    torch.manual_seed(0)
    backbone = make_backbone(name, LEVELS).eval()
    given = images(117, 171)
    given.padded = False
    other = copy.deepcopy(given)
    y, x = 101, 149
    other.pixels[:, :, y - 2 : y + 3, x - 2 : x + 3] += 3
    with torch.no_grad():
        change = (backbone(other).maps[0] - backbone(given).maps[0]).abs().sum((0, 1))
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert abs(row - y // LEVELS[0]) <= 1 and abs(column - x // LEVELS[0]) <= 1


def test_levels_come_finest_first_whatever_the_order() -> None:
    backbone = make_backbone("resnet18", (32, 8))
    assert (backbone.strides, backbone.channels) == ((8, 32), (128, 512))
    assert [m.shape[1] for m in backbone(images()).maps] == [128, 512]
    assert make_backbone("tf_efficientnet_lite0", (16, 4)).channels == (24, 112)


def test_images_are_filled_up_no_more_than_needed() -> None:
    for name, multiple in (("tf_efficientnet_lite0", 32), ("mobilevitv2_050", 64), ("vit_tiny_patch16_224", 16)):
        assert make_backbone(name).multiple == multiple


def with_statistics(module: nn.Module) -> nn.Module:
    """With random scales, shifts and running statistics of its batch norms."""
    for m in module.modules():
        if hasattr(m, "running_var"):
            for tensor, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5), (m.running_var, 0.5)):
                tensor.data.uniform_(low, low + 1)
    return module


@pytest.mark.parametrize("name", ["resnet18d", "convnext_atto", "tf_efficientnet_lite0"])
def test_maps_are_those_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = with_statistics(timm.create_model(name))
    theirs = timm.create_model(name, features_only=True).eval()
    for (_, ours), value in zip(theirs.state_dict().items(), whole.state_dict().values(), strict=False):
        assert ours.shape == value.shape
        ours.copy_(value)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    backbone = make_backbone(name, LEVELS).eval()
    load_backbone(backbone, str(tmp_path / "model.safetensors"))
    given = images(64, 96)
    with torch.no_grad():
        for ours, expected in zip(backbone(given).maps, theirs(given.pixels)[-3:], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


UNFOLDED = {  # norms that do not follow a convolution, or whose convolution is given out or read elsewhere, too
    "resnet18": 0, "resnet18d": 0, "hgnetv2_b0": 0, "tf_efficientnet_lite0": 0, "mobilenetv3_small_050": 0, "xception41p": 3,
    "nextvit_small": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOLDED)
def test_folding_frozen_norms_changes_neither_maps_nor_gradients(name: str) -> None:
    torch.manual_seed(0)
    strides = (4, 8) if name in ("xception41p", "nextvit_small") else LEVELS
    live = with_statistics(make_backbone(name, strides, frozen_norm=False, freeze=0)).double().eval()
    folded = make_backbone(name, strides, freeze=0).double()
    folded.load_state_dict(live.state_dict(), strict=name != "resnet18")  # torchvision's frozen norms count no batches
    folded = copy.deepcopy(folded.train())
    left = [m for m in folded.modules() if isinstance(m, (_BatchNorm, FrozenBatchNorm2d, BatchNormAct2d))]
    left = [m for m in left if not isinstance(m, FoldedFrozenNorm)]
    assert len(left) == UNFOLDED[name] and not any(m.training or m.weight.requires_grad for m in left)
    folded.eval()  # nothing is dropped
    given = images(64, 96)
    given.pixels = given.pixels.double()
    gradients = []
    for backbone in (live, folded):
        maps = backbone(given).maps
        sum(m.square().mean() for m in maps).backward()
        gradients.append({k: p.grad for k, p in backbone.named_parameters()})
    for ours, expected in zip(folded(given).maps, live(given).maps, strict=True):
        torch.testing.assert_close(ours, expected)
    trained = {k for k, gradient in gradients[1].items() if gradient is not None}
    assert len(trained) > 15 and trained < gradients[0].keys(), "norms are not trained"
    for key in trained:
        torch.testing.assert_close(gradients[1][key], gradients[0][key], msg=key)


def test_a_norm_is_folded_only_if_nobody_else_reads_the_convolution() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(7))
            self.norms = nn.ModuleList(FrozenBatchNorm2d(4) for _ in range(6))

        def forward(self, x: Tensor) -> list[Tensor]:
            convs, norms = self.convs, self.norms
            x = convs[0](x)
            x = x + norms[0](x)  # read twice
            x = norms[1](convs[1](x)) + norms[1](convs[2](x))  # a norm used twice
            x = norms[2](convs[3](x)) + convs[3](x + 1)  # a convolution used twice
            x = norms[3](convs[4](x).relu_())  # something in place between them
            given = convs[5](x)  # given out
            return [given, norms[4](given), norms[5](convs[6](x))]

    torch.manual_seed(0)
    body, pixels = with_statistics(Body()), torch.randn(1, 4, 4, 4, requires_grad=True)
    before = body(pixels)
    with torch.no_grad():
        fold(body, lambda: body(pixels))
    assert [i for i, conv in enumerate(body.convs) if isinstance(conv, FoldedConv)] == [6], "the only plain pair"
    torch.testing.assert_close(body(pixels), before)


def test_a_copy_is_whole_and_apart() -> None:
    backbone = make_backbone("vit_tiny_patch16_224", LEVELS).eval()
    other = copy.deepcopy(backbone)
    assert not any(type(module) is nn.Linear for module in other.modules()), "all are oneDNN's"
    assert {k.split(".")[0] for k in backbone.state_dict()} == {"body", "pyramid"}
    with torch.no_grad():
        before = backbone(images()).maps[0]
        for parameter in backbone.parameters():
            parameter.zero_()
        assert torch.equal(other(images()).maps[0], before) and not backbone(images()).maps[0].any()


# ---------------------------------------------------------------------------------------------------- RT-DETR's
@pytest.mark.parametrize(("name", "timms", "channels"), [("resnet18vd", "resnet18d", 64), ("resnet34vd", "resnet34d", 64)])
def test_vd_is_timms_with_a_projection_beside_the_first_block(name: str, timms: str, channels: int) -> None:
    torch.manual_seed(0)
    backbone = make_backbone(name, LEVELS, frozen_norm=False)
    more = {f"layer1.0.downsample.{key}" for key in ("1.weight", "2.weight", "2.bias", "2.running_mean", "2.running_var")}
    theirs = {k for k in timm.create_model(timms).state_dict() if not k.startswith("fc.")}
    assert {k for k in backbone.body.state_dict() if not k.endswith("downsample.2.num_batches_tracked")} == more | {
        k for k in theirs if not k.endswith("downsample.2.num_batches_tracked")
    }
    assert (backbone.name, backbone.strides, backbone.channels) == (name, LEVELS, (2 * channels, 4 * channels, 8 * channels))
    backbone.train()(images()).maps[0].sum().backward()
    projection = backbone.body.layer1[0].downsample
    assert projection[1].weight.grad.any() and projection[2].running_mean.any()
    frozen = make_backbone(name, (16,), frozen_norm=True, freeze=2).train()
    assert {"layer1.0", "layer1.1", "conv1.0"} <= untrained(frozen) and "layer2.0" in untrained(frozen)
    assert not frozen.body.layer1[0].downsample[1].weight.requires_grad
    assert isinstance(frozen.body.layer1[0].downsample[2], FoldedNorm)
    assert frozen.body.layer2[0].conv1.weight.requires_grad and not frozen.body.layer2[0].bn1.weight.requires_grad


def test_unit_takes_pixels_as_they_are() -> None:
    for name in ("hgnetv2_b0", "resnet18vd"):
        plain, unit = (make_backbone(f"{name}{tag}", (16,)) for tag in ("", ".unit"))
        assert unit.name == f"{name}.unit" and (unit.mean, unit.std) == ((0.0,) * 3, (1.0,) * 3)
        assert plain.mean != unit.mean and plain.state_dict().keys() == unit.state_dict().keys()
    with pytest.raises(ConfigError, match="set model.backbone=hgnetv2_b0$"):
        load_backbone(make_backbone("hgnetv2_b0.unit", (16,)), "timm:hgnetv2_b0")


# ---------------------------------------------------------------------------------------------------- batch norm, freezing
def test_live_norm_of_a_resnet_is_torchvisions() -> None:
    torch.manual_seed(0)
    backbone = make_backbone("resnet18", (4, 8, 16, 32), frozen_norm=False, freeze=0).train()
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    taken: list[Tensor] = []
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda _m, _i, out: taken.append(out))
    backbone.double(), theirs.double()  # in single precision a unit near 0 can be on in one and off in the other
    given = replace(images(), pixels=images().pixels.double())
    theirs.train()(given.pixels)
    ours = backbone(given).maps
    sum(m.square().mean() for m in ours).backward()
    sum(m.square().mean() for m in taken).backward()
    for mine, expected in zip(ours, taken, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    for k, parameter in backbone.body.named_parameters():
        expected = theirs.get_parameter(k).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    for k, norm in norms(backbone.body).items():
        assert norm.running_mean.any(), "the statistics move"
        torch.testing.assert_close(norm.running_var, theirs.get_submodule(k).running_var)


def test_frozen_norm_keeps_its_statistics_also_in_training() -> None:
    for name in ("resnet18", "tf_efficientnet_lite0"):
        for frozen in (True, False):
            backbone = make_backbone(name, (16,), frozen_norm=frozen, freeze=0).train()
            before = copy.deepcopy(dict(backbone.named_buffers()))
            backbone(images())
            moved = any(not torch.equal(value, before[k]) for k, value in backbone.named_buffers())
            assert moved is not frozen
            scales = [m.weight for m in backbone.modules() if hasattr(m, "running_var")]
            assert scales and all(scale.requires_grad is not frozen for scale in scales)


@pytest.mark.parametrize(
    ("name", "freeze", "parts"),
    [
        ("resnet18", None, {"conv1.weight", "bn1.weight", "bn1.bias", "layer1.0", "layer1.1"}),
        ("resnet18", 0, set()),
        ("tf_efficientnet_lite0", None, set()),
        ("tf_efficientnet_lite0", 2, {"conv_stem.weight", "bn1.weight", "bn1.bias", "blocks.0"}),
        ("swin_tiny_patch4_window7_224", 1, {"patch_embed.proj", "patch_embed.norm"}),
        ("vit_tiny_patch16_224", 3, {"patch_embed.proj", "pos_embed", "cls_token", "blocks.0", "blocks.1"}),
        ("resnet18d", 1, {"conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1.weight", "bn1.bias"}),
    ],
)
def test_freezing_from_the_image_upwards(name: str, freeze: int | None, parts: set[str]) -> None:
    backbone = make_backbone(name, (16,), frozen_norm=False, freeze=freeze).train()
    assert untrained(backbone) == parts
    before = {k: norm.running_mean.clone() for k, norm in norms(backbone.body).items()}
    backbone(images()).maps[0].sum().backward()
    for k, norm in norms(backbone.body).items():
        assert torch.equal(norm.running_mean, before[k]) is not norm.weight.requires_grad, k


# ---------------------------------------------------------------------------------------------------- plain ViTs
def test_the_pyramid_is_that_of_vitdet() -> None:
    """Against the same layers written down by hand, on a map with odd sides."""
    torch.manual_seed(0)
    pyramid = SimplePyramid(8, (4.0, 2.0, 1.0, 0.5), 6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    last = torch.randn(2, 8, 5, 7, generator=generator)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]

    for level, out in zip(pyramid.levels, pyramid(last), strict=True):
        *first, w1, g1, b1, w3, g3, b3 = level.parameters()
        x = last
        if len(first) == 6:
            x = F.conv_transpose2d(x, first[0], first[1], stride=2)
            x = F.conv_transpose2d(F.gelu(norm(x, first[2], first[3])), first[4], first[5], stride=2)
        elif len(first) == 2:
            x = F.conv_transpose2d(x, *first, stride=2)
        elif level is pyramid.levels[3]:
            x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 2)
        x = norm(F.conv2d(norm(F.conv2d(x, w1), g1, b1), w3, padding=1), g3, b3)
        torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4)
    assert [tuple(m.shape[1:]) for m in pyramid(last)] == [(6, 20, 28), (6, 10, 14), (6, 5, 7), (6, 3, 4)]
    with pytest.raises(ValueError, match=r"scale 3.0: not one of \(4.0, 2.0, 1.0, 0.5\)"):
        SimplePyramid(8, (3.0,))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_vits_map_is_timms_last_one(name: str) -> None:
    """At the size it was made for, against a model of that size alone."""
    theirs = timm.create_model(name).eval()
    backbone = make_backbone(name, (16,), pyramid_width=32).eval()
    backbone.body.load_state_dict(theirs.state_dict(), strict=False)
    pixels = images(224, 224).pixels
    with torch.no_grad():
        tokens = theirs.forward_intermediates(pixels, indices=1, intermediates_only=True)[0]
        ours = body_maps(backbone.body, [backbone.index], pixels)[0]
    torch.testing.assert_close(ours, tokens, rtol=1e-4, atol=1e-5)


def test_one_vit_takes_all_resolutions() -> None:
    backbone = make_backbone("vit_tiny_patch16_224", (4, 8, 16, 32), pyramid_width=32).eval()
    assert backbone.channels == (32,) * 4 and backbone.mean == (0.5, 0.5, 0.5), "this ViT's own normalisation"
    for height, width in ((224, 224), (33, 250), (1, 16)):
        with torch.no_grad():
            maps = backbone(images(height, width)).maps
        assert [m.shape[2] for m in maps] == [-(-height // s) for s in (4, 8, 16, 32)]
        assert all(m.isfinite().all() for m in maps)


def test_strides_of_a_pyramid() -> None:
    assert near_strides("x", 16, (4, 8, 16, 32)) == (4, 8, 16, 32)
    assert near_strides("x", 14, (8, 16, 32)) == (7, 14, 28)
    assert near_strides("x", 32, (8, 16, 32, 64)) == (8, 16, 32, 64)
    for patch, wanted in ((16, (64,)), (14, (4,)), (8, (32,)), (16, (12, 16)), (14, (4, 8))):
        with pytest.raises(ConfigError, match="only "):
            near_strides("x", patch, wanted)


# ---------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("resnt18", {}, "did you mean 'resnet18'"),
        ("vit_tiny_patch16_22", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("resnet18dv", {}, "The closest of .*resnet18vd"),
        ("resnet18v.unit", {}, "there is no backbone"),
        ("resnet18", {"strides": (7,)}, r"no level of stride 7, only \[4, 8, 16, 32\]"),
        ("tf_efficientnet_lite0", {"strides": (8, 64)}, r"no level of stride 64, only \[2, 4, 8, 16, 32\]"),
        ("vit_tiny_patch16_224", {"strides": (8, 64)}, r"near stride 64, only \[4, 8, 16, 32\] \(patches of 16 pixels\)"),
        ("resnet18", {"strides": ()}, "at least one"),
        ("resnet18", {"strides": (8, 8)}, "each once"),
        (
            "cait_xxs24_224",
            {"strides": (16,)},
            "not work at every image size .*made for 224 x 224. Take another, such as resnet50",
        ),
        ("resnet18", {"dilated": True}, "cannot be dilated"),
        ("convnext_atto", {"dilated": True}, "cannot be dilated"),
        ("resnet18", {"freeze": 6}, "freeze = 6: backbone 'resnet18' has 5 parts, .*: stem, layer1, layer2, layer3, layer4"),
        ("convnext_atto", {"freeze": 9}, "has 5 parts, .*: stem, stages.0, stages.1, stages.2, stages.3"),
        ("resnet18d", {"freeze": 9}, "has 5 parts, .*: all up to act1, layer1, layer2, layer3, layer4"),
        ("vit_tiny_patch16_224", {"freeze": 14}, "has 13 parts, .*: stem, blocks.0, .*blocks.11$"),
        ("convnext_atto", {"freeze": -1}, "freeze = -1"),
    ],
)
def test_what_cannot_be(name: str, arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_backbone(name, **arguments)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    backbone = make_backbone("convnext_atto", LEVELS)
    state = timm.create_model("convnext_atto").state_dict()
    missing = "stages.1.blocks.0.conv_dw.weight"
    for content in ({k: v for k, v in state.items() if k != missing}, state | {missing: torch.zeros(3)}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=f"lack 1 tensors of backbone 'convnext_atto', for example {missing}"):
            load_backbone(backbone, str(tmp_path / "x.pth"))
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_backbone(backbone, str(tmp_path / "x.safetensors"))
