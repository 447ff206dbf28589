"""Readers of Mask2Former's and Mask DINO's checkpoints: every tensor has one place, and levels go the right way round."""

from __future__ import annotations

import collections
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from peers import give_each_parameter_its_own_gain, padded_batch
from torch import Tensor

import queryvision
from queryvision.data.coco_classes import COCO_NAMES, COCO_STUFF
from queryvision.errors import CheckpointError
from queryvision.model import builders
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.weights import detectron, mask2former, maskdino
from queryvision.weights.pickles import read_pickle
from queryvision.weights.reading import fill

FAMILIES = {"mask2former": mask2former, "maskdino": maskdino}
PREDICTOR = "sem_seg_head.predictor."


def stand_in(family: str, classes: int, **more: Any) -> dict[str, Tensor]:
    state = published.stand_ins(getattr(published, family)(classes, **more))
    return published.with_maskdino_copies(state) if family == "maskdino" else state


def save(state: dict[str, Tensor], path: Path) -> Path:
    """As detectron2 writes it: a pickle of arrays, or a file of torch's."""
    if path.suffix == ".pkl":
        arrays = {key: value.numpy() for key, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    else:
        torch.save({"model": collections.OrderedDict(state), "iteration": 368749}, path)
    return path


# ---------------------------------------------------------------------------------------------------- every tensor
@pytest.mark.parametrize("classes", [80, 133])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_tensors_of_a_published_file_have_a_place(family: str, classes: int, tmp_path: Path) -> None:
    state, reader = stand_in(family, classes), FAMILIES[family]
    found = reader.read(str(save(state, tmp_path / "some.pth")))
    task = "panoptic" if classes == 133 else "instance"
    assert (found["task"], found["config"]) == (task, f"{family}_r50_coco")
    known = COCO_NAMES | COCO_STUFF if classes == 133 else COCO_NAMES
    assert dict(zip(found["classes"].ids, found["classes"].names, strict=True)) == known
    assert found["classes"].things == tuple(i in COCO_NAMES for i in known)
    chosen, model = resolve_task(task), dict(found["model"])
    with torch.device("meta"):
        empty = getattr(builders, model.pop("name"))(chosen.make_heads(classes, {}), chosen.steering, **model)
    renamed = reader.rename(found["state"], empty.heads.heads())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in empty.state_dict().items()}
    used = {float(value.flatten()[0]) for value in renamed.values()}
    assert used == {float(v.flatten()[0]) for k, v in state.items() if k != "criterion.empty_weight"}
    assert len(used) == len(renamed)


