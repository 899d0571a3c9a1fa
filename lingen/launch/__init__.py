"""Runs on a cluster: the script that SLURM is given, and what a run folder tells of how far a run is."""
