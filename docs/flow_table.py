"""Writes `flows.md`, the table of all registered flows, from the registry.

    python docs/flow_table.py

Times are taken from `flow_speeds.csv`, which the benchmark writes:

    python -m tests.benchmarks.flows --dims 16 --libraries pyroflows --csv docs/flow_speeds.csv
"""

from pathlib import Path

import pandas as pd

import pyroflows as pf

HERE = Path(__file__).parent
INTRODUCTION = """# Flows

What `pf.flows.names()` lists, with what each flow promises. *Fast* directions take one evaluation,
or one solve of the same cost, whatever the dimension; the others go through the entries one by one
or solve an equation in every layer. Log-determinants are exact unless marked as estimates. Every
flow inverts: in closed form, or by a solve that raises when it does not converge. All flows take a
context. Flows of the circle are for vectors of angles.

Times are milliseconds for 512 vectors of 16 entries at five layers of 64x64 hidden units on one
thread of a shared machine; they tell flows apart, not machines.

"""


def mark(promise: bool) -> str:
    return "yes" if promise else "no"


def speeds() -> pd.DataFrame:
    """Return the measured medians, a row for each flow and a column for each operation."""
    rows = pd.read_csv(HERE / "flow_speeds.csv")
    rows = rows[(rows["library"] == "pyroflows") & (rows["D"] == 16)]
    return rows.pivot(index="kind", columns="operation", values="milliseconds")


def rows() -> pd.DataFrame:
    """Return the table in words."""
    flows, times = pf.flows.table(), speeds()
    table = pd.DataFrame(
        {
            "flow": [f"`{name}`" for name in flows.index],
            "": flows["description"].to_list(),
            "fast forward": flows["fast_forward"].map(mark).to_list(),
            "fast inverse": flows["fast_inverse"].map(mark).to_list(),
            "log-det": ["exact" if exact else "estimate" for exact in flows["exact_log_det"]],
            "inverse": [
                "closed form" if closed else "solve" for closed in flows["closed_form_inverse"]
            ],
            "support": flows["support"].to_list(),
            "paper": [
                f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
                for paper in flows["paper"]
            ],
        }
    )
    for operation in ("train step", "log_prob", "sample"):
        measured = times[operation].reindex(flows.index)
        table[f"{operation} (ms)"] = ["-" if pd.isna(t) else f"{t:.1f}" for t in measured]
    return table


def markdown() -> str:
    """Return the page."""
    table = rows()
    lines = [[*table.columns], ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return INTRODUCTION + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    (HERE / "flows.md").write_text(markdown())
