"""Starting a whole run: on one host (`split`, `supervisor`), or by files for a cluster (`slurm`, `kubernetes`)."""
