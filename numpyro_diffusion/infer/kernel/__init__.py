"""What all kernels share: NumPyro's contract, the start, the accept step, adaptation."""
