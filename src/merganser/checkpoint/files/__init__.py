"""The files of a checkpoint: which of them hold weights, which lie beside them, and where links lead."""
