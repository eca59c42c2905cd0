"""Whether posteriors are right: calibration by simulation, and the bias of a run that is not exact."""

from numpyro_diffusion.infer.trust.bias import BiasReport, bias_report
from numpyro_diffusion.infer.trust.simulate import SBC

__all__ = ["SBC", "BiasReport", "bias_report"]
