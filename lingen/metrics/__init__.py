"""Judges of clips, and distances between clips and their reconstructions."""
