"""Check the reference models against their own draws, formulas and evidence."""

import math
from collections.abc import Callable, Iterator, Mapping

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from tests.reference import exact, needs_reference, posteriordb
from tests.reference.posteriordb import ReferencePosterior

Values = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Run every test in double precision, from a fixed seed and an empty parameter store."""
    precision = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(precision)


class LogJoint:
    """Evaluate the log joint density of a model at many values of its latents at once."""

    def __init__(self, model: Callable[..., None], args: tuple) -> None:
        trace = poutine.trace(model).get_trace(*args)
        self.model, self.args = model, args
        latents = trace.iter_stochastic_nodes()
        self.sites = {name: site for name, site in latents if not site_is_subsample(site)}
        # No reference model has plates side by side: each plate is one level of nesting.
        self.nesting = sum(map(site_is_subsample, trace.nodes.values()))

    def alone(self, values: Values) -> Tensor:
        """Return the log joint of one particle, outside any particle plate."""
        model = poutine.condition(self.model, data=values)
        return poutine.trace(model).get_trace(*self.args).log_prob_sum()

    def together(self, values: Values) -> Tensor:
        """Return the log joints of particles stacked on the first dimension of each value."""
        particles = {name: self._align(name, value) for name, value in values.items()}
        count = len(next(iter(values.values())))
        model = poutine.condition(self.model, data=particles)
        with pyro.plate("particles", count, dim=-1 - self.nesting):
            trace = poutine.trace(model).get_trace(*self.args)
        trace.compute_log_prob()
        return sum(
            site["log_prob"].reshape(count, -1).sum(-1)
            for site in trace.nodes.values()
            if site["type"] == "sample" and not site_is_subsample(site)
        )

    def _align(self, name: str, value: Tensor) -> Tensor:
        site = self.sites[name]
        missing = self.nesting - len(site["fn"].batch_shape)
        return value.reshape(len(value), *(1,) * missing, *site["value"].shape)

    def unconstrain(self, values: Values) -> Tensor:
        """Map values of the latents to rows of unconstrained numbers."""
        parts = [
            biject_to(site["fn"].support).inv(values[name]).reshape(len(values[name]), -1)
            for name, site in self.sites.items()
        ]
        return torch.cat(parts, -1)

    def constrain(self, rows: Tensor) -> tuple[Values, Tensor]:
        """Map rows of unconstrained numbers to values, with their log Jacobians."""
        transforms = [biject_to(site["fn"].support) for site in self.sites.values()]
        shapes = [
            transform.inverse_shape(site["value"].shape)
            for transform, site in zip(transforms, self.sites.values())
        ]
        values, log_jacobian = {}, rows.new_zeros(len(rows))
        parts = rows.split([math.prod(shape) for shape in shapes], -1)
        for name, transform, shape, part in zip(self.sites, transforms, shapes, parts):
            latent = part.reshape(-1, *shape)
            values[name] = transform(latent)
            logs = transform.log_abs_det_jacobian(latent, values[name])
            log_jacobian = log_jacobian + logs.reshape(len(rows), -1).sum(-1)
        return values, log_jacobian


def latent_draws(posterior: ReferencePosterior, joint: LogJoint) -> Values:
    """Keep the draws of the latents, without those of deterministic sites."""
    return {name: posterior.draws[name] for name in joint.sites}


def importance_evidence(joint: LogJoint, reference: Tensor, count: int) -> tuple[float, float]:
    """Estimate the log evidence and its Monte Carlo error from a Student-t fitted to draws."""
    degrees = 5.0
    covariance = reference.T.cov() * (degrees - 2) / degrees
    factor = torch.linalg.cholesky(covariance * 1.2)
    proposal = dist.MultivariateStudentT(degrees, reference.mean(0), factor)
    rows = proposal.sample((count,))
    chunks = [joint.constrain(chunk) for chunk in rows.split(2000)]
    densities = [joint.together(values) + log_jacobian for values, log_jacobian in chunks]
    log_weights = torch.cat(densities) - proposal.log_prob(rows)
    log_evidence = log_weights.logsumexp(0) - math.log(count)
    relative = (log_weights - log_evidence).exp()
    return float(log_evidence), float(relative.std()) / math.sqrt(count)


@needs_reference
@pytest.mark.parametrize("name", posteriordb.names())
def test_log_joint_is_the_same_inside_a_particle_plate(name: str) -> None:
    posterior = posteriordb.load(name)
    joint = LogJoint(posterior.model, posterior.args)
    draws = {site: draws[::2500] for site, draws in latent_draws(posterior, joint).items()}
    alone = [joint.alone({site: draws[i] for site, draws in draws.items()}) for i in range(4)]
    torch.testing.assert_close(joint.together(draws), torch.stack(alone))


@needs_reference
@pytest.mark.parametrize("name", [name for name in posteriordb.names() if name != "eight_schools"])
def test_log_evidence_agrees_with_importance_sampling(name: str) -> None:
    posterior = posteriordb.load(name)
    joint = LogJoint(posterior.model, posterior.args)
    reference = joint.unconstrain(latent_draws(posterior, joint))
    log_evidence, error = importance_evidence(joint, reference, 20_000)
    assert error < 0.02
    assert log_evidence == pytest.approx(posterior.log_evidence, abs=0.05)


@needs_reference
def test_centred_schools_are_a_change_of_variables_from_the_noncentred() -> None:
    # The funnel of the centred posterior defeats importance sampling from a Student-t, which misses
    # 0.2 nats at 20 000 draws and 0.1 at 200 000. The two densities differ by a Jacobian alone, so
    # they share their evidence.
    centred, noncentred = map(posteriordb.load, ("eight_schools", "eight_schools_noncentred"))
    joints = [LogJoint(posterior.model, posterior.args) for posterior in (centred, noncentred)]
    first, second = (joint.together(latent_draws(noncentred, joint)) for joint in joints)
    log_jacobian = noncentred.draws["theta"].shape[-1] * noncentred.draws["tau"].log()
    torch.testing.assert_close(first + log_jacobian, second)
    assert centred.log_evidence == noncentred.log_evidence


@needs_reference
@pytest.mark.parametrize("name", posteriordb.names())
def test_guides_start_from_their_default_initial_values(name: str) -> None:
    posterior = posteriordb.load(name)
    guide = AutoMultivariateNormal(posterior.model)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    loss = elbo.differentiable_loss(posterior.model, guide, *posterior.args)
    loss.backward()
    assert loss.isfinite()
    assert guide.loc.grad.isfinite().all()


def log_normal_density(x: Tensor, mean: Tensor | float, scale: Tensor | float) -> Tensor:
    """Return the log density of a Gaussian."""
    scale = torch.as_tensor(scale)
    return -0.5 * ((x - mean) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


def funnel_formula(values: Values) -> Tensor:
    """Return the log density of Neal's funnel."""
    v, x = values["v"], values["x"]
    others = log_normal_density(x, 0.0, (v / 2).exp().unsqueeze(-1))
    return log_normal_density(v, 0.0, 3.0) + others.sum(-1)


