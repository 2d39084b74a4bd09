"""Write the output safely: staging folder, journal, lock on the target, ownership of files, publishing."""
