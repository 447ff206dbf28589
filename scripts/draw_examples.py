"""The picture of the README: a checkpoint's results on the first held-out scenes, enlarged, none of them chosen.

python scripts/draw_examples.py runs/detection/scenes/best.pt docs/predictions.jpg [--images 8] [--columns 4] [--enlarge 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import queryvision
from queryvision.data.scenes import make_scenes
from queryvision.inference.drawing import grid
from queryvision.inference.predictor import find_pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--enlarge", type=int, default=3)
    given = parser.parse_args()
    predictor = queryvision.load(given.checkpoint)
    scenes = [Image.open(path) for path in find_pictures([str(make_scenes() / "images" / "val_*.png")])[: given.images]]
    large = [
        scene.resize((given.enlarge * scene.width, given.enlarge * scene.height), Image.Resampling.BICUBIC) for scene in scenes
    ]
    drawn = [predictor.task.draw(scene, result) for scene, result in zip(large, predictor.predict(large), strict=True)]
    grid(drawn, given.columns).save(given.picture, quality=88)


if __name__ == "__main__":
    main()
