"""The training engine: precision, the step, the loop. It knows tensors; files, models and datasets are given to it."""
