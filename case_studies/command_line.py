"""What the case studies share: command line, and a place for their outputs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")


def parse(name: str, description: str | None) -> argparse.Namespace:
    """Read ``--fast``, ``--seed``, ``--out`` and ``--device``; make the output folder."""
    parser = argparse.ArgumentParser(
        prog=f"python -m case_studies.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fast", action="store_true", help="a rough run in under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs") / name, help="output folder")
    parser.add_argument("--device", default="cpu", help="for instance cpu or cuda")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_json(path: Path, content: Any) -> None:
    """Write metrics to a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")
