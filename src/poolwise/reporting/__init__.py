"""Verdicts in words, tables, pictures and pages."""
