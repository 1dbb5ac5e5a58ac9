"""What a study compares: the study file, and the catalogue of attention modes, poolings and presets. No torch."""
