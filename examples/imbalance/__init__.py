"""What the study of long-tailed training trains, on which data."""
