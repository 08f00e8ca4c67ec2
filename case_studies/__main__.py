"""List the case studies."""

import ast
import pkgutil
from pathlib import Path

FOLDER = Path(__file__).parent
TOOLS = {
    "__main__",
    "accuracy",
    "budget",
    "calibration",
    "command_line",
    "corner",
    "energy_functions",
    "toys",
}


def main() -> None:
    """Print the name and the first line of each case study."""
    for module in pkgutil.iter_modules([str(FOLDER)]):
        if module.name not in TOOLS:
            source = (FOLDER / f"{module.name}.py").read_text()
            title = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
            print(f"python -m case_studies.{module.name}\n    {title}")


if __name__ == "__main__":
    main()
