"""Merging of masks against naive copies of the published rules, pixel by pixel, and their properties."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from queryvision.data.classes import ClassMap
from queryvision.head import Fit
from queryvision.masks import Masks, SegmentMasks
from queryvision.results import Result
from queryvision.structures import PixelMap, Round, Stage
from queryvision.tasks.detection import LabelHead
from queryvision.tasks.instance import MaskHead
from queryvision.tasks.instance.masks import Canvas
from queryvision.tasks.panoptic import TASK
from queryvision.tasks.panoptic.merging import merge, semantic

CLASSES = ClassMap((1, 2, 3, 7, 9), ("cat", "dog", "sky", "road", "grass"), (True, True, False, False, False))
SIZE = (43, 61)
SEEDS = range(12)


def masks_of(logits, size=SIZE, padding=(0, 0)):
    """`Masks` with these logits (k,h,w) on the cells, and cells of nonsense right and below."""
    height, width = logits.shape[1:]
    pixels = F.pad(logits, (0, padding[1], 0, padding[0]), value=77.0)
    return Masks(torch.eye(len(logits)), pixels, (float(height), float(width)), size)


def scene(seed, count=23):
    """Smooth random masks of all sizes; some lie nearly on each other, some are tiny, some empty."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 4, 5, generator=generator) * 4 - 1
    logits = F.interpolate(coarse, (12, 16), mode="bicubic")[:, 0]
    logits[1::5] = logits[::5][: len(logits[1::5])] + 0.3 * torch.randn(len(logits[1::5]), 12, 16, generator=generator)
    logits[3::7] -= 12
    logits[3::7, 5, 5] += torch.tensor([22.0, 15.0, 30.0])  # a few pixels, of one cell
    logits[6] = -9
    scores = torch.rand(count, generator=generator).sort(descending=True).values * 0.6 + 0.4
    labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
    boxes = torch.rand(count, 4, generator=generator)
    return Result(scores, labels, CLASSES, SIZE, {"boxes": boxes, "masks": masks_of(logits, padding=(3, 2))}), logits


def enlarge(logits):
    return F.interpolate(logits[None], SIZE, mode="bilinear", align_corners=False)[0]


def naive_mask2former(result, logits, least, overlap):
    """[(set of pixels, label, score, row)], one mask after the other."""
    rows = [i for i in range(len(result)) if result.scores[i] > least]
    probability = enlarge(logits).sigmoid().double()
    segments, of_stuff = [], {}
    if not rows:
        return segments
    winner = torch.stack([probability[i] * result.scores[i].double() for i in rows]).argmax(0).tolist()
    probability = probability.tolist()
    for n, i in enumerate(rows):
        won = {(y, x) for y in range(SIZE[0]) for x in range(SIZE[1]) if winner[y][x] == n}
        own = {(y, x) for y in range(SIZE[0]) for x in range(SIZE[1]) if probability[i][y][x] >= 0.5}
        label = int(result.labels[i])
        if not won & own or len(won) / len(own) < overlap:
            continue
        if label in of_stuff:
            of_stuff[label][0].update(won & own)
            continue
        segments.append((won & own, label, float(result.scores[i]), i))
        if not CLASSES.things[label]:
            of_stuff[label] = segments[-1]
    return segments


def naive_detr(result, logits, least, overlap):
    """As `naive_mask2former`; each class of stuff is a list of rows that share an area."""
    full, left = enlarge(logits), [i for i in range(len(result)) if result.scores[i] > least]
    while left:
        winner = full[left].softmax(0).double().argmax(0) if len(left) > 1 else torch.zeros(SIZE, dtype=torch.int64)
        groups = {}
        for n, i in enumerate(left):
            label = int(result.labels[i])
            group = groups.setdefault(i if CLASSES.things[label] else f"stuff {label}", (set(), label, [], []))
            group[0].update(map(tuple, (winner == n).nonzero().tolist()))
            group[2].append(i)
            group[3].extend([i] if (winner == n).any() else [])
        small = [i for pixels, _, rows, _ in groups.values() if len(pixels) <= 4 for i in rows]
        if not small:
            first = sorted((seen[0], pixels, label) for pixels, label, _, seen in groups.values())
            return [(pixels, label, float(result.scores[row]), row) for row, pixels, label in first]
        left = [i for i in left if i not in small]
    return []


def pixels_of(merged):
    return [set(map(tuple, mask.nonzero().tolist())) for mask in merged.masks]


