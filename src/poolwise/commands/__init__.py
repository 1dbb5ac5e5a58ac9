"""Commands of the command line and the options that they share; `cli` has their list."""
