"""Checks of calibration as ArviZ data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class RankCheck(Protocol):
    """What has ranks of truths among draws, ``(N,)`` or ``(N, D)``, and their PIT values."""

    @property
    def ranks(self) -> Tensor: ...

    @property
    def pit(self) -> Tensor: ...

    @property
    def num_draws(self) -> int: ...


def to_arviz(checks: Mapping[str, RankCheck], names: Sequence[str] = ()) -> Any:
    """Return checks of the same replicates as ArviZ data: a variable each, replicates as draws.

    Parameters
    ----------
    checks
        Checks by name.
    names
        Names of the ``D`` parameters, the dimension ``parameter``.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The group ``prior_sbc`` holds probability integral transforms, between 0 and 1, where
        ``plot_ecdf_pit`` of ArviZ 1 looks for them; the group ``ranks`` the ranks.

    Examples
    --------
    >>> import torch
    >>> from pyroflows.diagnostics import SBC
    >>> sbc = SBC(torch.arange(20).unsqueeze(-1), num_draws=19, names=("theta",))
    >>> to_arviz({"sbc": sbc}, sbc.names)["prior_sbc"]["sbc"].sizes["parameter"]
    1
    """
    from pyroflows.arviz import build  # imported late: importing arviz takes seconds

    groups = {
        "prior_sbc": {name: check.pit.numpy()[None] for name, check in checks.items()},
        "ranks": {name: check.ranks.numpy()[None] for name, check in checks.items()},
    }
    return build(
        groups,
        dims={name: ["parameter"] for name, check in checks.items() if check.ranks.ndim == 2},
        coords={"parameter": list(names)},
        attrs={
            "inference_library": "pyroflows",
            "num_draws": {name: check.num_draws for name, check in checks.items()},
        },
    )
