"""Records as files hold them: formats, fields, turns, and where they come from."""
