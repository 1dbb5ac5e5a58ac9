"""Poolings: the formulas, their heads, their cost and their laws."""
