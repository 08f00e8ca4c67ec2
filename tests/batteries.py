"""The cases of the property tests: every registered flow and every transform, small and quick."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.nn import GrowingTanh
from pyroflows.transforms import (
    PLU,
    QR,
    ActNorm,
    Affine,
    Autoregressive,
    Chain,
    CircularSpline,
    Compose,
    Coupling,
    DeepSigmoidal,
    DiagonalAffine,
    Elementwise,
    FactorOut,
    Flattened,
    FlowTransform,
    ImageCoupling,
    InvertibleConvolution,
    Logit,
    Orthogonal,
    Permutation,
    Scale,
    Shift,
    Spline,
    Squeezed,
    SumOfSquares,
    TriangularAffine,
)

SMALL = {"num_layers": 2, "hidden_dims": (8, 8), "bins": 4, "width": 8}
SIZES = ((5, 0), (4, 3), (2, 0), (1, 0), (1, 2))  # input_dim, context_dim
IMAGES = (((1, 4, 4), 0), ((2, 4, 4), 3))  # event_shape, context_dim
BIJECTIONS = (
    Shift(),
    Scale(),
    Affine(),
    Spline(bins=4),
    Chain(Spline(bins=4), Affine()),
    CircularSpline(bins=4),
    DeepSigmoidal(hidden_units=4),
    SumOfSquares(degree=2, num_squares=2),
)
ITERATIVE = (DeepSigmoidal, SumOfSquares)
BATCH_SHAPES = ((), (7,), (0,), (2, 3), (4, 1, 3))


@dataclass(frozen=True)
class Case:
    """Name a flow and say how to build it."""

    name: str
    build: Callable[[], FlowTransform]
    input_dim: int | tuple[int, ...]
    context_dim: int = 0
    near_identity: bool = True
    exact_log_det: bool = True
    iterative: bool = False
    traceable: bool = True
    angles: bool = False
    strength: float = 1.0  # of perturbations: weights of convolutions add up over many inputs

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.input_dim,) if isinstance(self.input_dim, int) else self.input_dim

    @property
    def size(self) -> int:
        return math.prod(self.event_shape)

    @property
    def round_trip(self) -> dict[torch.dtype, float]:
        return {torch.float32: 1e-4, torch.float64: 1e-8 if self.iterative else 1e-10}

    @property
    def log_det(self) -> dict[torch.dtype, float]:
        if self.iterative:
            return {torch.float32: 1e-3, torch.float64: 1e-6}
        return {torch.float32: 1e-4, torch.float64: 1e-9}

    def within(self, tolerance: float) -> float:
        """Widen the tolerance of a comparison where answers are themselves solved for."""
        return max(tolerance, 1e-7) if self.iterative else tolerance

    def jacobian(self, y: Tensor, x: Tensor) -> Tensor:
        return jacobian(y, x, len(self.event_shape))

    def flow(self, dtype: torch.dtype = torch.float64, noise: float = 0.1) -> FlowTransform:
        """Build the flow, with ``noise`` times standard normal draws added to its parameters."""
        torch.manual_seed(0)
        return perturb(self.build().to(dtype), self.strength * noise)

    def bound(self, dtype: torch.dtype = torch.float64, noise: float = 0.1) -> FlowTransform:
        """Build the flow and bind one context to it if it takes any."""
        flow = self.flow(dtype, noise)
        return flow.condition(self.context(dtype=dtype)) if self.context_dim else flow

    def inputs(
        self, *batch: int, dtype: torch.dtype = torch.float64, scale: float = 3.0, seed: int = 1
    ) -> Tensor:
        x = scale * normal(*batch, *self.event_shape, seed=seed)
        return (wrapped(x) if self.angles else x).to(dtype)

    def context(self, *batch: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
        return normal(*batch, self.context_dim, seed=seed).to(dtype)


def normal(*shape: int, seed: int) -> Tensor:
    """Draw standard normal numbers that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def wrapped(angles: Tensor) -> Tensor:
    """Turn numbers into angles between -pi and pi."""
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi


def perturb(flow: FlowTransform, noise: float) -> FlowTransform:
    with torch.no_grad():
        for seed, parameter in enumerate(flow.parameters()):
            parameter.add_(noise * normal(*parameter.shape, seed=seed))
    return flow


def jacobian(y: Tensor, x: Tensor, event_dim: int = 1) -> Tensor:
    """Return ``dy/dx`` of each event of a batch, by backpropagation: ``(*batch, D, D)``."""
    rows = [
        torch.autograd.grad(entry.sum(), x, retain_graph=True)[0].flatten(-event_dim)
        for entry in y.flatten(-event_dim).unbind(-1)
    ]
    return torch.stack(rows, -2)


