"""A restricted Boltzmann machine: a flow finds all its memories, where Gibbs sampling sits in one.

Ten spins s_i = +-1 see each other through two normal hidden units l_1 and l_2 only: the energy is
|l|^2 / 2 - sum_i h_i s_i - sum_ij W_ij s_i l_j. This is a Hopfield network in disguise [1]: the
columns of W are two patterns it remembers, with some noise. Summed over the spins, the hidden units
have the density

    p(l) = N(l; 0, I) prod_i 2 cosh(x_i(l)) / Z,    x_i(l) = sum_j W_ij l_j + h_i.

With strong couplings it has four modes, each pattern and its negative, with little between them.
The classical sampler draws spins and hidden units in turn, as in contrastive divergence [2]; chains
of 10 000 sweeps end in the mode that they began in. A flow guide fitted as usual loses one mode or
more. Fitted with ``initial_temperature`` it starts where the modes have merged and follows as they
part.

All is known exactly, by summing over the 1024 states of the spins: Z, the mean of each spin, and
the density of the hidden units, which is a mixture of 1024 normal distributions.

What to look at: the share of each mode. And the verdict on the fit without cooling: it cannot see
what the guide never visits, and its ELBO falls short of log Z by the logarithm of the share of the
modes that it has kept, or more. Cooling, or fits from several starts (``pf.fit_restarts``), reveal
it. The cooled guide leaves faint bridges between the modes and gets their shares roughly right; its
importance weights put them right.

[1] A. Barra, A. Bernacchia, E. Santucci, P. Contucci. On the equivalence of Hopfield networks and
    Boltzmann machines. arXiv:1105.2790, 2012.
[2] G. E. Hinton. Training products of experts by minimizing contrastive divergence. Neural
    Computation, 2002.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.plots import plot_density

from .command_line import parse, save_figure, write_json

NUM_SPINS = 10
COUPLING = 0.8
BOUND, CELLS = 13.0, 160  # densities are integrated on a grid of cells in [-BOUND, BOUND]^2
NUM_CHAINS, NUM_SWEEPS = 8, 10_000
# In larger steps, or with fewer draws, cooling loses its way among modes with steep walls.
BUDGET = {"learning_rate": 1e-3, "num_steps": 2000, "num_particles": 1024}
FAST = {"learning_rate": 2e-3, "num_steps": 600}
FITS = {"fit as usual": 1.0, "fit with cooling": 20.0}  # initial temperatures


class Machine(NamedTuple):
    """Hold couplings ``(N, 2)`` and fields ``(N,)`` of a machine."""

    couplings: Tensor
    fields: Tensor

    def inputs(self, hidden: Tensor) -> Tensor:
        """Return what hidden units ``(*batch, 2)`` tell the spins, ``(*batch, N)``."""
        return hidden @ self.couplings.T + self.fields

    def log_weight(self, hidden: Tensor) -> Tensor:
        """Return the logarithm of the product of ``2 cosh(x_i)``: the spins summed out."""
        x = self.inputs(hidden)
        return torch.logaddexp(x, -x).sum(-1)

    def climb(self, hidden: Tensor, num_steps: int = 50) -> Tensor:
        """Go uphill in the density of hidden units, to a mode, where ``l = W' tanh(x(l))``."""
        for _ in range(num_steps):
            hidden = self.inputs(hidden).tanh() @ self.couplings
        return hidden

    def sweep(self, hidden: Tensor) -> Tensor:
        """Draw spins given hidden units, then hidden units given spins: block Gibbs sampling."""
        spins = 2 * torch.bernoulli((2 * self.inputs(hidden)).sigmoid()) - 1
        return spins @ self.couplings + torch.randn_like(hidden)