def banana_formula(values: Values) -> Tensor:
    """Return the log density of the banana."""
    x1, x2 = values["x1"], values["x2"]
    return log_normal_density(x1, 0.0, 10.0) + log_normal_density(x2, 0.03 * x1**2 - 3, 1.0)


def gaussian_covariance() -> Tensor:
    """Return the covariance of the ill-conditioned Gaussian."""
    rotation, scales = exact.ill_conditioned_gaussian().args
    return rotation @ scales.square().diag() @ rotation.T


def gaussian_formula(values: Values) -> Tensor:
    """Return the log density of the ill-conditioned Gaussian, without its normaliser."""
    z = values["z"]
    return -0.5 * torch.einsum("si,ij,sj->s", z, gaussian_covariance().inverse(), z)


def many_well_formula(values: Values) -> Tensor:
    """Return the log density of the many wells, without its normaliser."""
    x, y = values["x"], values["y"]
    return (0.5 * x + 6 * x**2 - x**4).sum(-1) - 0.5 * y.square().sum(-1)


def brownian_formula(values: Values) -> Tensor:
    """Return the log joint density of the Brownian motion and its observations."""
    y, observed = exact.brownian_motion().args
    innovation, observation = values["innovation"], values["observation"]
    scales = sum(
        log_normal_density(scale.log(), 0.0, 2.0) - scale.log()
        for scale in (innovation, observation)
    )
    steps = values["x"].diff(dim=-1, prepend=values["x"].new_zeros(len(innovation), 1))
    walk = log_normal_density(steps, 0.0, innovation.unsqueeze(-1)).sum(-1)
    errors = values["x"][:, observed] - y[observed]
    return scales + walk + log_normal_density(errors, 0.0, observation.unsqueeze(-1)).sum(-1)


