"""The command line: presets, overrides and what is said of them."""
