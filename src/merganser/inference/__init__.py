"""Open any model that a user can name (checkpoint, adapter, recipe, task of a sidecar) as a language model to run."""
