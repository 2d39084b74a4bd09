"""Plan a merge from file headers, stream the tensors through it, resume it after an interruption."""
