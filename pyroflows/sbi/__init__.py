"""Simulation-based inference: posteriors of models that can be simulated."""

from ..nn.convolutional_embedding import ImageEmbedding, SeriesEmbedding
from ..nn.embedding import SetEmbedding
from .checks.calibration import Calibration, calibration
from .checks.predictive import PredictiveCheck, predictive_check
from .estimators.flow_matching import FlowMatching
from .estimators.joint import JointFlowMatching
from .estimators.neural_likelihood import NeuralLikelihood
from .estimators.neural_posterior import NeuralPosterior
from .estimators.sequential import refine
from .model.simulations import Simulations
from .model.simulator_runs import SimulationError
from .model.space import ParameterSpace
from .posteriors.corrected import CorrectedPosterior
from .posteriors.joint_posterior import JointPosterior
from .posteriors.likelihood_model import LikelihoodModel, LikelihoodPosterior
from .posteriors.posterior import Posterior
from .posteriors.velocity_posterior import VelocityPosterior
from .simulation.black_box import BlackBox
from .simulation.simulate import simulate, simulate_at

__all__ = [
    "BlackBox",
    "Calibration",
    "CorrectedPosterior",
    "FlowMatching",
    "ImageEmbedding",
    "JointFlowMatching",
    "JointPosterior",
    "LikelihoodModel",
    "LikelihoodPosterior",
    "NeuralLikelihood",
    "NeuralPosterior",
    "ParameterSpace",
    "Posterior",
    "PredictiveCheck",
    "SeriesEmbedding",
    "SetEmbedding",
    "SimulationError",
    "Simulations",
    "VelocityPosterior",
    "calibration",
    "predictive_check",
    "refine",
    "simulate",
    "simulate_at",
]
