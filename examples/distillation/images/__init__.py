"""Images, labels and rates learned through unrolled training: the outer loop, its judges and baselines."""
