"""One merge method per file; nothing else lives here."""
