"""Launching runs: a launcher makes a plan, which can be read first, and then carries it out."""
