"""`python -m merganser` is the command `merganser`."""

from .cli import main

if __name__ == "__main__":
    main()
