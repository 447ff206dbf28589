"""`qv trace`: measured on the running model, and the same as the documentation prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from queryvision.cli import app
from queryvision.errors import ConfigError
from queryvision.tasks.detection import detr_small
from queryvision.tracing import Step, trace, trace_model

DOC = Path(__file__).parents[2] / "docs" / "how_detr_works.md"


def shapes(steps: list[Step]) -> dict[str, str]:
    return {step.part: step.shape for step in steps}


@pytest.fixture(scope="module")
def published() -> list[Step]:
    """DETR-R50 at the size of the documentation."""
    return trace("detr_r50_coco", "800x600")


def test_the_documentation_shows_the_live_output() -> None:
    command = "qv trace --config detr_r50_coco --image 800x600"
    block = re.search(rf"```bash\n{command}\n```.*?```text\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert block, f"{DOC} has no output of `{command}`"
    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 0, result.output
    assert [line.rstrip() for line in result.output.splitlines()] == block.group(1).splitlines()


def test_the_numbers_that_a_reader_of_the_paper_expects(published: list[Step]) -> None:
    assert [(step.part, step.shape) for step in published] == [
        ("image", "(1,3,800,600)"),
        ("backbone", "(1,2048,25,19)"),
        ("neck", "(1,256,25,19)"),
        ("flatten", "(1,475,256)"),
        ("positions", "(1,475,256)"),
        *((f"encoder layer {i}", "(1,475,256)") for i in range(1, 7)),
        ("memory", "(1,475,256)"),
        ("object queries", "(1,100,256)"),
        *((f"decoder layer {i}", "(1,100,256)") for i in range(1, 7)),
        ("decoder", "(1,100,256)"),
        ("head 'labels'", "(1,100,92)"),
        ("head 'boxes'", "(1,100,4)"),
    ]


def test_several_levels_and_proposals_have_their_lines() -> None:
    steps = trace("default", "128x96")
    found = shapes(steps)
    assert found["image"] == "(1,3,128,96)"
    assert [step.shape for step in steps if step.part == "neck"] == ["(1,128,16,12)", "(1,128,8,6)"]
    assert found["memory"] == "(1,240,128)"
    assert found["decoder"] == "(1,100,128)"
    boxes = [step for step in steps if step.part.startswith("head 'boxes'") and step.what == "boxes"]
    places = ["proposals", "first guess", "layer 1", "layer 2"]
    assert [step.part for step in boxes] == [*(f"head 'boxes', {place}" for place in places), "head 'boxes'"]
    assert {step.shape for step in boxes} == {"(1,100,4)"}
    corners = [step.part for step in steps if step.what == "corners"]
    assert corners == ["head 'boxes', layer 1", "head 'boxes', layer 2", "head 'boxes'"], "the first guess is a plain box"
    order = [step.part for step in steps]
    assert order.index("encoder layer 1") < order.index("flatten") < order.index("memory")
    assert sum(step.part.startswith("encoder layer") for step in steps) == 1
    assert sum(step.part.startswith("decoder layer") for step in steps) == 3


def test_a_model_at_hand_is_measured_and_left_without_hooks() -> None:
    model = detr_small(5, width=64, num_queries=7, encoder_layers=0, decoder_layers=1)
    found = shapes(trace_model(model, 65, 40))
    assert found["neck"] == "(1,64,5,3)"
    assert found["decoder layer 1"] == "(1,7,64)"
    assert found["head 'labels'"] == "(1,7,6)"
    assert "encoder layer 1" not in found
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "image", ["800", "800x", "x600", "31x600", "-800x600", "800x600x3", "800,600", "80.5x60", "²00x600", ""]
)
def test_a_size_that_is_no_height_x_width_is_named(image: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--image {image}: write height x width")):
        trace("detr_r50_coco", image)


def test_an_unknown_configuration_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'detr_r50_coco'"):
        trace("detr_r50_cocoo", "800x600")
