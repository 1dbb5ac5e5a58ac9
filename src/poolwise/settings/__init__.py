"""The parts of a study file: recipe, design, grid, tuning, and mistakes in it put into words. No torch."""