@pytest.mark.parametrize("rule, naive", [("mask2former", naive_mask2former), ("detr", naive_detr)])
@pytest.mark.parametrize("least, overlap", [(0.5, 0.8), (0.5, 0.3), (0.8, 0.5), (0.0, 0.6)])
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_as_the_published_rule_pixel_by_pixel(rule, naive, least, overlap, seed):
    result, logits = scene(seed)
    merged, expected = merge(result, rule=rule, least=least, overlap=overlap), naive(result, logits, least, overlap)
    assert pixels_of(merged) == [pixels for pixels, *_ in expected]
    assert merged.labels.tolist() == [label for _, label, _, _ in expected]
    assert merged.scores.tolist() == [score for *_, score, _ in expected]
    assert torch.equal(merged.boxes, result.boxes[[row for *_, row in expected]])
    assert merged.values["masks"].map.dtype == torch.int32 and merged.values["masks"].numbers.dtype == torch.int64


def test_the_scenes_say_something():
    """Stuff is merged, masks are dropped for overlap and for smallness, pixels stay nobody's."""
    dropped, nobody, united, small = 0, 0, 0, 0
    for seed in SEEDS:
        result, logits = scene(seed)
        free, strict = (merge(result, least=0.5, overlap=share) for share in (0.0, 0.8))
        dropped += len(free) - len(strict)
        nobody += int((strict.values["masks"].map == 0).sum())
        stuff = [label for label in result.labels[result.scores > 0.5].tolist() if not CLASSES.things[label]]
        united += len(stuff) - len(set(stuff))
        full = enlarge(logits)[result.scores > 0.5].argmax(0)
        small += int(((full.flatten().bincount() > 0) & (full.flatten().bincount() <= 4)).sum())
    assert dropped > 5 and nobody > 100 and united > 5 and small > 2


@pytest.mark.parametrize("rule", ["mask2former", "detr"])
def test_a_result_stays_a_result(rule):
    result, _ = scene(1)
    merged = merge(result, rule=rule, least=0.5, overlap=0.3)
    assert merged.masks.sum(0).max() == 1 and (merged.scores.diff() <= 0).all()
    stuff = [label for label in merged.labels.tolist() if not CLASSES.things[label]]
    assert len(stuff) == len(set(stuff)) > 0
    few = merged.above(float(merged.scores[1]))
    assert len(few) == 2 and torch.equal(few.masks, merged.masks[:2])
    assert (result.scores > 0.5).sum() > len(merged) and isinstance(result.values["masks"], Masks)  # it is not changed


@pytest.mark.parametrize("rule", ["mask2former", "detr"])
def test_nothing_to_merge(rule):
    result, logits = scene(0)
    for empty in (merge(result, rule=rule, least=1.0), merge(result._only(torch.zeros(23, dtype=torch.bool)), rule=rule)):
        assert len(empty) == 0 and empty.masks.shape == (0, *SIZE) and empty.boxes.shape == (0, 4)
        assert not empty.values["masks"].map.any()
    with pytest.raises(TypeError, match="SegmentMasks"):
        merge(merge(result))


