"""Compile the programs of a run for a pod that need not be there, and read what they will take."""
