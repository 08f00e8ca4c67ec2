"""Local classifier two-sample test: whether an amortized posterior is right at one observation."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroflows.diagnostics.checks import check_finite, check_matrix, check_tensor, check_varying

_MINIMUM_SIMULATIONS = 50
_WIDTH = 32
_NUM_STEPS = 500
_STEPS_PER_CHECK = 20
_BATCH_SIZE = 256
_LEARNING_RATE = 2e-3
_VALIDATION_SHARE = 0.2


class LocalC2ST(NamedTuple):
    """Hold the answers of local two-sample tests at M observations.

    Attributes
    ----------
    statistic : Tensor, shape (M,)
        Mean squared deviation of the class probability from 1/2, 0 at best and 1/4 at worst.
    null : Tensor, shape (P, M)
        The same for classifiers of exchanged labels: what chance gives.
    p_value : Tensor, shape (M,)
        Probability of such a statistic for an exact posterior, at least ``1 / (P + 1)``.

    Examples
    --------
    >>> import torch
    >>> null = torch.linspace(0.0, 0.1, 99).unsqueeze(-1)
    >>> test = LocalC2ST(torch.tensor([0.2]), null, torch.tensor([0.01]))
    >>> bool((test.statistic > test.null).all())  # larger than chance ever gave
    True
    """

    statistic: Tensor
    null: Tensor
    p_value: Tensor


def local_c2st(
    parameters: Tensor,
    x: Tensor,
    draws: Tensor,
    observed_x: Tensor,
    observed_draws: Tensor,
    num_null: int = 100,
    seed: int = 0,
) -> LocalC2ST:
    r"""Test an amortized posterior at single observations, by a classifier trained on all of them.

    A network learns the probability :math:`d(\theta, x)` that a pair comes from the posterior,
    :math:`q(\theta \mid x) p(x)`, rather than from the simulator, :math:`p(\theta, x)`. Where the
    posterior is right it answers 1/2; the statistic at an observation is

    .. math:: \operatorname{E}_{q(\theta \mid x_o)} \bigl(d(\theta, x_o) - \tfrac12\bigr)^2 .

    No draws from the true posterior at :math:`x_o` are needed [1]. Its distribution under an
    exact posterior is found by exchanging true and drawn parameters within random pairs, which
    changes nothing if the posterior is exact, and training again: the p-value is exact for any
    number of simulations.

    Parameters
    ----------
    parameters : Tensor, shape (N, D)
        True parameters of simulations, at least 50, unused in training the posterior.
    x : Tensor, shape (N, K)
        Their data, or features of them.
    draws : Tensor, shape (N, D)
        One posterior draw for each row of ``x``.
    observed_x : Tensor, shape (M, K)
        Observations at which to test.
    observed_draws : Tensor, shape (L, M, D)
        Posterior draws for each of them; a thousand will do.
    num_null : int, default 100
        Number of exchanges P, at least 1.
    seed : int, default 0
        Seed of exchanges, networks and minibatches. The global random state is neither used nor
        changed.

    Returns
    -------
    LocalC2ST
        Statistics, their distribution under the null hypothesis, and p-values.

    Raises
    ------
    TypeError
        If an argument is not a tensor of floating-point numbers.
    ValueError
        If shapes disagree, entries are not finite, there are fewer than 50 simulations, a column
        of ``parameters`` or ``x`` is constant, or ``num_null`` is below 1.

    Notes
    -----
    All ``P + 1`` networks (two hidden layers of 32) are trained at once, on the same minibatches
    and from the same start, and each keeps its weights of least validation loss. Takes about ten
    seconds with the defaults on one CPU thread, almost whatever N. Networks being smooth, errors
    of the posterior near an observation weigh on its test.

    References
    ----------
    [1] Linhart, Gramfort, Rodrigues, "L-C2ST: Local diagnostics for posterior approximations in
        simulation-based inference", NeurIPS 2023,
        `arXiv:2306.03580 <https://arxiv.org/abs/2306.03580>`_.

    Examples
    --------
    A posterior that is right where the data are positive and three times too wide elsewhere:

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> mean = torch.randn(500, 1, generator=generator)
    >>> noise = torch.randn(2, 500, 1, generator=generator)
    >>> parameters, draws = mean + noise[0], mean + noise[1] * torch.where(mean > 0, 1, 3)
    >>> observed_x = torch.tensor([[-1.0], [1.0]])
    >>> scale = torch.tensor([[3.0], [1.0]])
    >>> observed_draws = observed_x + scale * torch.randn(200, 2, 1, generator=generator)
    >>> test = local_c2st(parameters, mean, draws, observed_x, observed_draws, num_null=9)
    >>> round(test.p_value[0].item(), 2)
    0.1
    """
    check_matrix("parameters", parameters, "N", "D")
    check_matrix("x", x, len(parameters), "K")
    check_matrix("draws", draws, *parameters.shape)
    check_matrix("observed_x", observed_x, "M", x.shape[1])
    check_tensor("observed_draws", observed_draws, "L", len(observed_x), parameters.shape[1])
    check_finite("observed_draws", observed_draws)
    if len(parameters) < _MINIMUM_SIMULATIONS:
        raise ValueError(
            f"parameters must hold at least {_MINIMUM_SIMULATIONS} simulations, "
            f"got {len(parameters)}"
        )
    if num_null < 1:
        raise ValueError(f"num_null must be at least 1, got {num_null}")
    check_varying("parameters", parameters)
    check_varying("x", x)
    pairs = torch.stack([torch.cat([parameters, x], -1), torch.cat([draws, x], -1)], 1)
    # Scales that treat both members of a pair alike leave them exchangeable.
    mean, scale = pairs.mean((0, 1)), pairs.std((0, 1))
    tested = torch.cat([observed_draws, observed_x.expand(len(observed_draws), -1, -1)], -1)
    generator = torch.Generator().manual_seed(seed)
    networks = _trained(((pairs - mean) / scale).float().detach(), num_null, generator)
    statistic, *null = _statistics(networks, ((tested - mean) / scale).float().detach())
    exceeding = (torch.stack(null) >= statistic).sum(0)
    return LocalC2ST(statistic, torch.stack(null), (exceeding + 1) / (num_null + 1))


class _Networks(nn.Module):
    """Networks side by side, started alike; they answer log odds."""

    def __init__(self, num_networks: int, num_features: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (num_features, _WIDTH, _WIDTH)
        # The last layer starts at zero: before training, all networks answer 1/2.
        weights = [
            (2 / size) ** 0.5 * torch.randn(size, _WIDTH, generator=generator)
            for size in sizes[:-1]
        ] + [torch.zeros(_WIDTH, 1)]
        self.weights = nn.ParameterList(weight.repeat(num_networks, 1, 1) for weight in weights)
        self.biases = nn.ParameterList(torch.zeros_like(weight[:, :1]) for weight in self.weights)

    def forward(self, features: Tensor) -> Tensor:
        """Map rows ``(B, F)`` to log odds ``(P, B)``."""
        hidden = features.expand(len(self.biases[0]), -1, -1)
        *layers, (weight, bias) = zip(self.weights, self.biases)
        for layer_weight, layer_bias in layers:
            hidden = torch.baddbmm(layer_bias, hidden, layer_weight).relu()
        return torch.baddbmm(bias, hidden, weight).squeeze(-1)


def _trained(pairs: Tensor, num_null: int, generator: torch.Generator) -> _Networks:
    """Train one network on pairs ``(N, 2, F)`` as they are and others on exchanged pairs."""
    networks = _Networks(num_null + 1, pairs.shape[-1], generator).to(pairs.device)
    exchanged = torch.rand(num_null + 1, len(pairs), generator=generator) < 0.5
    exchanged[0] = False
    labels = torch.stack([exchanged, ~exchanged], -1).to(pairs)
    num_validation = int(_VALIDATION_SHARE * len(pairs))
    order = torch.randperm(len(pairs), generator=generator)
    validation, training = order[:num_validation], order[num_validation:]
    optimiser = torch.optim.Adam(networks.parameters(), lr=_LEARNING_RATE)
    best, least = copy.deepcopy(networks), pairs.new_full((num_null + 1,), math.log(2))
    for step in range(1, _NUM_STEPS + 1):
        rows = torch.randint(len(training), (_BATCH_SIZE // 2,), generator=generator)
        optimiser.zero_grad()
        _losses(networks, pairs, labels, training[rows]).sum().backward()
        optimiser.step()
        if step % _STEPS_PER_CHECK == 0:
            with torch.no_grad():
                losses = _losses(networks, pairs, labels, validation)
                improved = (losses < least).view(-1, 1, 1)
                for kept, current in zip(best.parameters(), networks.parameters()):
                    kept.copy_(torch.where(improved, current, kept))
                least = losses.minimum(least)
    return best


def _losses(networks: _Networks, pairs: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of each network on some pairs."""
    log_odds = networks(pairs[rows].flatten(0, 1))
    targets = labels[:, rows].flatten(1)
    return F.binary_cross_entropy_with_logits(log_odds, targets, reduction="none").mean(-1)


@torch.no_grad()
def _statistics(networks: _Networks, tested: Tensor) -> Tensor:
    """Return the statistic of each network at each observation of ``(L, M, F)``: ``(P, M)``."""
    columns = [(networks(at).sigmoid() - 0.5).square().mean(-1) for at in tested.unbind(1)]
    return torch.stack(columns, -1)
