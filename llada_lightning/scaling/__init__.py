"""Floor 0: shapes, FLOPs, plans, sweeps, results, fits and plots. Nothing here imports torch."""
