"""Arrays of draws as ArviZ objects, under ArviZ 0.23 and ArviZ 1.

This module needs no torch and nothing else of the package. Datasets are assembled with xarray, so
that both majors get the same dimensions, coordinates and attributes, and only the container
differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import arviz as az
import numpy as np
import xarray as xr

_MAJOR = int(az.__version__.split(".")[0])
_PRIOR_GROUPS = frozenset(
    {"prior", "prior_predictive", "sample_stats_prior", "unconstrained_prior"}
)
_DENSITY_GROUPS = frozenset({"log_likelihood", "log_prior"})
_CONSTRAINED_GROUPS = {"unconstrained_posterior": "posterior", "unconstrained_prior": "prior"}

_Arrays = dict[str, dict[str, np.ndarray]]


def build(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    *,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Gather groups of arrays in the container of the installed ArviZ.

    Files written by ``to_netcdf`` of either container open under both majors of ArviZ, through
    ``arviz.from_netcdf``.

    Parameters
    ----------
    groups : mapping of str to mapping of str to array
        Arrays by group and variable. They have shape ``(chain, draw, *shape)``, and ``shape``
        alone in groups whose name ends in ``_data``, such as ``observed_data`` and
        ``constant_data``. Chains and draws must be as many in all groups of the prior, and as
        many in all other groups. Empty groups are left out. The arrays are not copied.
    dims : mapping of str to sequence of str, optional
        Names for the dimensions in ``shape`` by variable, used in every group that has the
        variable; other variables are ignored. The default is ``"{variable}_dim_{i}"``. Two kinds of
        groups differ from the others:

        * ``log_likelihood`` and ``log_prior`` have no event dimensions: they take as many of the
          first names as they have dimensions.
        * ``unconstrained_posterior`` and ``unconstrained_prior`` have dimensions of their own,
          ``"{variable}_unconstrained_dim_{i}"``, where a variable's shape differs from that of
          the constrained one, as a simplex's does.
    coords : mapping of str to sequence, optional
        Labels by dimension, as many as the dimension is long; other dimensions are ignored. The
        default is 0, 1, 2, ...
    attrs : mapping of str to any, optional
        Facts about the fit, set both on the container and on its ``posterior`` group, because
        functions that take a group apart see the latter only. Numbers and strings are kept;
        everything else, which netCDF cannot hold, is written as JSON: ``True`` becomes
        ``"true"``, ``None`` becomes ``"null"``. So are integers beyond 64 bits.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The former from ArviZ 0.23, the latter from ArviZ 1.

    Raises
    ------
    ValueError
        If a variable lacks the chain and draw dimensions or disagrees with others about their
        lengths; if the names for its dimensions are too few, too many, repeated, or stand for
        another length elsewhere; if it is called like a dimension; or if a name contains a slash,
        which netCDF does not allow.
    TypeError
        If JSON cannot represent an attribute.

    Examples
    --------
    >>> import numpy as np
    >>> data = build(
    ...     {"posterior": {"theta": np.zeros((1, 100, 2))}},
    ...     dims={"theta": ["school"]},
    ...     coords={"school": ["Deerfield", "Choate"]},
    ...     attrs={"pareto_k": 0.2, "converged": True},
    ... )
    >>> data["posterior"]["theta"].dims
    ('chain', 'draw', 'school')
    >>> data.attrs
    {'pareto_k': 0.2, 'converged': 'true'}
    """
    arrays = {
        group: {variable: np.asarray(values) for variable, values in variables.items()}
        for group, variables in groups.items()
        if variables
    }
    _check_draws(arrays)
    datasets: dict[str, Any] = {
        group: _dataset(group, arrays, dims or {}, coords or {}) for group in arrays
    }
    encoded = {name: _encoded(name, value) for name, value in (attrs or {}).items()}
    if "posterior" in datasets:
        datasets["posterior"].attrs.update(encoded)
    if _MAJOR == 0:
        return az.InferenceData(attrs=encoded, **datasets)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=encoded), **datasets})


