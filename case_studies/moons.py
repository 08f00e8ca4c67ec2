"""Two moons: build an affine coupling flow, fit it, and look at its maps forward and backward.

The classic first exercise. An affine coupling [1] leaves one coordinate as it is and scales and
shifts the other by amounts that a network computes from the first; turn by turn both are moved.
Each step inverts in closed form and has a triangular Jacobian, so the density of a stack of them is
exact, and it is fitted by maximum likelihood.

What to look at: the density; the forward map, which bends the grid of the base distribution into
two moons; the backward map, which should turn the data into a round normal cloud; and how thin the
bridge between the moons is, for a continuous map cannot tear the plane. The moons' entropy is
known: test negative log-likelihood minus entropy is the Kullback-Leibler divergence from the truth
to the flow, in nats.

[1] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
    arXiv:1605.08803, 2016.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.plots import plot_density, plot_warp
from pyroflows.transforms import Affine, Compose, Coupling

from .command_line import parse, save_figure, write_json
from .toys import TOYS, divergence, to_arviz

MOONS = TOYS["moons"]
LIMITS = ((-4.0, 4.0), (-3.0, 3.0))


def build_flow(num_layers: int = 12) -> pf.Flow:
    """Stack affine couplings that move one coordinate and the other in turn."""
    layers = [Coupling(Affine(), 2, swap=i % 2 == 1, activation=nn.Tanh) for i in range(num_layers)]
    return pf.Flow(None, Compose(layers))


@torch.no_grad()
def round_trip_error(flow: pf.Flow, x: Tensor) -> float:
    """Return the largest error of mapping points backward and forward again."""
    z, _ = flow.transform.inverse_and_log_det(x)
    y, _ = flow.transform.forward_and_log_det(z)
    return (y - x).abs().max().item()


@torch.no_grad()
def draw_pictures(flow: pf.Flow, x: Tensor, out: Path) -> None:
    """Draw the density, the forward map of a grid, and the backward map of the data."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.3))
    plot_density(flow.log_prob, LIMITS, device=x.device, ax=axes[0])
    axes[0].set_title("density")
    plot_warp(flow.transform, lines=19, device=x.device, ax=axes[1])
    axes[1].set(title="forward: the grid of [-3, 3]²", xlim=LIMITS[0], ylim=LIMITS[1])
    for part, marker in zip(upper_and_lower(x), "ox", strict=True):
        z = flow.transform.inv(part).cpu()
        axes[2].plot(*z.T, marker, color="black", markersize=3, fillstyle="none", linewidth=0)
    for radius in (1, 2, 3):
        axes[2].add_patch(plt.Circle((0, 0), radius, fill=False, linestyle="--"))
    axes[2].set(title="backward: the data", aspect="equal", xlim=LIMITS[0], ylim=LIMITS[1])
    save_figure(figure, out / "moons.png")


def upper_and_lower(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split points by the moon whose circle is nearer, the upper or the lower one."""
    centres = x.new_tensor([[-1.0, -0.2], [1.0, 0.8]])
    distances = (torch.cdist(x, centres) - 2).abs()
    is_upper = distances[:, 0] < distances[:, 1]
    return x[is_upper], x[~is_upper]


def main() -> None:
    """Fit the flow, print how good it is, write the files."""
    options = parse("moons", __doc__)
    torch.manual_seed(options.seed)
    flow = build_flow().to(options.device)
    data = MOONS.sample(100_000, seed=options.seed)
    fit = flow.fit(data, num_steps=600 if options.fast else 5000, seed=options.seed)

    test = MOONS.sample(100_000, seed=options.seed + 1).to(options.device)
    metrics = {
        **divergence(flow, MOONS, test),
        "round trip error": round_trip_error(flow, test),
        "seconds": fit.seconds,
    }
    for name, value in metrics.items():
        print(f"{name}: {value:.3g}")
    write_json(options.out / "metrics.json", metrics)
    to_arviz({"couplings": flow}, MOONS, options.seed).to_netcdf(options.out / "moons.nc")
    draw_pictures(flow, test[:1000], options.out)
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()))


if __name__ == "__main__":
    main()
