"""Findings in words, tables, pictures and pages."""
