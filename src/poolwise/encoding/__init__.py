"""Fast encoding: of texts, of a file, over HTTP."""
