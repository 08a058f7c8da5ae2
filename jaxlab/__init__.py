"""jaxlab: a JAX laboratory for explicit memory (Memory³) and implicit regularisation (IRE)."""

__version__ = "0.1.0"
