"""What every study shares: data, models, settings, training, evaluation, figures, reports."""
