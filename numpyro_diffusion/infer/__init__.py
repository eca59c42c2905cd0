"""Kernels for `numpyro.infer.MCMC`, and particle samplers: diffusion priors inside ordinary models."""

from numpyro_diffusion.infer.anneal import AnnealedLangevin, GuidedReverse, at_clean_point
from numpyro_diffusion.infer.combine import Cycle, DiffusionGibbs, Mixture, ParallelTempering, Vectorize
from numpyro_diffusion.infer.gradient import MALA, ULA, DiffusiveGibbs, JointScores, ScoreHMC, Tweedie, joint_scores
from numpyro_diffusion.infer.kernel import DiffusionKernel
from numpyro_diffusion.infer.model import (
    Density,
    LineIntegral,
    LogPrior,
    Score,
    Status,
    drop_prior,
    with_density,
    with_flow,
)
from numpyro_diffusion.infer.noise import CrankNicolson, DelayedAcceptance, EllipticalSlice, NoiseSpace
from numpyro_diffusion.infer.particles import (
    DenoisingDiffusionSampler,
    DesignedDiffusion,
    LearnedMCMC,
    PopulationHMC,
    TemperedSMC,
    TwistedSMC,
)
from numpyro_diffusion.infer.reverse import DiffusionPCN, GuidedPCN, Independence, ParticleGibbs, SplitGibbs
from numpyro_diffusion.infer.trust import SBC, BiasReport, bias_report

__all__ = [
    "MALA",
    "SBC",
    "ULA",
    "AnnealedLangevin",
    "BiasReport",
    "CrankNicolson",
    "Cycle",
    "DelayedAcceptance",
    "DenoisingDiffusionSampler",
    "Density",
    "DesignedDiffusion",
    "DiffusionGibbs",
    "DiffusionKernel",
    "DiffusionPCN",
    "DiffusiveGibbs",
    "EllipticalSlice",
    "GuidedPCN",
    "Independence",
    "JointScores",
    "LearnedMCMC",
    "LineIntegral",
    "LogPrior",
    "Mixture",
    "NoiseSpace",
    "ParallelTempering",
    "ParticleGibbs",
    "PopulationHMC",
    "GuidedReverse",
    "Score",
    "ScoreHMC",
    "SplitGibbs",
    "Status",
    "TemperedSMC",
    "Tweedie",
    "TwistedSMC",
    "Vectorize",
    "at_clean_point",
    "bias_report",
    "drop_prior",
    "joint_scores",
    "with_density",
    "with_flow",
]
