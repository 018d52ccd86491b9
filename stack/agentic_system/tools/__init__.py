"""The tools that run on the server's side, one a file."""
