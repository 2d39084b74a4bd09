"""Open whatever a user can name (checkpoint, adapter, merged output) as a language model that runs."""
