"""What merge methods keep of real experts: every method, at its published settings and tuned."""
