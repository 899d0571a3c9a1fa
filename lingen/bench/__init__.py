"""Measurements: every number that README states comes from here."""
