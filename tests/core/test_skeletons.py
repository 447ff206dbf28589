"""Skeletons: read from categories, kept by checkpoints, and what they say about mirroring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from queryvision.data.classes import ClassMap
from queryvision.data.scenes import CATEGORIES
from queryvision.data.skeletons import Skeleton, by_name, flip_orders
from queryvision.errors import ConfigError, DataError

FACE = {"id": 1, "name": "face", "keypoints": ["left_eye", "right_eye", "mouth"], "skeleton": [[1, 3], [2, 3], [1, 9]]}


def test_what_a_category_leaves_out_is_told_by_names() -> None:
    face = Skeleton.from_category(FACE)
    assert face == Skeleton(("left_eye", "right_eye", "mouth"), ((0, 2), (1, 2)), ((0, 1),), (0.025, 0.025, 0.07))
    given = Skeleton.from_category({**FACE, "flip_pairs": [[0, 2]], "sigmas": [0.1, 0.1, 0.2]})
    assert given is not None and given.flip_pairs == ((0, 2),) and given.sigmas == (0.1, 0.1, 0.2)
    assert Skeleton.from_category({"id": 2, "name": "car"}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip_pairs": [[0, 1], [2, 3]]},  # counted from 1, or too many
        {"flip_pairs": [[-1, 0]]},
        {"flip_pairs": [[0, 1], [1, 2]]},
        {"flip_pairs": [[0, 0]]},
        {"flip_pairs": [[0, 1, 2]]},
        {"flip_pairs": "left right"},
        {"sigmas": [0.1, 0.1]},
        {"sigmas": [0.1, -1, 0.2]},
        {"sigmas": 0.1},
    ],
    ids=str,
)
def test_what_would_teach_or_judge_wrongly_is_refused(wrong: dict[str, object]) -> None:
    (key,) = wrong
    with pytest.raises(DataError, match=f"faces.json: category 'face': {key}"):
        ClassMap.from_categories([{**FACE, **wrong}], "faces.json")


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], ((1, 2),)),
        (["Left Wing", "tail", "Right Wing"], ((0, 2),)),
        (["a", "b"], None),  # nothing says a side
        (["left_eye", "nose"], None),  # no right one
        (["right_eye", "nose"], None),
        (["left_eye", "right_eye", "l_ear", "r_ear"], None),
        (["left_eye", "right_eye", "L ear", "R ear"], None),
    ],
)
def test_flip_pairs_by_name(names: list[str], pairs: object) -> None:
    assert by_name(names) == pairs


def test_cocos_person_has_cocos_sigmas(real_data: Callable[[str], Path]) -> None:
    from pycocotools.cocoeval import Params

    raw = json.loads((real_data("coco") / "annotations" / "person_keypoints_val.json").read_text())
    person = Skeleton.from_category(raw["categories"][0])
    assert person is not None
    assert person.sigmas == pytest.approx(Params("keypoints").kpt_oks_sigmas.tolist())
    assert person.flip_pairs == tuple((i, i + 1) for i in range(1, 17, 2)) and len(person.limbs) == 19


def test_class_maps_carry_skeletons_through_json() -> None:
    classes = ClassMap.from_categories(CATEGORIES)
    assert [skeleton is not None for skeleton in classes.skeletons] == [True] + [False] * (len(CATEGORIES) - 1)
    assert ClassMap.from_dict(json.loads(json.dumps(classes.to_dict()))) == classes
    plain = ClassMap((1, 2), ("a", "b"), (True, True))
    assert plain.skeletons == (None, None) and "skeletons" not in plain.to_dict()


def test_union_takes_the_skeleton_that_one_side_knows_and_refuses_two() -> None:
    face, bare = ClassMap.from_categories([FACE]), ClassMap((1,), ("face",), (True,))
    assert bare.union(face) == face == face.union(bare)
    other = ClassMap.from_categories([{**FACE, "keypoints": ["nose"]}])
    with pytest.raises(ConfigError, match="face"):
        face.union(other)


def test_each_class_swaps_its_own_keypoints() -> None:
    face, hand = Skeleton.from_category(FACE), Skeleton.from_category({"keypoints": ["thumb"], "flip_pairs": []})
    orders = flip_orders([hand, face, None])
    assert orders is not None and orders.tolist() == [[0, 1, 2], [1, 0, 2], [0, 1, 2]]
    names = ["left_eye", "right_eye", "left_ear", "right_ear"]
    lists = ([[0, 1], [2, 3]], [[3, 2], [0, 1]])  # the same pairs
    orders = flip_orders([Skeleton.from_category({"keypoints": names, "flip_pairs": pairs}) for pairs in lists])
    assert orders is not None and orders.tolist() == [[1, 0, 3, 2]] * 2
    assert flip_orders([face, Skeleton.from_category({"keypoints": ["thumb"]})]) is None and flip_orders([None]) is None
