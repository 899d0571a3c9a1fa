"""Several runs beside each other: grids of runs, how finished and unfinished ones compare, ablations of a recipe."""
