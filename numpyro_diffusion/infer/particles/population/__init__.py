"""A population of Hamiltonian chains: how walkers move, the climb from the prior, rounds, and the sampler."""

from numpyro_diffusion.infer.particles.population.sampler import PopulationHMC

__all__ = ["PopulationHMC"]
