"""What the study of label noise trains, on which data, and what theory says about it."""