def test_a_dropped_part_of_stuff_does_not_take_the_rest_with_it():
    """The better of two skies wins too little of its mask; the other still is a segment, with its own score."""
    logits = torch.full((3, 8, 8), -8.0)
    logits[0, :, :4] = 9
    logits[1, :, :3] = 4
    logits[2, :, 4:] = 6
    scores = torch.tensor([0.95, 0.9, 0.85])
    result = Result(scores, torch.tensor([0, 2, 2]), CLASSES, (8, 8), {"masks": masks_of(logits, (8, 8))})
    merged = merge(result)
    assert merged.labels.tolist() == [0, 2] and merged.scores.tolist() == pytest.approx([0.95, 0.85])
    assert merged.masks.sum((1, 2)).tolist() == [32, 32]


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_semantic_is_the_sum_over_queries(seed):
    result, logits = scene(seed)
    probabilities = torch.rand(len(result), 19, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    inside = logits.sigmoid().double()
    sums = torch.zeros(19, *logits.shape[1:], dtype=torch.float64)
    for q in range(len(result)):
        for c in range(19):
            sums[c] += probabilities[q, c] * inside[q]
    expected, found = enlarge(sums).argmax(0), semantic(probabilities, result.values["masks"])
    assert found.dtype == torch.int64 and len(found.unique()) > 3
    assert (found == expected).float().mean() > 0.999


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_with_a_temperature_classes_and_scores_are_sharpened_as_in_mask_dino(seed):
    """Every query whose best probability is above `least` takes part once, whatever was picked."""
    picked, logits = scene(seed)
    generator = torch.Generator().manual_seed(seed)
    said = torch.randn(1, 1, 23, len(CLASSES), generator=generator) - 1.5
    labels = LabelHead(8, len(CLASSES), loss="focal")
    heads = {"labels": labels, "masks": MaskHead(Fit(8, pixels=23), least=0.25, overlap=0.5, temperature=0.06)}
    canvas = Canvas(PixelMap(picked.values["masks"].pixels[None], torch.tensor([[16.0, 12.0]]), 4), [])
    answers = {"labels": {"logits": said}, "masks": {"embedding": torch.eye(23)[None, None]}}
    round = Round("main", (Stage("layer", last=True),), answers, {"masks": canvas}, {})

    likely = said[0, 0].sigmoid()
    sharp = (likely / 0.06).softmax(-1)
    scores, classes = sharp.max(-1)
    rows = [q for q in scores.argsort(descending=True).tolist() if likely[q].max() > 0.25]
    assert 5 < len(rows) < 23
    wanted = Result(scores[rows], classes[rows], CLASSES, SIZE, {})
    expected = naive_mask2former(wanted, logits[rows], 0.0, 0.5)

    (found,) = TASK.finish(heads, round, [picked._only(torch.arange(3))])
    assert pixels_of(found) == [pixels for pixels, *_ in expected]
    assert found.labels.tolist() == [label for _, label, _, _ in expected]
    assert found.scores.tolist() == pytest.approx([score for *_, score, _ in expected])
    kinds = enlarge(torch.einsum("qc,qhw->chw", sharp, logits.sigmoid())).argmax(0)
    assert (found.maps["semantic"] == kinds).float().mean() > 0.999


@pytest.mark.parametrize("given", [{}, {"boxes": torch.tensor([[0.0, 0, 8, 8]] * 2)}])
def test_segments_whose_boxes_overlap_all_stay(given):
    """Sky beside a road that winds: of two boxes around nearly everything none is too many; of raw masks one is."""
    logits = torch.full((2, 8, 8), -8.0)
    logits[0, :, :4] = logits[0, 7] = 9
    logits[1] = -logits[0]
    logits[1, 0, 0] = 5  # below what the sky says there
    values = {**given, "masks": masks_of(logits, (8, 8))}
    result = Result(torch.tensor([0.95, 0.9]), torch.tensor([2, 3]), CLASSES, (8, 8), values)
    assert len(result.without_overlaps(0.3)) == 1
    merged = replace(merge(result), whole=result)
    found = merged.without_overlaps(0.3)
    assert found.labels.tolist() == [2, 3] and torch.equal(found.masks, merged.masks)
    assert len(found.whole) == 1
    if not given:
        assert merged.boxes.tolist() == [[0, 0, 8, 8], [4, 0, 8, 7]]


def test_more_masks_than_a_chunk_and_ties_go_to_the_first():
    values = {"boxes": torch.arange(20.0)[:, None].expand(-1, 4), "masks": masks_of(torch.full((20, 6, 6), 3.0), (6, 6))}
    result = Result(torch.full((20,), 0.9), torch.zeros(20, dtype=torch.int64), CLASSES, (6, 6), values)
    for rule in ("mask2former", "detr"):
        merged = merge(result, rule=rule)
        assert merged.boxes.tolist() == [[0, 0, 0, 0]] and merged.masks.all()
        assert isinstance(merged.values["masks"], SegmentMasks)


def test_more_segments_than_classes_are_drawn_things_in_shades_of_their_class():
    numbers = torch.arange(1, 9)
    columns = torch.arange(1, 9, dtype=torch.int32).repeat_interleave(8).expand(40, -1).contiguous()
    labels = torch.tensor([0, 0, 0, 2, 3, 4, 1, 0])
    result = Result(torch.ones(8), labels, CLASSES, (40, 64), {"masks": SegmentMasks(numbers, columns)})
    picture = TASK.draw(Image.new("RGB", (64, 40)), result)
    shades = [picture.getpixel((8 * segment + 4, 38)) for segment in range(8)]
    assert len(set(shades)) == 8
