"""The command line: presets, overrides, help and error messages."""