LANDS = {
    "mask2former": {
        "backbone.res5.2.conv2.norm.running_var": "backbone.body.layer4.2.bn2.running_var",
        "backbone.res3.0.shortcut.norm.bias": "backbone.body.layer2.0.downsample.1.bias",
        "backbone.res3.0.shortcut.weight": "backbone.body.layer2.0.downsample.0.weight",
        "backbone.stem.conv1.norm.weight": "backbone.body.bn1.weight",
        "sem_seg_head.pixel_decoder.input_proj.0.0.weight": "neck.levels.2.0.weight",
        "sem_seg_head.pixel_decoder.adapter_1.norm.weight": "pixels.lateral.norm.weight",
        "sem_seg_head.pixel_decoder.layer_1.weight": "pixels.output.conv.weight",
        "sem_seg_head.predictor.query_feat.weight": "queries.states.weight",
        "sem_seg_head.predictor.transformer_self_attention_layers.4.norm.bias": "decoder.layers.4.norm1.bias",
        "sem_seg_head.predictor.transformer_cross_attention_layers.4.norm.bias": "decoder.layers.4.norm2.bias",
        "sem_seg_head.predictor.transformer_ffn_layers.4.norm.bias": "decoder.layers.4.norm3.bias",
        "sem_seg_head.predictor.mask_embed.layers.1.bias": "heads.masks.mlp.layers.0.layers.1.bias",
    },
    "maskdino": {
        "sem_seg_head.pixel_decoder.input_proj.0.0.weight": "neck.levels.0.0.weight",
        "sem_seg_head.pixel_decoder.input_proj.3.0.weight": "neck.levels.3.0.weight",
        "sem_seg_head.predictor.decoder.layers.7.norm1.weight": "decoder.layers.7.norm2.weight",
        "sem_seg_head.predictor.decoder.layers.7.norm2.weight": "decoder.layers.7.norm1.weight",
        "sem_seg_head.predictor.decoder.layers.7.norm3.weight": "decoder.layers.7.norm3.weight",
        "sem_seg_head.predictor._bbox_embed.layers.2.bias": "heads.boxes.mlp.layers.0.layers.2.bias",
        "sem_seg_head.predictor.label_enc.weight": "heads.labels.embedding.weight",
        "sem_seg_head.predictor.enc_output_norm.bias": "queries.norm.bias",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_published_size_converts(family: str, tmp_path: Path) -> None:
    state = stand_in(family, 80)
    path = save(state, tmp_path / ("model_final_3c8ec9.pkl" if family == "mask2former" else "maskdino_r50.pth"))
    predictor = queryvision.load(queryvision.convert(path, family, tmp_path / "ours.pt"))
    assert predictor.loaded.task.name == "instance" and predictor.classes.ids == tuple(COCO_NAMES)
    found = predictor.model.state_dict()
    for theirs, own in LANDS[family].items():
        assert torch.equal(found[own], state[theirs]), theirs


def test_what_is_not_in_the_weights_of_mask_dino(tmp_path: Path) -> None:
    """Encoders of both published widths are read; panoptic ones start from the proposals' boxes."""
    for classes, ffn in ((80, 1024), (133, 2048)):
        found = maskdino.read(str(save(stand_in("maskdino", classes, ffn=ffn), tmp_path / "some.pth")))
        assert found["model"] == {
            "name": "maskdino_r50", "num_queries": 300, "encoder_ffn_width": ffn, "mask_anchors": classes == 80,
        }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- round trip
def tiny(family: str) -> QueryModel:
    """Random weights; eight attention heads, as all published ones have."""
    task, sizes = resolve_task("instance"), {"backbone": "resnet18", "width": 64, "ffn_width": 48, "encoder_layers": 2}
    make = task.make_heads(5, {"masks": {"points": 64}})
    torch.manual_seed(0)
    model = getattr(builders, family)(make, task.steering, **sizes, num_queries=9, decoder_layers=4, encoder_ffn_width=32)
    give_each_parameter_its_own_gain(model)
    return model.eval()


def written_as_theirs(family: str, model: QueryModel) -> dict[str, Tensor]:
    """Our weights as the published code would hold them; written from its side, not from the reader."""
    levels = 3 if family == "mask2former" else 4
    out: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = key
        for pattern, new in (
            (r"^backbone\.body\.(conv1)\.", r"backbone.stem.\1."),
            (r"^backbone\.body\.bn1\.", "backbone.stem.conv1.norm."),
            (r"^backbone\.body\.layer(\d)\.", lambda m: f"backbone.res{int(m[1]) + 1}."),
            (r"^(backbone\.res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
            (r"^(backbone\.res\d\.\d+)\.downsample\.0\.", r"\1.shortcut."),
            (r"^(backbone\.res\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
            (r"^neck\.levels\.(\d)\.", lambda m: f"pixel_decoder.input_proj.{2 - int(m[1]) if levels == 3 else m[1]}."),
            (r"^encoder\.levels$", "pixel_decoder.transformer.level_embed"),
            (r"^encoder\.", "pixel_decoder.transformer.encoder."),
            (r"^pixels\.project\.", "pixel_decoder.mask_features."),
            (r"^pixels\.(lateral|output)\.", lambda m: f"pixel_decoder.{'adapter' if m[1] == 'lateral' else 'layer'}_1."),
            (r"^(pixel_decoder\.(?:adapter|layer)_1)\.conv\.", r"\1."),
            (r"\.ffn\.(linear\d)", r".\1"),
            (r"cross_attn\.attention", "multihead_attn" if levels == 3 else "cross_attn"),
            (r"^pixels\.marks$", "predictor.level_embed.weight"),
            (r"^queries\.states\.", "predictor.query_feat."),
            (r"^queries\.positions\.", "predictor.query_embed."),
            (r"^queries\.project\.", "predictor.enc_output."),
            (r"^queries\.norm\.", "predictor.enc_output_norm."),
            (r"^heads\.masks\.mlp\.layers\.0\.", "predictor.mask_embed."),
            (r"^heads\.boxes\.mlp\.layers\.0\.", "predictor._bbox_embed."),
            (r"^heads\.labels\.linear\.layers\.0\.", "predictor.class_embed."),
            (r"^heads\.labels\.embedding\.", "predictor.label_enc."),
            (r"^decoder\.norm\.", "predictor.decoder_norm."),
            (r"^decoder\.positions\.anchors\.", "predictor.decoder.ref_point_head."),
        ):
            name = re.sub(pattern, new, name)
        layer = re.match(r"decoder\.layers\.(\d)\.(\w+)\.(.*)", name)
        if layer and levels == 3:
            index, part, rest = layer.groups()
            kind = {"self_attn": "self_attention", "norm1": "self_attention", "multihead_attn": "cross_attention",
                    "norm2": "cross_attention"}.get(part, "ffn")  # fmt: skip
            part = "norm" if part.startswith("norm") else part
            name = f"predictor.transformer_{kind}_layers.{index}.{part}.{rest}"
        elif layer:
            index, part, rest = layer.groups()
            part = {"norm1": "norm2", "norm2": "norm1"}.get(part, part)
            name = f"predictor.decoder.layers.{index}.{part}.{rest}"
        turned = name.startswith("pixel_decoder") if levels == 3 else ".cross_attn." in name
        if turned and re.search(r"sampling_offsets|attention_weights", name):
            value = torch.stack(list(value.unflatten(0, (8, levels, -1)).unbind(1))[::-1], 1).flatten(0, 2)
        if levels == 3 and name.endswith(("level_embed", "level_embed.weight")):
            value = value[[2, 1, 0]]
        out[name if name.startswith("backbone") else f"sem_seg_head.{name}"] = value.clone()
    if levels == 4:
        boxes = {k.removeprefix(f"{PREDICTOR}_bbox_embed."): v for k, v in out.items() if "_bbox_embed" in k}
        for prefix in ("", "decoder."):
            out |= {f"{PREDICTOR}{prefix}bbox_embed.{i}.{k}": v for i in range(4) for k, v in boxes.items()}
        out |= {f"{PREDICTOR}decoder.norm.{k}": out[f"{PREDICTOR}decoder_norm.{k}"] for k in ("weight", "bias")}
    return out | {"criterion.empty_weight": torch.ones(6)}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_as_they_were(family: str, tmp_path: Path) -> None:
    model, again, reader = tiny(family), tiny(family), FAMILIES[family]
    state = written_as_theirs(family, model)
    found = detectron.open_state(str(save(state, tmp_path / "some.pkl")))
    for parameter in again.parameters():
        parameter.zero_()
    fill(again, reader.rename(found, again.heads.heads()))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    images = padded_batch(96, 160)
    for head, answer in model(images).final().answers.items():
        for field, value in answer.items():
            assert value.std(2).mean() > 1e-4 and torch.equal(value, again(images).final().answers[head][field])


def test_names_of_older_files_are_known(tmp_path: Path) -> None:
    state = {}
    for key, value in stand_in("mask2former", 80).items():
        key = key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query")
        state[key] = value
    found = mask2former.read(str(save(state, tmp_path / "old.pkl")))["state"]
    assert set(found) == set(stand_in("mask2former", 80)) - {"criterion.empty_weight"}


# ---------------------------------------------------------------------------------------------------- pickles
class Runs:
    """What somebody might put into a pickle."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_arrays_is_read(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "c": np.array(3, np.int64), "d": np.arange(3, dtype=">f4"), "e": np.zeros((0, 4), np.float32), "f": np.array([True]),
    }  # fmt: skip
    path = tmp_path / "some.pkl"
    content = {"model": collections.OrderedDict(arrays), "author": "x", "list": [1, (2.5, None)], "number": np.float64(0.5)}
    path.write_bytes(pickle.dumps(content, protocol))
    found = read_pickle(path)
    assert (found["author"], found["list"], found["number"]) == ("x", [1, (2.5, None)], 0.5)
    for name, array in arrays.items():
        assert torch.equal(found["model"][name], torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))


@pytest.mark.parametrize("function", ["builtins.eval", "os.system", "numpy.load", "builtins.getattr"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_that_wants_to_run_code_is_refused(family: str, function: str, tmp_path: Path) -> None:
    module, _, name = function.partition(".")
    trap, path = tmp_path / "trap", tmp_path / "some.pkl"
    command = f"open({str(trap)!r}, 'w')" if name == "eval" else f"touch {trap}"
    path.write_bytes(pickle.dumps({"model": {"a": Runs(getattr(__import__(module), name), command)}}))
    with pytest.raises(CheckpointError, match="refused, it holds more than weights and plain values") as caught:
        queryvision.convert(path, family, tmp_path / "ours.pt")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not trap.exists() and not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", pickle.dumps([1])[:-1], pickle.dumps(np.array([{}, []], dtype=object)), pickle.dumps(np.array(["a"]))],
)
def test_a_pickle_that_is_something_else_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no checkpoint or is damaged") as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)


def test_an_array_that_claims_more_than_its_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.pkl"
    whole = pickle.dumps({"model": {"a": np.zeros(5, np.float32)}}, 4)
    path.write_bytes(whole.replace(b"K\x05\x85", b"K\xff\x85"))
    with pytest.raises(CheckpointError, match="is no checkpoint or is damaged"):
        read_pickle(path)


# ---------------------------------------------------------------------------------------------------- other files
def refused(family: str, state: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        FAMILIES[family].read(str(save(state, tmp_path / "other.pth")))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    for family in FAMILIES:
        state = stand_in(family, 80)
        other = stand_in("maskdino" if family == "mask2former" else "mask2former", 80)
        refused(family, {"a": torch.zeros(1)}, "is no checkpoint of .*, it lacks", tmp_path)
        refused(family, other, "is no checkpoint of .*, it lacks", tmp_path)
        rest = {k: v for k, v in state.items() if not k.startswith("backbone")}
        refused(family, rest | {"backbone.patch_embed.proj.weight": torch.zeros(1)}, "a Swin transformer", tmp_path)
    state = stand_in("maskdino", 80)
    refused("maskdino", state | {f"{PREDICTOR}class_embed.weight": torch.zeros(81, 256)}, "81 classes, but 80", tmp_path)
    high = {"sem_seg_head.pixel_decoder.input_proj.0.0.weight": torch.zeros(256, 2048, 1, 1)}
    refused("maskdino", state | high, "the first of 2048 channels", tmp_path)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (f"{PREDICTOR}decoder.bbox_embed.3.layers.0.bias", "is no copy of"),
        (f"{PREDICTOR}bbox_embed.8.layers.2.weight", "is no copy of"),
        (f"{PREDICTOR}decoder.norm.weight", "is no copy of"),
        (f"{PREDICTOR}strange.weight", "belongs to no part"),
    ],
)
def test_what_differs_or_is_strange_is_an_error(key: str, reason: str, tmp_path: Path) -> None:
    state = stand_in("maskdino", 80)
    state[key] = state.get(key, torch.zeros(1)) + 0.5
    with pytest.raises(CheckpointError, match=reason):
        queryvision.convert(save(state, tmp_path / "some.pth"), "maskdino", tmp_path / "ours.pt")
