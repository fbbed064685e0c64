"""How classifier heads collapse: trainings over heads and seeds, their metrics, figures and a report."""
