"""Banks of documents that agents and people look things up in."""
