"""Kernels for explicit memory. Imports nothing of ``jaxlab``: usable from any JAX program."""
