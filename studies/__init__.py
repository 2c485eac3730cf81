"""Many runs and their evaluations from one description: grids, seeds, tables."""
