"""One file per library that hq_inductor works with. Each imports its library, so import only what is installed."""
