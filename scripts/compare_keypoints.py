"""Both forms of the keypoint head on the drawn scenes: same model, images, steps and seed; held-out OKS AP and training time.

    python scripts/compare_keypoints.py --steps 650 --seeds 0

Prints a table for `docs/keypoints.md`; each run's folder stays under `--output`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import queryvision

FORMS = {"from the query's state": "false", "grouped": "true"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--form", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--output", type=Path, default=Path("runs/compare_keypoints"))
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.steps} steps", flush=True)
    rows = ["| form | seed | OKS AP / AP50 | box AP / AP50 | training |", "|---|---|---|---|---|"]
    for seed in given.seeds:
        for form in given.form:
            folder = queryvision.train(
                "keypoints", steps=given.steps, seed=seed, output=given.output,
                name=f"grouped_{FORMS[form]}_{seed}", settings=[f"heads.keypoints.grouped={FORMS[form]}"],
            )  # fmt: skip
            rows.append(_row(form, seed, folder))
            print("\n".join(rows), flush=True)


def _row(form: str, seed: int, folder: Path) -> str:
    summary = json.loads((folder / "summary.json").read_text())
    found = summary["metrics"]
    pairs = [f"{found[f'{kind}AP']:.3f} / {found[f'{kind}AP50']:.3f}" for kind in ("", "box_")]
    return f"| {form} | {seed} | {' | '.join(pairs)} | {summary['seconds'] / 60:.1f} minutes |"


if __name__ == "__main__":
    main()
