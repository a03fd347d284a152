"""Many runs: read, tabulated, drawn."""
