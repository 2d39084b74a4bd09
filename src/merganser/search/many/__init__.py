"""Several processes on one study: who works on which trial, where trials are stored, and workers on a cluster."""