def elpd_data(
    elpd_i: np.ndarray,
    khat: np.ndarray,
    *,
    p: float,
    num_draws: int,
    khat_limit: float,
    dims: Sequence[str],
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Gather a leave-one-out cross-validation of an approximate posterior in ArviZ's own object.

    It is what ``arviz.loo(..., pointwise=True)`` returns, and what ``arviz.compare`` and
    ``arviz.plot_khat`` take.

    Parameters
    ----------
    elpd_i : array
        Log predictive density of each observation given the others, in nats.
    khat : array
        Tail index of each observation's weights, of the same shape.
    p : float
        Effective number of parameters.
    num_draws : int
        Number of posterior draws.
    khat_limit : float
        The k-hat above which so many draws are too few.
    dims : sequence of str
        Names of the dimensions.
    coords : mapping of str to sequence, optional
        Labels by dimension. The default is 0, 1, 2, ...

    Returns
    -------
    arviz.ELPDData

    Examples
    --------
    >>> import numpy as np
    >>> elpd_i, khat = np.array([-1.0, -2.0]), np.array([0.1, 0.2])
    >>> data = elpd_data(elpd_i, khat, p=1.0, num_draws=1000, khat_limit=0.67, dims=["item"])
    >>> data["pareto_k"].dims
    ('item',)
    """
    elpd, standard_error = float(elpd_i.sum()), float(np.sqrt(elpd_i.size * np.var(elpd_i)))
    warning = bool((khat > khat_limit).any())
    labels = {
        dim: np.asarray((coords or {}).get(dim, range(size)))
        for dim, size in zip(dims, elpd_i.shape, strict=True)
    }
    pointwise, tails = (xr.DataArray(values, labels, dims) for values in (elpd_i, khat))
    if _MAJOR == 0:
        entries = {
            "elpd_loo": elpd,
            "se": standard_error,
            "p_loo": p,
            "n_samples": num_draws,
            "n_data_points": elpd_i.size,
            "warning": warning,
            "loo_i": pointwise.rename("loo_i"),
            "pareto_k": tails.rename("pareto_shape"),
            "scale": "log",
            "good_k": khat_limit,
        }
        return az.ELPDData(data=list(entries.values()), index=list(entries))
    # Later releases of ArviZ 1 have a class of its own, earlier ones a kind of the common class.
    kind = {} if hasattr(az, "ELPDDataLOO") else {"kind": "loo"}
    return getattr(az, "ELPDDataLOO", az.ELPDData)(
        **kind,
        elpd=elpd,
        se=standard_error,
        p=p,
        n_samples=num_draws,
        n_data_points=elpd_i.size,
        scale="log",
        warning=warning,
        good_k=khat_limit,
        elpd_i=pointwise,
        pareto_k=tails,
        approx_posterior=True,
    )


def _sample_dims(group: str) -> tuple[str, ...]:
    return () if group.endswith("_data") else ("chain", "draw")


def _where(group: str, variable: str) -> str:
    return f"variable {variable!r} of group {group!r}"


def _check_draws(arrays: _Arrays) -> None:
    """Check that variables of the prior, and all others, have the same chains and draws."""
    expected: dict[bool, tuple[int, ...]] = {}
    for group in filter(_sample_dims, arrays):
        for variable, values in arrays[group].items():
            lengths = values.shape[:2]
            if len(lengths) < 2:
                raise ValueError(
                    f"{_where(group, variable)} has shape {values.shape}, "
                    "expected (chain, draw, *shape)"
                )
            if lengths != expected.setdefault(group in _PRIOR_GROUPS, lengths):
                raise ValueError(
                    f"{_where(group, variable)} has (chain, draw) = {lengths}, expected "
                    f"{expected[group in _PRIOR_GROUPS]} as in the variables before it"
                )


def _dataset(
    group: str,
    arrays: _Arrays,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> xr.Dataset:
    """Name and label the dimensions of the variables in a group."""
    names = {
        variable: _dim_names(group, variable, arrays, dims.get(variable))
        for variable in arrays[group]
    }
    used = {dim for variable_names in names.values() for dim in variable_names}
    lengths = {dim: len(labels) for dim, labels in coords.items() if dim in used}
    for variable, values in arrays[group].items():
        if variable in used:
            raise ValueError(f"{_where(group, variable)} must not be called like a dimension")
        for name in (variable, *names[variable]):
            if "/" in name:
                raise ValueError(
                    f"{_where(group, variable)} uses the name {name!r}, expected no slash"
                )
        for dim, length in zip(names[variable], values.shape):
            if length != lengths.setdefault(dim, length):
                raise ValueError(
                    f"{_where(group, variable)} has length {length} along {dim!r}, expected "
                    f"{lengths[dim]} as in coords or the variables before it"
                )
    return xr.Dataset(
        {variable: (names[variable], values) for variable, values in arrays[group].items()},
        coords={dim: np.asarray(coords.get(dim, range(size))) for dim, size in lengths.items()},
    )


def _dim_names(
    group: str, variable: str, arrays: _Arrays, given: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the names of all dimensions of a variable."""
    shape = arrays[group][variable].shape
    sample_dims = _sample_dims(group)
    size = len(shape) - len(sample_dims)
    constrained = arrays.get(_CONSTRAINED_GROUPS.get(group, ""), {}).get(variable)
    if constrained is not None and constrained.shape != shape:
        return (*sample_dims, *(f"{variable}_unconstrained_dim_{i}" for i in range(size)))
    if given is None:
        given = [f"{variable}_dim_{i}" for i in range(size)]
    elif group in _DENSITY_GROUPS:
        given = given[:size]
    if len(given) != size:
        raise ValueError(
            f"{_where(group, variable)} has {size} dimensions to name, but dims has "
            f"{len(given)} names for them: {list(given)}"
        )
    names = (*sample_dims, *given)
    if len(set(names)) < len(names):
        raise ValueError(f"{_where(group, variable)} has repeated dimension names: {list(names)}")
    return names


def _encoded(name: str, value: Any) -> Any:
    """Return an attribute as netCDF can hold it."""
    if isinstance(value, str | float | np.floating):
        return value
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if is_integer and -(2**63) <= value < 2**63:
        return value
    try:
        return json.dumps(value, default=lambda array: array.tolist())
    except (AttributeError, TypeError):
        raise TypeError(
            f"attrs[{name!r}] must be a number, a string or something that JSON can represent, "
            f"got {type(value).__name__}"
        ) from None
