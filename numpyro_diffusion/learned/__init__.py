"""A posterior as a prior: the joint law of draws of several sites, learned, for the next model."""

from numpyro_diffusion.learned.faithfulness import Faithfulness, Worst
from numpyro_diffusion.learned.from_draws import prior_from_idata, prior_from_samples
from numpyro_diffusion.learned.prior import LearnedPrior

__all__ = ["Faithfulness", "LearnedPrior", "Worst", "prior_from_idata", "prior_from_samples"]
