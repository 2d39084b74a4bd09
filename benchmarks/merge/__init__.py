"""How fast a merge is and what memory it takes, beside the least that reading and writing the same bytes takes."""
