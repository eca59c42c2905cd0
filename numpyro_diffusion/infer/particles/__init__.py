"""Samplers that carry a population from the prior to the posterior."""