@pytest.mark.parametrize(
    ("build", "formula"),
    [
        (exact.funnel, funnel_formula),
        (exact.banana, banana_formula),
        (exact.ill_conditioned_gaussian, gaussian_formula),
        (exact.many_well, many_well_formula),
        pytest.param(exact.brownian_motion, brownian_formula, marks=needs_reference),
    ],
)
def test_exact_targets_equal_their_formulas(
    build: Callable[[], exact.ExactTarget], formula: Callable[[Values], Tensor]
) -> None:
    target = build()
    joint = LogJoint(target.model, target.args)
    values = {
        name: biject_to(site["fn"].support)(torch.randn(5, *site["value"].shape))
        for name, site in joint.sites.items()
    }
    expected = formula(values)
    torch.testing.assert_close(joint.together(values), expected)
    first = {name: value[0] for name, value in values.items()}
    torch.testing.assert_close(joint.alone(first), expected[0])


@pytest.mark.parametrize("build", [exact.funnel, exact.banana])
def test_moments_of_normalised_targets_agree_with_their_samples(
    build: Callable[[], exact.ExactTarget],
) -> None:
    target = build()
    with pyro.plate("particles", 100_000):
        trace = poutine.trace(target.model).get_trace(*target.args)
    draws = {name: site["value"] for name, site in trace.iter_stochastic_nodes()}
    for moment in target.moments.values():
        statistic = moment.statistic(draws)
        assert float(statistic.mean()) == pytest.approx(moment.mean, abs=0.1)
        assert float(statistic.std()) == pytest.approx(moment.standard_deviation, rel=0.02)


def test_gaussian_evidence_and_deviations_follow_from_its_covariance() -> None:
    target = exact.ill_conditioned_gaussian()
    covariance = gaussian_covariance()
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(1e6, rel=1e-6)
    log_evidence = 0.5 * torch.logdet(2 * math.pi * covariance)
    assert target.log_evidence == pytest.approx(float(log_evidence), abs=1e-6)
    torch.testing.assert_close(target.moments["z"].standard_deviation, covariance.diagonal().sqrt())


def test_many_well_evidence_and_mass_agree_with_quadrature() -> None:
    target = exact.many_well()
    grid = torch.linspace(-6, 6, 24_001)
    density = (0.5 * grid + 6 * grid**2 - grid**4).exp()
    one_well = torch.trapezoid(density, grid)
    right = torch.trapezoid(density[12_000:], grid[12_000:]) / one_well
    log_evidence = 16 * (one_well.log() + 0.5 * math.log(2 * math.pi))
    assert target.log_evidence == pytest.approx(float(log_evidence), abs=1e-4)
    assert target.moments["right"].mean == pytest.approx(float(right), abs=1e-5)


@needs_reference
def test_brownian_evidence_and_moments_agree_with_quadrature() -> None:
    target = exact.brownian_motion()
    y, observed = target.args
    grid = torch.linspace(-14, 3, 171)
    log_innovation, log_observation = torch.meshgrid(grid, grid, indexing="ij")
    times = torch.arange(1.0, len(y) + 1)[observed]
    walk = torch.minimum(times, times.unsqueeze(-1))
    innovations, observations = (
        (2 * log_scale).exp()[..., None, None] for log_scale in (log_innovation, log_observation)
    )
    covariance = innovations * walk + observations * torch.eye(len(times))
    likelihood = dist.MultivariateNormal(torch.zeros(len(times)), covariance)
    log_density = (
        likelihood.log_prob(y[observed])
        + log_normal_density(log_innovation, 0.0, 2.0)
        + log_normal_density(log_observation, 0.0, 2.0)
    )
    log_evidence = log_density.logsumexp((0, 1)) + 2 * (grid[1] - grid[0]).log()
    assert target.log_evidence == pytest.approx(float(log_evidence), abs=1e-3)

    weights = log_density.flatten().softmax(0)
    draws = {"innovation": log_innovation.exp(), "observation": log_observation.exp()}
    for moment in target.moments.values():
        statistic = moment.statistic(draws).flatten()
        mean = weights @ statistic
        deviation = (weights @ (statistic - mean).square()).sqrt()
        assert float(mean) == pytest.approx(moment.mean, abs=1e-3)
        assert float(deviation) == pytest.approx(moment.standard_deviation, abs=1e-3)
