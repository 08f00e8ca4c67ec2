"""Writes the page of case studies, from the docstrings of the scripts and their pictures.

The pictures lie in `gallery/NAME/`; a study without any is described all the same. To renew them,
see `gallery/README.md`.
"""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "case_studies"


def studies() -> dict[str, str]:
    """Return what each script says of itself: those with a `main` to run, the others are tools."""
    trees = {path.stem: ast.parse(path.read_text()) for path in sorted(SCRIPTS.glob("[!_]*.py"))}
    return {
        name: ast.get_docstring(tree) or ""
        for name, tree in trees.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    }


def pictures(name: str) -> list[str]:
    """Return the paths of the pictures of a study, as seen from the page."""
    return [str(path.relative_to(HERE)) for path in sorted((HERE / "gallery" / name).glob("*.png"))]


def section(name: str, docstring: str) -> str:
    """Return the description, the command and the pictures of one study."""
    title, _, text = docstring.partition("\n")
    images = [f"![{Path(path).stem.replace('_', ' ')}]({path})" for path in pictures(name)]
    parts = [
        f"## {title.rstrip('.')}",
        f"`python -m case_studies.{name}`",
        *images,
        as_markdown(text.strip()),
    ]
    return "\n\n".join(parts)


def as_markdown(text: str) -> str:
    """Turn numbered references into a list, and links to arXiv into links."""
    text = re.sub(r"^\[(\d+)\] ", r"- [\1] ", text, flags=re.MULTILINE)
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def markdown() -> str:
    """Return all sections."""
    return "\n\n".join(section(name, text) for name, text in studies().items()) + "\n"
