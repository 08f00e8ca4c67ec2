"""Pictures of results. Every function draws on the axes it is given and returns them."""

from .calibration import plot_coverage, plot_ecdf_pit, plot_ranks
from .layers import plot_layers
from .losses import plot_elbo, plot_losses
from .pairs import plot_corner, plot_pair
from .plane import plot_density, plot_warp
from .style import LINE_STYLES
from .trajectories import plot_trajectories
from .weights import plot_weight_tail

__all__ = [
    "LINE_STYLES",
    "plot_corner",
    "plot_coverage",
    "plot_density",
    "plot_ecdf_pit",
    "plot_elbo",
    "plot_layers",
    "plot_losses",
    "plot_pair",
    "plot_ranks",
    "plot_trajectories",
    "plot_warp",
    "plot_weight_tail",
]
