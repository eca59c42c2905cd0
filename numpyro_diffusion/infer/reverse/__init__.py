"""Kernels that move by the prior's own reverse process."""