def registered(
    name: str, input_dim: int | tuple[int, ...], context_dim: int = 0, **options: Any
) -> FlowTransform:
    """Build a registered flow with those of the options that it knows."""
    known = inspect.signature(pf.flows.spec(name).factory).parameters
    options = {option: value for option, value in options.items() if option in known}
    return pf.flow(name, input_dim, context_dim, **options)


def label(size: int | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _registered_cases() -> Iterator[Case]:
    for name in (*pf.flows.names(), *pf.flows.names("image")):
        spec = pf.flows.spec(name)
        for input_dim, context_dim in SIZES if spec.event == "vector" else IMAGES:
            yield Case(
                f"{name}-{label(input_dim)}-{context_dim}",
                lambda name=name, D=input_dim, C=context_dim: registered(name, D, C, **SMALL),
                input_dim,
                context_dim,
                exact_log_det=spec.exact_log_det,
                iterative=not spec.closed_form_inverse,
                traceable=spec.traceable,
                angles=spec.support == "circle",
                strength=1.0 if spec.event == "vector" else 0.3,
            )


def _product_cases() -> Iterator[Case]:
    for layer in (Coupling, Autoregressive, Elementwise):
        for bijection in BIJECTIONS:
            for input_dim, context_dim in SIZES:
                if input_dim == 2 or (layer is not Elementwise and input_dim + context_dim == 1):
                    continue  # of the second, an entry that has nothing to depend on
                if layer is Autoregressive and isinstance(bijection, CircularSpline):
                    continue  # its network reads numbers, not angles
                yield Case(
                    f"{layer.__name__}-{type(bijection).__name__}-{input_dim}-{context_dim}",
                    lambda layer=layer, g=bijection, D=input_dim, C=context_dim: layer(
                        g, D, C, hidden_dims=(8, 8)
                    ),
                    input_dim,
                    context_dim,
                    iterative=isinstance(bijection, ITERATIVE),
                    angles=isinstance(bijection, CircularSpline),
                )


def triangular(input_dim: int) -> TriangularAffine:
    scale_tril = 0.3 * normal(input_dim, input_dim, seed=3).tril(-1) + torch.eye(input_dim)
    return TriangularAffine(normal(input_dim, seed=4).float(), scale_tril.float())


def diagonal(input_dim: int) -> DiagonalAffine:
    return DiagonalAffine(torch.linspace(-1, 1, input_dim), torch.linspace(0.5, 2, input_dim))


def rotation(input_dim: int, method: str) -> Compose:
    """Follow a rotation by a rescaling: alone it has a log-determinant that nothing changes."""
    return Compose([Orthogonal(input_dim, method), ActNorm(input_dim, initialized=True)])


def coupling(input_dim: int, context_dim: int = 0, **options: Any) -> Coupling:
    return Coupling(Affine(), input_dim, context_dim, hidden_dims=(8,), **options)


def autoregressive(input_dim: int, context_dim: int = 0) -> Autoregressive:
    return Autoregressive(Affine(), input_dim, context_dim, hidden_dims=(8,))


def growing(input_dim: int, context_dim: int) -> FlowTransform:
    """Build the flow of ``AutoSpline``, whose networks grow in the tails."""
    return pf.flow(
        "spline_coupling",
        input_dim,
        context_dim,
        num_layers=2,
        hidden_dims=(8, 8),
        activation=GrowingTanh,
    )


def stack() -> Compose:
    """Nest stacks, inverses, a permutation, and parts with and without a context."""
    inner = Compose([coupling(4, 3), Permutation([2, 0, 3, 1])])
    return Compose([inner, autoregressive(4).inv, triangular(4), inner.inv, autoregressive(4, 3)])


def unit_interval(shape: tuple[int, ...]) -> Compose:
    """Map into the unit interval and back; numbers are made small first, as its ends are flat."""
    shrink = ActNorm(shape, initialized=True)
    torch.nn.init.constant_(shrink.log_scale, -4.0)
    return Compose([shrink, Logit(shape, 0.05).inv, Logit(shape, 0.06), copy.deepcopy(shrink).inv])


def _image_cases() -> Iterator[Case]:
    shape = (3, 2, 4)
    for mask in ("channel", "checkerboard"):
        for bijection in BIJECTIONS:
            for swap, context_dim in ((False, 0), (True, 2)):
                yield Case(
                    f"ImageCoupling-{mask}-{type(bijection).__name__}-{label(shape)}-{context_dim}",
                    lambda mask=mask, g=bijection, swap=swap, C=context_dim: ImageCoupling(
                        g, shape, C, mask, swap, width=8, kernel_size=3
                    ),
                    shape,
                    context_dim,
                    iterative=isinstance(bijection, ITERATIVE),
                    angles=isinstance(bijection, CircularSpline),
                )
    for name, linear in (
        ("PLU", lambda: PLU(3)),
        ("PLU-rotated", lambda: PLU(3, weight=torch.linalg.qr(normal(3, 3, seed=5).float()).Q)),
        ("QR", lambda: QR(3)),
        ("Permutation", lambda: Permutation([2, 0, 1])),
    ):
        yield Case(
            f"InvertibleConvolution-{name}",
            lambda linear=linear: InvertibleConvolution(linear(), (2, 4)),
            shape,
            near_identity=name in ("PLU", "QR"),
        )
    yield Case(
        "InvertibleConvolution-PLU-context",
        lambda: InvertibleConvolution(PLU(3, 2, hidden_dims=(8,)), (2, 4)),
        shape,
        2,
    )
    yield Case("Squeezed-1x6x3", lambda: Squeezed(ActNorm((9, 2, 1), True), 3), (1, 6, 3))
    yield Case("ActNorm-3x2x4", lambda: ActNorm(shape, initialized=True), shape)
    yield Case("FactorOut-3x2x4", lambda: FactorOut(ActNorm((2, 2, 4), True), 3), shape)
    yield Case("Flattened-3x2x4-2", lambda: Flattened(coupling(24, 2), shape), shape, 2)
    yield Case("Logit-3x2x4", lambda: unit_interval(shape), shape, 0, False)
    yield Case("Logit-5", lambda: unit_interval((5,)), 5, 0, False)


def _other_cases() -> Iterator[Case]:
    for D in (1, 2, 5):
        yield Case(f"Permutation-{D}", lambda D=D: Permutation([*range(1, D), 0]), D, 0, False)
        yield Case(f"TriangularAffine-{D}", lambda D=D: triangular(D), D, 0, False)
        yield Case(f"DiagonalAffine-{D}", lambda D=D: diagonal(D), D, 0, False)
        yield Case(f"ActNorm-{D}", lambda D=D: ActNorm(D, initialized=True), D)
        for method in ("householder", "exponential", "cayley"):
            yield Case(f"Orthogonal-{method}-{D}", lambda D=D, m=method: rotation(D, m), D)
    for D, C in SIZES:
        yield Case(f"QR-{D}-{C}", lambda D=D, C=C: QR(D, C, hidden_dims=(8, 8)), D, C)
    yield Case("Inverse-Coupling-4-3", lambda: coupling(4, 3).inv, 4, 3)
    yield Case("Inverse-Autoregressive-5-0", lambda: autoregressive(5).inv, 5)
    yield Case("Inverse-TriangularAffine-5", lambda: triangular(5).inv, 5, 0, False)
    for D, C in SIZES:
        yield Case(f"spline_coupling-growing-{D}-{C}", lambda D=D, C=C: growing(D, C), D, C)
    yield Case("Coupling-swapped-5-0", lambda: coupling(5, split_dim=1, swap=True), 5)
    yield Case("Compose-nested-4-3", stack, 4, 3, False)
    yield Case("Compose-nested-inverse-4-3", lambda: stack().inv, 4, 3, False)
    yield Case("Compose-tied-4-0", lambda: Compose([coupling(4)] * 2), 4)
    yield Case("Conditioned-4", lambda: stack().condition(torch.ones(3)), 4, 0, False)
    yield Case("Conditioned-inverse-4", lambda: stack().condition(torch.ones(3)).inv, 4, 0, False)


REGISTERED = tuple(_registered_cases())
PRODUCTS = tuple(_product_cases())
IMAGE_LAYERS = tuple(_image_cases())
OTHERS = tuple(_other_cases())
CASES = (*REGISTERED, *PRODUCTS, *IMAGE_LAYERS, *OTHERS)
# One case for each way a flow can work, for properties that do not depend on sizes.
KINDS = (
    *(case for case in REGISTERED if case.context_dim == 3),
    *(case for case in PRODUCTS if case.name == "Elementwise-Spline-5-0"),
    *(case for case in IMAGE_LAYERS if not case.name.startswith("ImageCoupling")),
    *(case for case in OTHERS if case.size > 2),
)


def over(cases: Iterable[Case]) -> dict[str, Any]:
    """Return the arguments that parametrise a fixture over cases."""
    cases = list(cases)
    return {"params": cases, "ids": [case.name for case in cases]}
