"""Many runs: seeds, grids, their tables, curves and statistics."""