def build_machine(seed: int = 1) -> Machine:
    """Store two patterns, equal on half of the spins and opposite on the others, with noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.ones(NUM_SPINS, 2)
    patterns[NUM_SPINS // 2 :, 1] = -1
    noise = torch.randn(NUM_SPINS, 2, generator=generator)
    fields = torch.randn(NUM_SPINS, generator=generator)
    return Machine(COUPLING * (patterns + 0.1 * noise), 0.1 * fields)


def model(couplings: Tensor, fields: Tensor) -> None:
    """Draw hidden units and weight them by the sum over all spins."""
    machine = Machine(couplings, fields)
    zeros = torch.zeros_like(couplings[0])
    hidden = pyro.sample("hidden", dist.Normal(zeros, 1.0).to_event(1))
    pyro.factor("spins", machine.log_weight(hidden))
    pyro.deterministic("magnetization", machine.inputs(hidden).tanh())


class Exact:
    """Hold the exact answer, in double precision.

    Attributes
    ----------
    log_z
        Logarithm of the normaliser.
    magnetization
        Means of the spins, ``(N,)``.
    modes, shares
        Where the density of the hidden units peaks, ``(K, 2)``, and how much of it is uphill to
        each peak, ``(K,)``.
    points, density
        Centres of the cells of the grid and the probabilities of the cells.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = Machine(*(part.double() for part in machine))
        couplings, fields = self.machine
        sign = torch.tensor([-1.0, 1.0]).double()
        states = torch.cartesian_prod(*[sign] * len(fields))
        means = states @ couplings  # of the hidden units, given the spins
        log_mass = states @ fields + 0.5 * means.square().sum(-1)
        self.log_z = log_mass.logsumexp(0).item()
        self.magnetization = log_mass.softmax(0) @ states
        self.modes = torch.unique(self.machine.climb(means).round(decimals=3), dim=0)

        centres = torch.linspace(-BOUND, BOUND, 2 * CELLS + 1).double()[1::2]
        self.points = torch.cartesian_prod(centres, centres)
        self.density = self.log_density(self.points).softmax(0)
        self.shares = self.shares_of(self.points, self.density)

    def log_density(self, hidden: Tensor) -> Tensor:
        """Return the log-density of hidden units ``(*batch, 2)``, up to a constant."""
        return self.machine.log_weight(hidden) - 0.5 * hidden.square().sum(-1)

    def modes_of(self, hidden: Tensor) -> Tensor:
        """Return the index of the mode uphill from each of the points."""
        return torch.cdist(self.machine.climb(hidden), self.modes).argmin(-1)

    def shares_of(self, hidden: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the share of each mode among (weighted) points ``(S, 2)``."""
        counts = torch.bincount(self.modes_of(hidden), weights, minlength=len(self.modes))
        return counts / counts.sum()

    def compare(self, draws: Tensor) -> dict[str, float | list[float]]:
        """Compare draws ``(S, 2)`` with the truth."""
        draws = draws.double().cpu()
        magnetization = self.machine.inputs(draws).tanh().mean(0)
        return {
            "shares": self.shares_of(draws).tolist(),
            "worst magnetization": (magnetization - self.magnetization).abs().max().item(),
        }


def log_prob_of(result: pf.VariationalPosterior) -> Callable[[Tensor], Tensor]:
    """Return a guide's log-density as a function of hidden units."""
    return lambda hidden: result.log_prob({"hidden": hidden})


def assess(result: pf.VariationalPosterior, exact: Exact) -> dict[str, float | list[float]]:
    """Return the verdict on a guide, and its errors; total variation is summed over the grid."""
    log_q = log_prob_of(result)(exact.points.to(result.draws)).double().cpu()
    mass = log_q.exp() * (2 * BOUND / CELLS) ** 2
    return {
        "gap": exact.log_z - result.elbo,
        "standard error": result.elbo_standard_error,
        "k-hat": result.khat,
        "error of log Z": result.log_evidence - exact.log_z,
        "total variation": 0.5 * (mass - exact.density).abs().sum().item(),
        **exact.compare(result.sample(20_000, seed=1)["hidden"]),
        "weighted": exact.compare(result.sample(20_000, resample=True, seed=1)["hidden"]),
    }


def run_gibbs(machine: Machine, seed: int) -> Tensor:
    """Return the hidden units of independent chains, ``(NUM_SWEEPS, NUM_CHAINS, 2)``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [torch.randn(NUM_CHAINS, 2)]
        for _ in range(NUM_SWEEPS):
            hidden.append(machine.sweep(hidden[-1]))
    return torch.stack(hidden[1:])


def assess_gibbs(chains: Tensor, exact: Exact) -> dict[str, list]:
    """Compare each chain with the truth, and count how often it changes mode."""
    rows = [exact.compare(chain) for chain in chains.unbind(1)]
    modes = exact.modes_of(chains.double())
    return {
        **{name: [row[name] for row in rows] for name in rows[0]},
        "changes of mode": (modes[1:] != modes[:-1]).sum(0).tolist(),
    }


def draw_picture(
    results: dict[str, pf.VariationalPosterior], chain: Tensor, exact: Exact
) -> plt.Figure:
    """Draw densities of the hidden units, a Gibbs chain, and the margins of them all."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 8))
    limits = ((-BOUND, BOUND), (-BOUND, BOUND))
    plot_density(lambda hidden: exact.log_density(hidden.double()), limits, ax=axes[0, 0])
    axes[0, 0].set_title("exact")
    for ax, (name, result) in zip(axes[0, 1:], results.items(), strict=True):
        plot_density(log_prob_of(result), limits, device=result.draws.device, ax=ax)
        ax.set_title(f"{name}, ELBO - log Z = {result.elbo - exact.log_z:.2f}")
    axes[1, 0].plot(*chain.T, "k.", markersize=1)
    axes[1, 0].set(title=f"Gibbs, {len(chain)} sweeps", aspect="equal", xlim=limits[0])
    for ax in (*axes[0], axes[1, 0]):
        ax.set(xlabel="$l_1$", ylabel="$l_2$", ylim=limits[1])
    grid, width = exact.density.reshape(CELLS, CELLS), 2 * BOUND / CELLS
    for i, ax in enumerate(axes[1, 1:]):
        ax.plot(exact.points[:CELLS, 1], grid.sum(1 - i) / width, "0.75", lw=4, label="exact")
        for (name, result), style in zip(results.items(), ("k:", "k-"), strict=True):
            values = result.sample(50_000, seed=2)["hidden"][:, i].cpu()
            heights, edges = torch.histogram(values, 96, range=(-BOUND, BOUND), density=True)
            ax.plot((edges[1:] + edges[:-1]) / 2, heights, style, lw=1, label=name)
        ax.set(xlabel=f"$l_{i + 1}$", ylabel="density")
    axes[1, 1].legend(fontsize="small")
    return figure


def tabulate_shares(metrics: dict[str, dict], exact: Exact) -> pd.DataFrame:
    """Return the share of each mode, exactly and by everything that was tried."""
    rows = {name: metrics[name]["shares"] for name in ("exact", *FITS)}
    rows["the latter, weighted"] = metrics["fit with cooling"]["weighted"]["shares"]
    for i, values in enumerate(metrics["Gibbs chains"]["shares"], start=1):
        rows[f"Gibbs chain {i}"] = values
    modes = [f"({x:.1f}, {y:.1f})" for x, y in exact.modes.tolist()]
    return pd.DataFrame.from_dict(rows, orient="index", columns=modes)


def main() -> None:
    """Fit the guide with and without cooling, run the chains, write the files."""
    options = parse("boltzmann", __doc__)
    machine = build_machine()
    exact = Exact(machine)
    print(f"exact log Z: {exact.log_z:.4f}")
    budget: dict[str, Any] = FAST if options.fast else BUDGET
    args = tuple(part.to(options.device) for part in machine)
    results = {}
    truth = {name: getattr(exact, name).tolist() for name in ("modes", "shares", "magnetization")}
    metrics: dict[str, dict] = {"exact": {"log Z": exact.log_z, **truth}}
    for name, temperature in FITS.items():
        start = time.perf_counter()
        settings = {**budget, "initial_temperature": temperature, "seed": options.seed}
        result = results[name] = pf.fit(model, pf.AutoSpline(model), args, **settings)
        metrics[name] = {**assess(result, exact), "seconds": time.perf_counter() - start}
    chains = run_gibbs(machine, options.seed)
    metrics["Gibbs chains"] = assess_gibbs(chains, exact)
    print("\nshares of the modes:")
    print(tabulate_shares(metrics, exact).round(3).to_string())
    print(
        pd.DataFrame({name: metrics[name] for name in FITS})
        .drop(["shares", "weighted"])
        .to_string()
    )

    results["fit with cooling"].to_arviz().to_netcdf(options.out / "boltzmann.nc")
    write_json(options.out / "metrics.json", metrics)
    save_figure(draw_picture(results, chains[:, 0], exact), options.out / "hidden_units.png")
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()))


if __name__ == "__main__":
    main()
