"""Simulation-based inference: posteriors of models that can be simulated."""

from .flow_matching import FlowMatching
from .neural_likelihood import LikelihoodModel, NeuralLikelihood
from .neural_posterior import NeuralPosterior
from .posterior import Posterior
from .simulate import SimulationError, simulate
from .simulations import Simulations
from .space import ParameterSpace

__all__ = [
    "FlowMatching",
    "LikelihoodModel",
    "NeuralLikelihood",
    "NeuralPosterior",
    "ParameterSpace",
    "Posterior",
    "SimulationError",
    "Simulations",
    "simulate",
]
