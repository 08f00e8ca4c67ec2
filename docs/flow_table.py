"""Writes `flows.md`, the tables of all registered flows, from the registry.

    python docs/flow_table.py

Times and memory are taken from `flow_speeds.csv` and `image_flow_speeds.csv`, which the benchmarks
write:

    python -m tests.benchmarks.flows --dims 16 --libraries pyroflows --csv docs/flow_speeds.csv
    python -m tests.benchmarks.images --csv docs/image_flow_speeds.csv
"""

from pathlib import Path
from typing import Literal

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
IMAGES = """
## Images

What `pf.flows.names("image")` lists: convolutions over several scales. Flows for vectors take
images too, `pf.flow("spline_coupling", (1, 8, 8))`, and see their entries in a row. See
[the guide to images](images.md).

Times are milliseconds for 16 images of 3x32x32 in three scales of eight layers, 64 channels wide,
on one thread: a step of training by AdamW, with noise and logits, and as many draws. Memory is what
a step keeps from its forward pass for the backward one, and by how much a process grows at most
while it trains.

"""
MEASURES = {
    "vector": ["train step (ms)", "log_prob (ms)", "sample (ms)"],
    "image": [
        "train step (ms)",
        "sample (ms)",
        "kept for the backward pass (MiB)",
        "peak memory of training (MiB)",
    ],
}
Event = Literal["vector", "image"]


def mark(promise: bool) -> str:
    return "yes" if promise else "no"


def measured(event: Event) -> pd.DataFrame:
    """Return the medians of the benchmark, a row for each flow and a column for each measure."""
    if event == "image":
        return pd.read_csv(HERE / "image_flow_speeds.csv", index_col="quantity").T
    rows = pd.read_csv(HERE / "flow_speeds.csv")
    rows = rows[(rows["library"] == "pyroflows") & (rows["D"] == 16)]
    return rows.pivot(index="kind", columns="operation", values="milliseconds").add_suffix(" (ms)")


def rows(event: Event = "vector") -> pd.DataFrame:
    """Return a table in words."""
    flows, numbers = pf.flows.table(event), measured(event)
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
    for measure in MEASURES[event]:
        values = numbers[measure].reindex(flows.index)
        table[measure] = ["-" if pd.isna(value) else f"{value:.1f}" for value in values]
    return table


def as_markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    lines = [[*table.columns], ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown() -> str:
    """Return the page."""
    return INTRODUCTION + as_markdown(rows()) + IMAGES + as_markdown(rows("image"))


if __name__ == "__main__":
    (HERE / "flows.md").write_text(markdown())
