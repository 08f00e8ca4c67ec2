"""What the case studies share: command line, and a place for their outputs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from PIL import Image

NUM_COLORS = 128  # of pictures: more would not be seen, and double the size of the files


def parse(name: str, description: str | None, **choices: Iterable[str]) -> argparse.Namespace:
    """Read ``--fast``, ``--seed``, ``--out`` and ``--device``; make the output folder.

    Each further keyword becomes an option that takes some of the given choices.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m case_studies.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fast", action="store_true", help="a rough run in under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs") / name, help="output folder")
    parser.add_argument("--device", default="cpu", help="for instance cpu or cuda")
    for option, values in choices.items():
        names = list(values)
        parser.add_argument(
            f"--{option}", nargs="+", choices=names, metavar="NAME", help=", ".join(names)
        )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_json(path: Path, content: Any) -> None:
    """Write metrics to a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a picture and let go of it."""
    figure.tight_layout()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    with Image.open(path) as picture:
        few_colors = picture.convert("RGB").quantize(NUM_COLORS)
    few_colors.save(path, optimize=True)


def tabulate(metrics: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> pd.DataFrame:
    """Return one metric as a table of what was tried, from ``metrics[row][column][name]``."""
    rows = {row: {c: m[name] for c, m in columns.items()} for row, columns in metrics.items()}
    return pd.DataFrame.from_dict(rows, orient="index")
