"""Fast encoding: texts in Python, files, HTTP."""
