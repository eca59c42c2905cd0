"""Kernels whose every draw walks down the noise levels."""
