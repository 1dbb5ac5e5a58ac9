"""From a study to trials, from trials to processes; what is known before, and what lies beside the results."""
