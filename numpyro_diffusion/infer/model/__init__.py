"""What a kernel needs to know of a NumPyro model: its sites, their densities, what is observed."""
