"""Plan a merge from headers, stream it, resume it."""
