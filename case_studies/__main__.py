"""List the case studies, or run them one after the other."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def studies() -> dict[str, str]:
    """Return the names of the case studies, the scripts with a ``main``, and their first lines."""
    trees = {path.stem: ast.parse(path.read_text()) for path in sorted(FOLDER.glob("[!_]*.py"))}
    return {
        name: (ast.get_docstring(tree) or "").split("\n")[0]
        for name, tree in trees.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    }


def run(name: str, folder: Path, options: list[str]) -> bool:
    """Run a case study in a process of its own; print how long it took and whether it failed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", f"case_studies.{name}", "--out", str(folder / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    outcome = "failed" if done.returncode else "written"
    print(f"{name:<15}{time.perf_counter() - start:7.1f} s   {outcome}", flush=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    """Print the case studies, or run those that ``--run`` names, all if it names none."""
    parser = argparse.ArgumentParser(
        prog="python -m case_studies",
        description=__doc__,
        epilog="Other options, such as --fast and --seed, are passed on to each case study.",
    )
    titles = studies()
    parser.add_argument("--run", nargs="*", choices=titles, metavar="NAME", help="all by default")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="a folder for each study")
    options, passed_on = parser.parse_known_args()
    if options.run is None:
        if passed_on:
            parser.error(f"{passed_on[0]} needs --run")
        for name, title in titles.items():
            print(f"python -m case_studies.{name}\n    {title}")
        return
    names = options.run or list(titles)
    failed = [name for name in names if not run(name, options.out, passed_on)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
